"""From config to parts: what only the devices can tell is told in the words of the config."""

import pytest

from codjax import build, checks
from codjax import chat as chats
from tests import tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels.implementation": "pallas_tpu"}, r"kernels\.implementation must run on the dev"),
        ({"kernels.implementation": "pallas_gpu"}, r"which are cpus: .*got 'pallas_gpu'\."),
        ({"mesh.context": -1, "mesh.data": 1}, None),
        (
            {"mesh.context": -1, "mesh.data": 1, "batching.row_length": 65},
            r"batching\.row_length must be a multiple of 8: .*mesh\.context.*got 65\.",
        ),
    ],
)
def test_the_devices_found_must_suit_the_config(changes, message):
    config = tiny.get_config()
    config.update_from_flattened_dict(changes)
    model = build.make_model(config, chats.load_chat(config.tokenizer.source))
    if message is None:
        assert build.make_mesh(config, model).shape["context"] == 8
        return
    with pytest.raises(checks.ConfigError, match=message):
        build.make_mesh(config, model)


def test_a_model_that_the_platforms_kernels_cannot_run_is_refused_before_it_runs():
    config = tiny.get_config()
    sizes = build.make_model(config, chats.load_chat(config.tokenizer.source)).config
    build._check_kernels(config, sizes, "cpu")
    with pytest.raises(
        checks.ConfigError, match=r'kernels\.implementation must be "xla".*64 to 256'
    ):
        build._check_kernels(config, sizes, "tpu")
    config.kernels.implementation = "xla"
    build._check_kernels(config, sizes, "tpu")

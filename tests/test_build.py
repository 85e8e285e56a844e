"""From config to parts: what only the devices can tell is told in the words of the config."""

import pytest

from codjax import build, checks, models
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"config\.json must hold a JSON object; it holds a list\.$"),
        ('{"model_type": "gpt2"}', r"config\.json has model_type 'gpt2'; codjax has the decoders"),
        ('{"model_type": "llama"}', r"^model\.source: .*hidden_size"),
    ],
)
def test_a_model_that_cannot_be_read_is_told_in_one_line(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    config = tiny.get_config()
    config.model.source = str(tmp_path)
    with pytest.raises(checks.ConfigError, match=message) as error:
        build.make_model(config, chats.load_chat(config.tokenizer.source))
    assert "\n" not in str(error.value)


def test_a_model_without_its_weights_is_told_in_one_line(tmp_path):
    config = tiny.get_config()
    chat = chats.load_chat(config.tokenizer.source)
    sizes = build.make_model(config, chat).config
    models.save_pretrained(models.init(sizes, seed=0), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    config.model.source = str(tmp_path)
    model = build.make_model(config, chat)
    with pytest.raises(checks.ConfigError, match=r"^model\.source: .*model\.safetensors"):
        build.first_params(config, model, build.make_mesh(config, model))


@pytest.mark.parametrize("text", ["{bad", "{}", '{"model": {"type": "none"}}'])
def test_a_tokenizer_that_cannot_be_read_is_told_in_one_line(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(checks.ConfigError, match=r"^tokenizer\.source: no tokenizer in") as error:
        chats.load_chat(str(tmp_path))
    assert "\n" not in str(error.value)

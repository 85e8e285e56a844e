"""`codjax convert` of the checkpoints of runs."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from codjax import build, checkpoints, cli, config_files, convert, learner, models, workdirs
from codjax import chat as chats
from codjax.models import orbax_params
from tests import converting

TINY = pathlib.Path(__file__).parent / "tiny.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run of two steps leaves, but for its optimizer, without running it."""
    config = config_files.load(str(TINY))
    workdir = tmp_path_factory.mktemp("convert") / "run"
    workdirs.prepare(workdir)
    workdirs.write_config(workdir, config)
    model = converting.random_model(
        build.make_model(config, chats.load_chat(config.tokenizer.source)).config
    )
    store = checkpoints.Checkpoints(workdir, keep=5)
    for step in (1, 2):
        params = jax.tree.map(lambda x, step=step: x + step, build.params_of(model))
        store.save(step, learner.TrainState(params, {"m": params}, jnp.int32(step)), {})
    store.close()
    return config, workdir


@pytest.mark.parametrize("step", [None, 1])
def test_a_run_is_exported(run, step, tmp_path):
    config, workdir = run
    source = workdir if step is None else workdir / "checkpoints" / str(step)
    text = convert.main(str(source), str(tmp_path / "hf"))
    assert f"step {step or 2} of the run in {workdir}: " in text
    loaded = models.from_pretrained(tmp_path / "hf")
    assert loaded.config.num_layers == config.model.num_layers
    assert loaded.config.rope_theta == config.model.rope_theta
    stored = orbax_params.open_stores(workdir / "checkpoints" / str(step or 2) / "params")
    for path, value in nnx.to_flat_state(nnx.state(loaded)):
        np.testing.assert_array_equal(value[...], stored[".".join(path)].read())
    # Layers are stored apart, so that they can be read one at a time.
    chunk = stored["layers.gate"].chunks
    assert chunk[0] == 1


def test_a_run_that_began_from_a_folder_gets_its_config_and_tokenizer(run, tmp_path, capsys):
    """The run's config.json says where it began; the folder is asked for what a model has."""
    _, workdir = run
    convert.main(str(workdir), str(tmp_path / "first"))
    (tmp_path / "first" / "generation_config.json").write_text("{}")
    fields = json.loads((tmp_path / "first" / "config.json").read_text())
    fields["max_position_embeddings"], fields["torch_dtype"] = 77, "bfloat16"
    (tmp_path / "first" / "config.json").write_text(json.dumps(fields))
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["source"] = str(tmp_path / "first")
    (copy / "config.json").write_text(json.dumps(config))
    assert cli.main(["convert", f"--source={copy}", f"--output={tmp_path / 'hf'}"]) == 0
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["max_position_embeddings"] == 77
    assert fields["torch_dtype"] == "float32"  # of the parameters, which were trained in it
    assert (tmp_path / "hf" / "generation_config.json").exists()

    capsys.readouterr()
    shutil.rmtree(tmp_path / "first")
    assert cli.main(["convert", f"--source={copy}", f"--output={tmp_path / 'second'}"]) == 2
    assert "whose config.json is not on this machine; put that folder back" in converting.line_of(
        capsys
    )


def change(config, key, value):
    section, _, name = key.rpartition(".")
    for part in filter(None, section.split(".")):
        config = config[part]
    if value is None:
        del config[name]
    else:
        config[name] = value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "lacks model."),
        ("[1]", "must hold a JSON object; it holds a list."),
        ({"model": [1]}, ": model must be an object; it is a list."),
        ({"tokenizer": None}, "lacks tokenizer."),
        ({"tokenizer.source": 3}, ": tokenizer.source must be a string; it is 3."),
        ({"model.source": None}, "lacks model.source."),
        ({"model.num_layers": None}, "lacks model.num_layers."),
        (
            {"model.num_layer": 3},
            ": model.num_layer is not a config key (did you mean num_layers?).",
        ),
        ({"model.head_dim": "8"}, ": model.head_dim must be an integer; got '8'."),
        (
            {"model.num_kv_heads": 3},
            ": model.num_heads must be a multiple of model.num_kv_heads = 3: each key-value head "
            "serves equally many heads; got 2.",
        ),
    ],
)
def test_a_config_of_a_run_that_is_damaged(run, text, message, tmp_path, capsys):
    _, workdir = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    path = copy / "config.json"
    if not isinstance(text, str):
        config = json.loads(path.read_text())
        for key, value in text.items():
            change(config, key, value)
        text = json.dumps(config)
    path.write_text(text)
    assert cli.main(["convert", f"--source={copy}", f"--output={tmp_path / 'hf'}"]) == 2
    separator = "" if message.startswith(":") else " "
    assert converting.line_of(capsys) == f"codjax convert: --source: {path}{separator}{message}\n"


def test_an_older_run_without_a_newer_key(run, tmp_path):
    _, workdir = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = json.loads((copy / "config.json").read_text())
    for key in ("vocab_size", "family", "num_experts"):
        del config["model"][key]
    (copy / "config.json").write_text(json.dumps(config))
    for source, output in ((workdir, "one"), (copy, "other")):
        convert.main(str(source), str(tmp_path / output))
    one, other = (converting.tensors_in(tmp_path / name) for name in ("one", "other"))
    assert one == other


def test_a_run_without_a_checkpoint_is_named_once(run, tmp_path, capsys):
    """Errors from within say the flag themselves."""
    _, workdir = run
    assert (
        cli.main(["convert", f"--source={workdir}/checkpoints/7", f"--output={tmp_path / 'o'}"])
        == 2
    )
    assert converting.line_of(capsys) == (
        f"codjax convert: --source: {workdir} holds no finished checkpoint of step 7.\n"
    )


def test_a_damaged_chunk(run, tmp_path, capsys):
    _, workdir = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    params = copy / "checkpoints" / "2" / "params"
    file = max(params.rglob("d/*"), key=lambda file: file.stat().st_size)  # others tell the names
    file.write_bytes(file.read_bytes()[:100])
    assert cli.main(["convert", f"--source={copy}", f"--output={tmp_path / 'hf'}"]) == 2
    line = converting.line_of(capsys)
    assert line.startswith("codjax convert: --source: ")
    assert f" of {params} cannot be read, so the checkpoint is damaged; copy it again (" in line

"""`codjax convert`: there and back byte by byte, exports that load, kills, and what is refused."""

import fcntl
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from codjax import (
    build,
    checkpoints,
    cli,
    config_files,
    convert,
    learner,
    models,
    sharding,
    validation,
    workdirs,
)
from codjax import chat as chats
from codjax.models import hf_folder, hf_names, orbax_params
from tests import small

TINY = pathlib.Path(__file__).parent / "tiny.py"


def random_model(config):
    """Every parameter random, norms too; made by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=spec.shape), config.param_dtype)
        for name, spec in hf_names.param_specs(config).items()
    }
    return models.Decoder(config, params)


def write_model(folder, *, dtype="bfloat16", max_shard_bytes=10**9, **changes):
    """A Hugging Face folder of a small random model, with the files that come with one."""
    models.save_pretrained(
        random_model(small.decoder_config(num_layers=3, param_dtype=dtype, **changes)),
        folder,
        extra_fields={"eos_token_id": 5},
        max_shard_bytes=max_shard_bytes,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"):
        (folder / name).write_text(f'{{"of": "{name}"}}')
    (folder / "README.md").write_text("not a part of the model")
    return folder


def tensors_in(folder):
    """Name → dtype, shape and bytes of every tensor in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            for name in names:
                array = tensors.get_tensor(name)
                found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


def line_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_byte_by_byte(dtype, tied, tmp_path, capsys):
    source = write_model(tmp_path / "hf", dtype=dtype, tie_embeddings=tied, max_shard_bytes=9000)
    assert len(list(source.glob("*.safetensors"))) > 2
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'orbax'}"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert "layers.query" in out
    assert "model.layers.{0-2}.self_attn.q_proj.weight" in out
    assert "36 tensors, 21 of them reshaped; none missing, none unexpected" in out or tied
    back = ["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'again'}"]
    assert cli.main([*back, "--max-shard-size=7KB"]) == 0

    assert tensors_in(tmp_path / "again") == tensors_in(source)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    fields = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == fields
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"):
        for folder in ("orbax", "again"):
            assert (tmp_path / folder / name).read_text() == (source / name).read_text()
    assert not (tmp_path / "orbax" / "README.md").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_converted_folder_is_a_model_like_any_other(tmp_path):
    source = write_model(tmp_path / "hf")
    convert.main(str(source), str(tmp_path / "orbax"))
    plain, converted = (
        models.from_pretrained(folder, param_dtype="float32")
        for folder in (source, tmp_path / "orbax")
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), nnx.state(converted))
    mesh = sharding.make_mesh(2, 2, 2)
    cut = models.from_pretrained(tmp_path / "orbax", place=sharding.place(mesh))
    shardings = sharding.param_shardings(cut, mesh)
    params = nnx.to_pure_dict(nnx.state(cut))
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    jax.tree.map(np.testing.assert_array_equal, nnx.state(cut), nnx.state(plain))


def test_a_run_begins_from_a_converted_folder(tmp_path):
    config = config_files.load(str(TINY))
    chat = chats.load_chat(config.tokenizer.source)
    source = write_model(tmp_path / "hf", vocab_size=chat.vocab_size)
    convert.main(str(source), str(tmp_path / "orbax"))
    first = {}
    for folder in ("hf", "orbax"):
        config.model.source = str(tmp_path / folder)
        validation.validate(config)
        model = build.make_model(config, chat)
        first[folder] = build.first_params(config, model, build.make_mesh(config, model))
    jax.tree.map(np.testing.assert_array_equal, first["hf"], first["orbax"])


def test_a_sharded_load_reads_what_the_devices_need_and_no_stack(tmp_path, monkeypatch):
    source = write_model(tmp_path / "hf")
    sizes = []
    read = hf_folder.Folder.read

    def counted(self, name, index):
        part = read(self, name, index)
        assert part.dtype == "bfloat16"  # no wider than it is stored
        sizes.append((name, part.size))
        return part

    monkeypatch.setattr(hf_folder.Folder, "read", counted)
    mesh = sharding.make_mesh(2, 2, 2)  # data twice: two devices hold the same part
    models.from_pretrained(source, "bfloat16", place=sharding.place(mesh))
    wide = [(name, size) for name, size in sizes if "norm" not in name]  # norms are everywhere
    config = models.read_config(source, dtype="float32", param_dtype="float32", remat="none")
    shapes = {name: array[1] for name, array in tensors_in(source).items()}
    assert sum(size for _, size in wide) == sum(
        np.prod(shape) for name, shape in shapes.items() if "norm" not in name
    )
    assert all(size == np.prod(shapes[name]) / 4 for name, size in wide)
    assert config.num_layers == 3


def test_another_dtype_is_asked_for(tmp_path):
    source = write_model(tmp_path / "hf", dtype="float32")
    convert.main(str(source), str(tmp_path / "orbax"), dtype="bfloat16")
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    found, stored = tensors_in(tmp_path / "again"), tensors_in(source)
    for name, (dtype, shape, data) in found.items():
        assert (dtype, shape) == ("bfloat16", stored[name][1])
        narrow = np.frombuffer(stored[name][2], np.float32).astype("bfloat16")
        assert data == narrow.tobytes()
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"


def test_parameters_of_different_dtypes_keep_theirs(tmp_path, capsys):
    source = write_model(tmp_path / "hf")
    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name, value in tensors.items():
        if "norm" in name:
            tensors[name] = value.astype(np.float32)
    safetensors.numpy.save_file(tensors, file)
    convert.main(str(source), str(tmp_path / "orbax"))
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    assert tensors_in(tmp_path / "again") == tensors_in(source)

    tensors["model.layers.1.input_layernorm.weight"] = np.ones(16, np.float16)
    safetensors.numpy.save_file(tensors, file)
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'third'}"]
    assert cli.main(args) == 2
    assert "--dtype must be given: layers of layers.attention_norm are sto" in line_of(capsys)
    assert cli.main([*args, "--dtype=float32"]) == 0


def test_a_tied_table_stored_twice_is_left_out_and_told(tmp_path):
    source = write_model(tmp_path / "hf", tie_embeddings=True)
    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file
    )
    text = convert.main(str(source), str(tmp_path / "orbax"))
    assert "left out: lm_head.weight, a copy of model.embed_tokens.weight\n" in text
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    assert tensors_in(tmp_path / "again").keys() == tensors.keys()


# Checkpoints of runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run of two steps leaves, but for its optimizer, without running it."""
    config = config_files.load(str(TINY))
    workdir = tmp_path_factory.mktemp("convert") / "run"
    workdirs.prepare(workdir)
    workdirs.write_config(workdir, config)
    model = random_model(build.make_model(config, chats.load_chat(config.tokenizer.source)).config)
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
        np.testing.assert_array_equal(value[...], stored[".".join(path)].read().result())
    # Layers are stored apart, so that they can be read one at a time.
    chunk = stored["layers.gate"].chunk_layout.read_chunk.shape
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
    assert "whose config.json is not on this machine; put that folder back" in line_of(capsys)


# Interruptions.

KILLED = """
import os, signal, sys
from codjax import cli
from codjax.models import hf_folder, hf_names, orbax_params
number = 0

def killed(function):
    def call(*args, **kwargs):
        global number
        number += 1
        if number == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

{place} = killed({place})
cli.main(sys.argv[1:])
"""


def run_killed(args, *, place, after):
    """The command in a process of its own, which dies at a call of a function."""
    program = KILLED.format(place=place, after=after)
    process = subprocess.run([sys.executable, "-c", program, *args], check=False, timeout=200)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("place", "after", "num_whole"),
    [
        ("hf_names.Counterpart.to_tensor", 20, 2),  # in the middle of a file
        ("hf_folder.write_index", 1, 6),  # when all files are there
    ],
)
def test_an_export_that_is_killed_goes_on(place, after, num_whole, tmp_path, caplog):
    source = write_model(tmp_path / "hf", max_shard_bytes=5000)
    convert.main(str(source), str(tmp_path / "orbax"))
    args = ["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'out'}"]
    args += ["--max-shard-size=4KB"]
    run_killed(args, place=place, after=after)
    assert not (tmp_path / "out").exists()  # nothing to be taken for a model
    partial = tmp_path / "out.partial"
    whole = sorted(partial.glob("*.safetensors"))
    assert len(whole) == num_whole
    before = {file.name: file.stat().st_mtime_ns for file in whole}
    assert not (partial / "config.json").exists()

    caplog.set_level("INFO", logger="codjax")
    assert cli.main(args) == 0
    assert "Going on with the interrupted conversion in " in caplog.text
    assert f"{num_whole} of 6 files are there already" in caplog.text
    after_it = {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")
    }
    assert before.items() <= after_it.items()  # what was there was not written again
    assert tensors_in(tmp_path / "out") == tensors_in(source)
    assert not partial.exists()
    assert not list((tmp_path / "out").glob("*.partial"))

    text = convert.main(str(tmp_path / "orbax"), str(tmp_path / "out"), max_shard_size="4KB")
    assert "is this conversion of " in text


@pytest.mark.parametrize(
    ("place", "after", "message"),
    [
        ("hf_names.Counterpart.read", 20, "were not all written; they are begun again"),
        ("hf_folder.write_text", 2, "are there already, whole"),  # 1: the record
    ],
)
def test_an_import_that_is_killed_begins_again(place, after, message, tmp_path, caplog):
    source = write_model(tmp_path / "hf")
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]
    run_killed(args, place=place, after=after)
    assert not (tmp_path / "out").exists()
    caplog.set_level("INFO", logger="codjax")
    assert cli.main(args) == 0
    assert message in caplog.text
    convert.main(str(tmp_path / "out"), str(tmp_path / "again"))
    assert tensors_in(tmp_path / "again") == tensors_in(source)


def test_what_another_conversion_began_is_removed(tmp_path, caplog, monkeypatch):
    first, second = (write_model(tmp_path / name) for name in ("one", "two"))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(orbax_params, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert.main(str(first), str(tmp_path / "out"))
    caplog.set_level("INFO", logger="codjax")
    convert.main(str(second), str(tmp_path / "out"))
    assert "was the beginning of another conversion; it is removed" in caplog.text
    assert str(second) in (tmp_path / "out" / "conversion.json").read_text()


def test_two_at_once_are_not_let(tmp_path, capsys):
    source = write_model(tmp_path / "hf")
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert "out.partial is being written by another codjax convert" in line_of(capsys)


# What is refused, in one line, before anything is written.


def wrong_bytes(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def wrong_tensors(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    safetensors.numpy.save_file(tensors, file)


def quantised(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.norm.weight"] = np.zeros(16, np.int8)
    safetensors.numpy.save_file(tensors, file)


def set_field(**changes):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "--source must be a Hugging Face folder (config.json and safetensors), "),
        (lambda folder: (folder / "config.json").unlink(), "--source must be a Hugging Face fold"),
        (lambda folder: (folder / "config.json").write_text("{"), "--source: Expecting property"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors does not exi"),
        (wrong_bytes, "model.safetensors is no whole safetensors file"),
        (
            wrong_tensors,
            "3 missing, 1 unexpected, 1 of another shape; missing model.layers.{0-2}.mlp.up_proj.w"
            "eight; unexpected model.layers.1.self_attn.q_proj.bias; model.norm.weight has shape "
            "(17,), not (16,).",
        ),
        (quantised, "model.norm.weight is I8, not a float: quantised weights are not supported"),
        (set_field(quantization_config={"bits": 4}), "config.json has quantization_config = "),
        (set_field(model_type="gpt2"), "model_type 'gpt2'"),
    ],
)
def test_a_source_that_is_not_whole(damage, message, tmp_path, capsys):
    source = write_model(tmp_path / "hf")
    damage(source)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert message in line_of(capsys)
    assert not list(tmp_path.glob("out*"))


def test_an_orbax_folder_of_another_model(tmp_path, capsys):
    convert.main(str(write_model(tmp_path / "hf")), str(tmp_path / "orbax"))
    set_field(vocab_size=25)(tmp_path / "orbax")
    assert (
        cli.main(["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'o'}"]) == 2
    )
    assert "2 of another shape; embedding has shape (24, 16), not (25, 16); " in line_of(capsys)
    with pytest.raises(ValueError, match="2 of another shape"):
        models.from_pretrained(tmp_path / "orbax")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output": None}, "--output=DIR must be given"),
        ({"source": None}, "--source=DIR must be given"),
        ({"dtype": "float8"}, "--dtype must be one of float32, bfloat16; got 'float8'"),
        ({"max-shard-size": "5"}, "--max-shard-size must be a whole number with KB, MB, GB, as 5"),
        ({"max-shard-size": "0GB"}, "--max-shard-size must be a whole number"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    given = {"source": str(tmp_path / "hf"), "output": str(tmp_path / "out")} | flags
    args = [f"--{name}={value}" for name, value in given.items() if value]
    assert cli.main(["convert", *args]) == 2
    assert message in line_of(capsys)


def test_an_output_that_is_there_stays(tmp_path, capsys):
    source = write_model(tmp_path / "hf")
    for output in (source, tmp_path / "hf" / "config.json"):
        assert cli.main(["convert", f"--source={source}", f"--output={output}"]) == 2
        assert "must not exist: another thing is there" in line_of(capsys)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert "out.partial is in the way, and not of codjax convert" in line_of(capsys)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
    assert len(list((tmp_path / "out.partial").iterdir())) == 1


def test_a_disk_that_is_full(tmp_path, capsys, monkeypatch):
    source = write_model(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert "has 1.00 KB left; make room" in line_of(capsys)
    assert not list(tmp_path.glob("out*"))


# What others read.


def test_transformers_loads_an_export_without_a_word(tmp_path, caplog, recwarn):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    fields = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="3KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    convert.main(str(tmp_path / "hf"), str(tmp_path / "orbax"))
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"), max_shard_size="4KB")
    assert tensors_in(tmp_path / "again") == tensors_in(tmp_path / "hf")
    caplog.clear()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    assert caplog.text == ""
    assert not recwarn.list
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)

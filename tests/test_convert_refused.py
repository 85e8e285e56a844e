"""Sources and flags that `codjax convert` refuses: in one line, before anything is written."""

import errno
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from codjax import cli, convert, models
from tests import converting


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "--source must be a Hugging Face folder (config.json and safetensors), "),
        (lambda folder: (folder / "config.json").unlink(), "--source must be a Hugging Face fold"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors does not exi"),
        (wrong_bytes, "model.safetensors is no whole safetensors file"),
        (
            wrong_tensors,
            "3 missing, 1 unexpected, 1 of another shape; missing model.layers.{0-2}.mlp.up_proj.w"
            "eight; unexpected model.layers.1.self_attn.q_proj.bias; model.norm.weight has shape "
            "(17,), not (16,).",
        ),
        (quantised, "model.norm.weight is I8, not a float: quantised weights are not supported"),
        (
            converting.set_field(quantization_config={"bits": 4}),
            "config.json has quantization_config = ",
        ),
        (converting.set_field(model_type="gpt2"), "model_type 'gpt2'"),
    ],
)
def test_a_source_that_is_not_whole(damage, message, tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    damage(source)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert message in converting.line_of(capsys)
    assert not list(tmp_path.glob("out*"))


def test_an_orbax_folder_of_another_model(tmp_path, capsys):
    convert.main(str(converting.write_model(tmp_path / "hf")), str(tmp_path / "orbax"))
    converting.set_field(vocab_size=25)(tmp_path / "orbax")
    assert (
        cli.main(["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'o'}"]) == 2
    )
    assert "2 of another shape; embedding has shape (24, 16), not (25, 16); " in converting.line_of(
        capsys
    )
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
        ({"max-shard-size": "²GB"}, "--max-shard-size must be a whole number"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    given = {"source": str(tmp_path / "hf"), "output": str(tmp_path / "out")} | flags
    args = [f"--{name}={value}" for name, value in given.items() if value]
    assert cli.main(["convert", *args]) == 2
    assert message in converting.line_of(capsys)


# What is malformed: whole messages.

SHARDS = {"max_shard_bytes": 9000}
KINDS = "codjax supports rope_type 'default', 'linear' with a factor, and 'llama3' with factor, "
KINDS += "low_freq_factor, high_freq_factor, original_max_position_embeddings."


def index(change):
    def write(folder):
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return write


def text(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            index(lambda _: [1]),
            "{}/model.safetensors.index.json must hold a JSON object; it holds a list.",
        ),
        (index(lambda _: {}), "{}/model.safetensors.index.json lacks weight_map."),
        (
            index(lambda _: {"weight_map": ["x"]}),
            "{}/model.safetensors.index.json: weight_map must be an object; it is a list.",
        ),
        (
            index(lambda _: {"weight_map": {"x": 3}}),
            "{}/model.safetensors.index.json: weight_map "
            "must name files in the folder itself; it names 3.",
        ),
        (
            index(lambda _: {"weight_map": {"x": "../x"}}),
            "{}/model.safetensors.index.json: "
            "weight_map must name files in the folder itself; it names '../x'.",
        ),
        (
            index(lambda _: {"weight_map": {"x": "/x"}}),
            "{}/model.safetensors.index.json: "
            "weight_map must name files in the folder itself; it names '/x'.",
        ),
        (
            index(lambda _: {"weight_map": {"x": ".."}}),
            "{}/model.safetensors.index.json: "
            "weight_map must name files in the folder itself; it names '..'.",
        ),
        (text(b"[]"), "{}/config.json must hold a JSON object; it holds a list."),
        (
            text(b"{"),
            "{}/config.json is not JSON (Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)); restore it.",
        ),
        (
            text(b"\xff"),
            "{}/config.json is not JSON ('utf-8' codec can't decode byte 0xff in "
            "position 0: invalid start byte); restore it.",
        ),
        (
            converting.set_field(rope_scaling=[2]),
            "{}: config.json has rope_scaling = [2]; it must be an object.",
        ),
        (
            converting.set_field(rope_parameters={"rope_type": ["linear"]}),
            "{}: config.json has rope_parameters = {{'rope_type': ['linear']}}; " + KINDS,
        ),
        (
            converting.set_field(rope_scaling={"type": "linear", "factor": "2"}),
            "{}: config.json has rope_scaling.factor = '2'; it must be a finite number.",
        ),
        (
            converting.set_field(rope_scaling={"type": "linear", "factor": 0.5}),
            "{}: config.json has rope_scaling = {{'type': 'linear', 'factor': 0.5}}: the factor of "
            "rope scaling must be at least 1; got 0.5.",
        ),
        (
            converting.set_field(model_type=["qwen3"]),
            "{}: config.json has model_type ['qwen3']; "
            "codjax has the decoders of 'qwen3', 'qwen2', 'llama', 'qwen3_moe' only.",
        ),
        (
            converting.set_field(layer_types=3),
            "{}: config.json has layer_types = 3; codjax supports a list of 'full_attention' only.",
        ),
        (
            converting.set_field(layer_types=[[1]]),
            "{}: config.json has layer_types = [[1]]; codjax "
            "supports a list of 'full_attention' only.",
        ),
        (
            converting.set_field(num_attention_heads=3),
            "{}: config.json describes no decoder of ours: model.num_heads must be a multiple of "
            "model.num_kv_heads = 2: each key-value head serves equally many heads; got 3.",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_field(damage, message, tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf", **SHARDS)
    damage(source)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    expected = f"codjax convert: --source: {message.format(source)}\n"
    assert converting.line_of(capsys) == expected
    assert not list(tmp_path.glob("out*"))


def test_a_config_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    source = converting.write_model(tmp_path / "hf")
    read_text = pathlib.Path.read_text

    def refuse(path, **kwargs):  # root may read what has no permission
        if path.name == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    assert cli.main(["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]) == 2
    assert converting.line_of(capsys) == (
        f"codjax convert: --source: {source}/config.json cannot be read: Permission denied.\n"
    )


def test_an_output_in_the_source(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    (tmp_path / "link").symlink_to(source)
    before = sorted(source.iterdir())
    for output in (source, source / "orbax", tmp_path / "link" / "a" / "b"):
        assert cli.main(["convert", f"--source={source}", f"--output={output}"]) == 2
        assert converting.line_of(capsys) == (
            f"codjax convert: --output={output} must not be in --source={source}; give a folder "
            "beside it.\n"
        )
    assert sorted(source.iterdir()) == before

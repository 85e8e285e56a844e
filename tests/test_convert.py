"""`codjax convert`: there and back byte by byte, and exports that others load."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from codjax import build, cli, config_files, convert, models, sharding, validation
from codjax import chat as chats
from codjax.models import hf_folder
from tests import converting

TINY = pathlib.Path(__file__).parent / "tiny.py"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_byte_by_byte(dtype, tied, tmp_path, capsys):
    source = converting.write_model(
        tmp_path / "hf", dtype=dtype, tie_embeddings=tied, max_shard_bytes=9000
    )
    assert len(list(source.glob("*.safetensors"))) > 2
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'orbax'}"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert "layers.query" in out
    assert "model.layers.{0-2}.self_attn.q_proj.weight" in out
    assert "36 tensors, 21 of them reshaped; none missing, none unexpected" in out or tied
    back = ["convert", f"--source={tmp_path / 'orbax'}", f"--output={tmp_path / 'again'}"]
    assert cli.main([*back, "--max-shard-size=7KB"]) == 0

    assert converting.tensors_in(tmp_path / "again") == converting.tensors_in(source)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    fields = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == fields
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"):
        for folder in ("orbax", "again"):
            assert (tmp_path / folder / name).read_text() == (source / name).read_text()
    assert not (tmp_path / "orbax" / "README.md").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_converted_folder_is_a_model_like_any_other(tmp_path):
    source = converting.write_model(tmp_path / "hf")
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
    source = converting.write_model(tmp_path / "hf", vocab_size=chat.vocab_size)
    convert.main(str(source), str(tmp_path / "orbax"))
    first = {}
    for folder in ("hf", "orbax"):
        config.model.source = str(tmp_path / folder)
        validation.validate(config)
        model = build.make_model(config, chat)
        first[folder] = build.first_params(config, model, build.make_mesh(config, model))
    jax.tree.map(np.testing.assert_array_equal, first["hf"], first["orbax"])


def test_a_sharded_load_reads_what_the_devices_need_and_no_stack(tmp_path, monkeypatch):
    source = converting.write_model(tmp_path / "hf")
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
    shapes = {name: array[1] for name, array in converting.tensors_in(source).items()}
    assert sum(size for _, size in wide) == sum(
        np.prod(shape) for name, shape in shapes.items() if "norm" not in name
    )
    assert all(size == np.prod(shapes[name]) / 4 for name, size in wide)
    assert config.num_layers == 3


def test_another_dtype_is_asked_for(tmp_path):
    source = converting.write_model(tmp_path / "hf", dtype="float32")
    convert.main(str(source), str(tmp_path / "orbax"), dtype="bfloat16")
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    found, stored = converting.tensors_in(tmp_path / "again"), converting.tensors_in(source)
    for name, (dtype, shape, data) in found.items():
        assert (dtype, shape) == ("bfloat16", stored[name][1])
        narrow = np.frombuffer(stored[name][2], np.float32).astype("bfloat16")
        assert data == narrow.tobytes()
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"


def test_parameters_of_different_dtypes_keep_theirs(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name, value in tensors.items():
        if "norm" in name:
            tensors[name] = value.astype(np.float32)
    safetensors.numpy.save_file(tensors, file)
    convert.main(str(source), str(tmp_path / "orbax"))
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    assert converting.tensors_in(tmp_path / "again") == converting.tensors_in(source)

    tensors["model.layers.1.input_layernorm.weight"] = np.ones(16, np.float16)
    safetensors.numpy.save_file(tensors, file)
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'third'}"]
    assert cli.main(args) == 2
    assert "--dtype must be given: layers of layers.attention_norm are sto" in converting.line_of(
        capsys
    )
    assert cli.main([*args, "--dtype=float32"]) == 0


def test_a_tied_table_stored_twice_is_left_out_and_told(tmp_path):
    source = converting.write_model(tmp_path / "hf", tie_embeddings=True)
    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file
    )
    text = convert.main(str(source), str(tmp_path / "orbax"))
    assert "left out: lm_head.weight, a copy of model.embed_tokens.weight\n" in text
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    assert converting.tensors_in(tmp_path / "again").keys() == tensors.keys()


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
    assert converting.tensors_in(tmp_path / "again") == converting.tensors_in(tmp_path / "hf")
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

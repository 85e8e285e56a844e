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
from tests.models import cases

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


# Values that are not finite.


def write_value(folder, name, value, dtype=np.float32):
    """Set the first value of a tensor of a single file."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    array = tensors[name].astype(dtype)
    array.reshape(-1)[:1] = value
    safetensors.numpy.save_file(tensors | {name: array}, file)


def test_values_that_are_not_finite_are_kept_and_told(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf", dtype="float32")
    write_value(source, "model.layers.1.mlp.up_proj.weight", np.nan)
    write_value(source, "model.layers.2.mlp.up_proj.weight", -np.inf)
    write_value(source, "model.norm.weight", np.inf)
    told = (
        "not finite: 1 values of final_norm, as in the source\n"
        "not finite: 2 values of layers.up, as in the source\n"
    )
    assert told in convert.main(str(source), str(tmp_path / "orbax"), dtype="bfloat16")
    text = convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"), max_shard_size="4KB")
    assert told in text
    record = json.loads((tmp_path / "again" / "conversion.json").read_text())
    assert record["non_finite"] == {"final_norm": 1, "layers.up": 2}
    convert.main(str(source), str(tmp_path / "exact"))
    convert.main(str(tmp_path / "exact"), str(tmp_path / "back"))
    assert converting.tensors_in(tmp_path / "back") == converting.tensors_in(source)


@pytest.mark.parametrize("direction", ["to orbax", "to hugging face"])
def test_values_that_a_dtype_cannot_hold_are_refused(direction, tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf", dtype="float32")
    write_value(source, "model.layers.1.mlp.up_proj.weight", np.nan)
    write_value(source, "model.layers.2.mlp.up_proj.weight", 3.4e38)  # bfloat16 ends at 3.39e38
    if direction == "to hugging face":
        convert.main(str(source), str(tmp_path / "orbax"))
        source = tmp_path / "orbax"
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}"]
    assert cli.main([*args, "--dtype=bfloat16"]) == 2
    assert converting.line_of(capsys) == (
        "codjax convert: --dtype=bfloat16 cannot hold 1 values of layers.up: they are finite in "
        "float32, and not in bfloat16; give another dtype, or none.\n"
    )
    assert not (tmp_path / "out").exists()
    assert cli.main(args) == 0


def test_wide_values_of_some_layers_are_seen_in_their_own_dtype(tmp_path, capsys):
    source = converting.write_model(tmp_path / "hf")
    write_value(source, "model.layers.1.mlp.up_proj.weight", 1e300, np.float64)
    args = ["convert", f"--source={source}", f"--output={tmp_path / 'out'}", "--dtype=float32"]
    assert cli.main(args) == 2
    assert "--dtype=float32 cannot hold 1 values of layers.up" in converting.line_of(capsys)


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


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# As transformers 5 writes them.
NEW_SPELLINGS = {
    "llama": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"rope_theta": 5e3},
        "num_key_value_heads": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
    },
}
OLD_SPELLINGS = {"llama": {"rope_scaling": LLAMA3}, "qwen3_moe": {"num_experts": 4}}
REMOVED = ("rope_theta", "rope_scaling", "num_experts", "architectures", "torch_dtype", "dtype")


@pytest.mark.parametrize("name", NEW_SPELLINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_export_has_the_spellings_of_older_loaders(name, dtype, tmp_path):
    fields = cases.fields_of({"llama": "smollm2"}.get(name, name))
    fields = {key: value for key, value in fields.items() if key not in REMOVED}
    fields |= NEW_SPELLINGS[name]
    config = models.DecoderConfig.from_hf(fields, dtype="float32", param_dtype=dtype, remat="none")
    models.save_pretrained(converting.random_model(config), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    convert.main(str(tmp_path / "hf"), str(tmp_path / "orbax"))
    assert json.loads((tmp_path / "orbax" / "config.json").read_text()) == fields
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"))
    found = json.loads((tmp_path / "again" / "config.json").read_text())
    added = {"rope_theta": 5e3, "architectures": config.to_hf()["architectures"]}
    assert found == fields | added | OLD_SPELLINGS[name] | {"torch_dtype": dtype}
    for kept in ({}, {"rope_parameters": None, "num_local_experts": None}):  # for old and for new
        read = {key: value for key, value in (found | kept).items() if value is not None}
        again = models.DecoderConfig.from_hf(read, dtype="float32", param_dtype=dtype, remat="none")
        assert again == config


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixture_that_transformers_wrote_comes_back_whole(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    fields = cases.fields_of("qwen3_moe") | {"tie_word_embeddings": tied}
    config = transformers.AutoConfig.for_model(**fields)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert.main(str(tmp_path / "hf"), str(tmp_path / "orbax"))
    convert.main(str(tmp_path / "orbax"), str(tmp_path / "again"), max_shard_size="30KB")
    assert converting.tensors_in(tmp_path / "again") == converting.tensors_in(tmp_path / "hf")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    ours = theirs.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.state_dict().items())

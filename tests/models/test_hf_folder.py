"""Safetensors read part by part and written file by file."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from codjax import models
from codjax.models import hf_folder, hf_names, hf_shards
from codjax.models.qwen3 import ParamSpec
from tests import small

SPECS = {
    "embedding": ParamSpec((5, 4), ("vocab", "embed"), None),
    "layers.attention_norm": ParamSpec((3, 4), ("layers", "norm"), None),
    "layers.router": ParamSpec((3, 4, 2), ("layers", "embed", "experts"), None),
}
COUNTERPARTS = {name: hf_names.counterpart(name, spec) for name, spec in SPECS.items()}


def test_files_hold_what_fits_and_safetensors_reads_them(tmp_path):
    values = {
        name: np.random.default_rng(0).normal(size=spec.shape).astype(np.float32)
        for name, spec in SPECS.items()
    }
    dtypes = dict.fromkeys(SPECS, np.dtype(ml_dtypes.bfloat16))
    dtypes["layers.router"] = np.dtype(np.float32)
    shards = hf_shards.plan_shards(COUNTERPARTS, dtypes, max_bytes=70)
    for shard in shards:
        arrays = hf_shards.tensors_of(shard, COUNTERPARTS, lambda name, i: values[name][i])
        hf_shards.write_shard(tmp_path, shard, arrays)
        assert (tmp_path / shard.file).stat().st_size == shard.num_bytes
    hf_shards.write_index(tmp_path, shards)

    index = json.loads((tmp_path / hf_folder.INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 3 * 2 * 4 * 4 + (3 * 4 + 5 * 4) * 2}
    found = {}
    for shard in shards:
        tensors = safetensors.numpy.load_file(tmp_path / shard.file)
        assert all(index["weight_map"][name] == shard.file for name in tensors)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 70
        found |= tensors
    assert len(shards) == 3
    for layer in range(3):
        router = found[f"model.layers.{layer}.mlp.gate.weight"]
        np.testing.assert_array_equal(router, values["layers.router"][layer].T)
    assert found["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".safetensors"] * 3]

    folder = hf_folder.Folder(tmp_path)
    hf_folder.check(folder, COUNTERPARTS, path=tmp_path, tie_embeddings=True)
    rows = folder.read("model.embed_tokens.weight", (slice(1, 3), slice(0, 4)))
    np.testing.assert_array_equal(rows, values["embedding"][1:3].astype(ml_dtypes.bfloat16))


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    dtypes = dict.fromkeys(COUNTERPARTS, np.dtype(np.float32))
    [shard] = hf_shards.plan_shards(COUNTERPARTS, dtypes, max_bytes=10**6)

    def part(name, index):
        if name == "layers.router" and index == (1,):
            raise KeyboardInterrupt
        return np.zeros(SPECS[name].shape, np.float32)[index]

    with pytest.raises(KeyboardInterrupt):
        hf_shards.write_shard(tmp_path, shard, hf_shards.tensors_of(shard, COUNTERPARTS, part))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.partial"]


def test_fused_experts_are_read_as_those_of_each_expert(tmp_path):
    """transformers 5 holds ``gate_up_proj [E 2F D]`` and ``down_proj [E D F]``."""
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)  # [E F D] each
    down = rng.normal(size=(2, 5, 3)).astype(np.float32)
    prefix = "model.layers.0.mlp.experts"
    fused = {
        f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{prefix}.down_proj": down,
    }
    safetensors.numpy.save_file(fused, tmp_path / "model.safetensors")
    folder = hf_folder.Folder(tmp_path)
    axes = ("layers", "experts", "embed", "mlp")
    specs = {
        "layers.gate": ParamSpec((1, 2, 5, 3), axes, None),
        "layers.up": ParamSpec((1, 2, 5, 3), axes, None),
        "layers.down": ParamSpec((1, 2, 3, 5), (*axes[:2], "mlp", "embed"), None),
    }
    counterparts = {name: hf_names.counterpart(name, spec) for name, spec in specs.items()}
    hf_folder.check(folder, counterparts, path=tmp_path, tie_embeddings=True)
    for name, value in (("layers.gate", gate), ("layers.up", up), ("layers.down", down)):
        for index in ((slice(None),) * 4, (slice(0, 1), slice(1, 2), slice(1, 3), slice(2, 3))):
            part = counterparts[name].read(index, folder.read, np.float32)
            np.testing.assert_array_equal(part, value.swapaxes(1, 2)[None][index])


def test_saving_again_leaves_no_file_of_the_save_before(tmp_path):
    """transformers reads a single file rather than an index beside it."""
    models.save_pretrained(models.init(small.decoder_config(), seed=0), tmp_path)
    model = models.init(small.decoder_config(), seed=1)
    (tmp_path / "adapter_model.safetensors").write_text("not ours")
    for max_shard_bytes, num_files in ((9000, 4), (5000, 7), (10**9, 1)):
        models.save_pretrained(model, tmp_path, max_shard_bytes=max_shard_bytes)
        files = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
        several = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
        assert files == (several if num_files > 1 else ["model.safetensors"])
        assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
        loaded = models.from_pretrained(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(loaded))
    assert (tmp_path / "adapter_model.safetensors").exists()


def save(folder, file, *names, shape=(2,)):
    tensors = {name: np.zeros(shape, np.float32) for name in names}
    safetensors.numpy.save_file(tensors, folder / file)


def write_index(folder, *files):
    weight_map = {f"x{i}": file for i, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def message_of(folder):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        hf_folder.Folder(folder)
    return str(caught.value)


def test_a_single_file_beside_an_index_of_others(tmp_path):
    save(tmp_path, "model.safetensors", "x0")
    write_index(tmp_path, "model.safetensors")
    assert list(hf_folder.Folder(tmp_path).tensors) == ["x0"]  # the index says the same
    save(tmp_path, "model-00001-of-00001.safetensors", "x0")
    write_index(tmp_path, "model-00001-of-00001.safetensors")
    assert message_of(tmp_path) == (
        f"{tmp_path} has both model.safetensors, which transformers reads, and "
        "model.safetensors.index.json, which names other files; remove the one that is not meant."
    )


def test_a_tensor_in_two_files(tmp_path):
    save(tmp_path, "a.safetensors", "x0", "y")
    save(tmp_path, "b.safetensors", "x1", "y")
    write_index(tmp_path, "a.safetensors", "b.safetensors")
    assert message_of(tmp_path) == (
        f"y is stored twice: as y in {tmp_path}/a.safetensors and as y in "
        f"{tmp_path}/b.safetensors; remove the one that is not meant."
    )


def test_fused_experts_beside_those_of_each_expert(tmp_path):
    prefix = "model.layers.0.mlp.experts"
    save(tmp_path, "a.safetensors", f"{prefix}.0.gate_proj.weight")
    save(tmp_path, "b.safetensors", f"{prefix}.gate_up_proj", shape=(2, 6, 5))
    write_index(tmp_path, "a.safetensors", "b.safetensors")
    assert message_of(tmp_path) == (
        f"{prefix}.0.gate_proj.weight is stored twice: as {prefix}.0.gate_proj.weight in "
        f"{tmp_path}/a.safetensors and as {prefix}.gate_up_proj in {tmp_path}/b.safetensors; "
        "remove the one that is not meant."
    )


def test_fused_experts_with_an_odd_number_of_rows(tmp_path):
    save(tmp_path, "model.safetensors", "model.layers.0.mlp.experts.gate_up_proj", shape=(2, 7, 5))
    assert message_of(tmp_path) == (
        f"{tmp_path}/model.safetensors: model.layers.0.mlp.experts.gate_up_proj must have an even "
        "number of rows, half of them for each of gate_proj and up_proj; it has 7."
    )


def test_a_damaged_file_is_named(tmp_path):
    safetensors.numpy.save_file({"x": np.zeros(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        hf_folder.Folder(tmp_path)

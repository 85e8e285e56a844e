"""Parameters in Orbax checkpoints: pieces in, shardings or single layers out."""

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from codjax import sharding
from codjax.models import orbax_params

BF16 = np.dtype(ml_dtypes.bfloat16)


def written(value, axes):
    return orbax_params.Written(
        shape=value.shape, axes=axes, dtype=value.dtype, read=lambda index: value[index]
    )


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 8, 6), ("layers", "embed", "mlp")),
        ((2, 5, 4, 6), ("layers", "experts", "embed", "mlp")),
        ((50, 4), ("vocab", "embed")),
        ((7,), ("norm",)),
    ],
)
def test_pieces_are_small_disjoint_and_made_of_whole_chunks(shape, axes, monkeypatch):
    monkeypatch.setattr(orbax_params, "_CHUNK_BYTES", 32)
    monkeypatch.setattr(orbax_params, "_PIECE_BYTES", 128)
    value = written(np.zeros(shape, BF16), axes)
    assert np.prod(value.chunks) * 2 <= 32
    assert value.chunks[0] == 1 or axes[0] != "layers"
    times = np.zeros(shape, int)
    for index in value.pieces():
        times[index] += 1
        assert times[index].size * 2 <= 128
        for part, size, chunk in zip(index, shape, value.chunks, strict=True):
            assert part.start % chunk == 0
            assert part.stop % chunk == 0 or part.stop == size
    assert (times == 1).all()


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        "embedding": rng.normal(size=(16, 8)).astype(np.float32),
        "layers.gate": rng.normal(size=(3, 8, 6)).astype(BF16),
    }


@pytest.fixture
def folder(values, tmp_path):
    axes = {"embedding": ("vocab", "embed"), "layers.gate": ("layers", "embed", "mlp")}
    params = {name: written(value, axes[name]) for name, value in values.items()}
    orbax_params.write(tmp_path / "params", params)
    return tmp_path / "params"


def test_orbax_restores_what_is_written_to_a_mesh_in_another_dtype(folder, values):
    mesh = sharding.make_mesh(1, 4, 2)
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("tensor"))
    like = {
        "embedding": jax.ShapeDtypeStruct((16, 8), "float32", sharding=rows),
        "layers": {"gate": jax.ShapeDtypeStruct((3, 8, 6), "float32", sharding=cut)},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder, like)
    assert found["layers"]["gate"].sharding == cut
    np.testing.assert_array_equal(found["embedding"], values["embedding"])
    np.testing.assert_array_equal(found["layers"]["gate"], values["layers.gate"].astype(np.float32))


def test_one_layer_is_one_chunk(folder, values):
    stores = orbax_params.open_stores(folder)
    assert stores["layers.gate"].chunks == (1, 8, 6)
    part = orbax_params.StackReader(stores)
    for layer in (0, 1, 2, 1):
        np.testing.assert_array_equal(part("layers.gate", (layer,)), values["layers.gate"][layer])
    np.testing.assert_array_equal(part("embedding", ()), values["embedding"])


def test_layers_that_are_stored_together_are_read_once(tmp_path, values):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", {"layers": {"gate": values["layers.gate"]}})
    store = orbax_params.open_stores(tmp_path / "params")["layers.gate"]
    reads = []

    class Counted:
        chunks, shape = store.chunks, store.shape

        def read(self, index):
            reads.append(index)
            return store.read(index)

    part = orbax_params.StackReader({"layers.gate": Counted()})
    for layer in range(3):
        np.testing.assert_array_equal(part("layers.gate", (layer,)), values["layers.gate"][layer])
    assert reads == [(slice(0, 3),)]


def test_other_parameters_are_refused_with_their_names(folder):
    with pytest.raises(ValueError, match=r"1 missing, 1 unexpected, 1 of another shape; missing"):
        orbax_params.check(folder, {"embedding": (16, 9), "final_norm": (8,)})


def largest_file(folder):
    return max(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )


def test_a_damaged_chunk_is_named_in_one_line(tmp_path):
    value = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    axes = ("layers", "embed", "mlp")
    orbax_params.write(tmp_path / "params", {"layers.gate": written(value, axes)})
    file = largest_file(tmp_path / "params")
    file.write_bytes(file.read_bytes()[:100])
    stored = orbax_params.open_stores(tmp_path / "params")["layers.gate"]
    with pytest.raises(orbax_params.DamagedError) as caught:
        stored.read()
    text = str(caught.value)
    assert text.startswith(f"layers.gate of {tmp_path / 'params'} cannot be read, so the checkpoi")
    assert "\n" not in text

    (tmp_path / "params" / "manifest.ocdbt").write_bytes(b"torn")
    with pytest.raises(orbax_params.DamagedError, match="params cannot be read, so the checkpoint"):
        orbax_params.open_stores(tmp_path / "params")


def test_an_error_of_the_disk_is_told_as_one(tmp_path, monkeypatch):
    """TensorStore tells errors of the system in the text of a ValueError."""

    def save(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 4 bytes [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    with pytest.raises(OSError, match="No space left on device") as caught:
        orbax_params.write(tmp_path / "params", {})
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "params"))


def test_what_a_parameter_raises_is_raised_and_nothing_is_left(tmp_path, caplog):
    value = np.zeros((40, 512, 512), np.float32)

    def read(index):
        if index[0].start == 3:
            raise KeyError("mine")
        return value[index]

    axes = ("layers", "embed", "mlp")
    bad = orbax_params.Written(shape=value.shape, axes=axes, dtype=value.dtype, read=read)
    good = written(value, axes)
    with pytest.raises(KeyError, match="mine"):
        orbax_params.write(tmp_path / "params", {"a": good, "b": bad, "c": good})
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

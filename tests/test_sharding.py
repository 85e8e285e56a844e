"""Sharded over eight virtual devices = unsharded; sizes that do not divide are errors."""

import dataclasses
import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import forest_attention, topologies
from flax import nnx
from jax.experimental import topologies as jax_topologies
from jax.sharding import PartitionSpec

from codjax import logprobs, models, sharding, types
from tests import small

CONFIG = small.decoder_config(vocab_size=32, remat="full")
EXPERTS = dataclasses.replace(
    CONFIG,
    family="qwen3_moe",
    num_experts=8,
    experts_per_token=3,
    moe_intermediate_size=12,
    norm_topk_prob=True,
)


def abstract(config):
    """The model without values."""
    return nnx.eval_shape(lambda: models.init(config, 0))


def token_batch(num_rows, num_tokens, num_scored):
    rng = np.random.default_rng(0)
    shape, scored = (num_rows, num_tokens), (num_rows, num_scored)
    zeros = np.zeros(scored, np.float32)
    return types.TokenBatch(
        tokens=rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32),
        token_positions=np.broadcast_to(np.arange(num_tokens, dtype=np.int32), shape),
        subtree_end=np.full(shape, num_tokens, np.int32),
        source=rng.integers(0, num_tokens, scored).astype(np.int32),
        target=rng.integers(0, CONFIG.vocab_size, scored).astype(np.int32),
        sampler_logprobs=zeros,
        ref_logprobs=zeros,
        advantages=rng.normal(size=scored).astype(np.float32),
        weights=np.ones(scored, np.float32),
        sample_ids=np.zeros(scored, np.int32),
        normaliser=np.float32(num_rows * num_scored),
        num_scored=np.int32(num_rows * num_scored),
    )


def loss_function(graphdef, mesh):
    layout = sharding.layout(mesh)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        hidden = model(
            batch.tokens,
            batch.token_positions,
            batch.subtree_end,
            constrain=sharding.constrain(mesh),
            attend=functools.partial(forest_attention, layout=layout),
            run_experts=sharding.run_experts(mesh),
        )
        scores, entropy = logprobs.scored_logprobs(
            hidden,
            model.unembedding,
            batch.source,
            batch.target,
            projection=logprobs.Projection(layout=layout, chunk_size=16),
        )
        total = jnp.sum(batch.advantages * scores + 0.1 * entropy) / batch.normaliser
        return total, (hidden, scores)

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2, 1), (8, 1, 1, 1), (1, 4, 2, 1), (1, 4, 1, 2), (1, 2, 2, 2)]
)
def test_sharded_equals_unsharded(shape, monkeypatch):
    check_sharded_equals_unsharded(CONFIG, shape, monkeypatch)


# data, fsdp, tensor, context, expert
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (1, 2, 2, 1, 2), (1, 1, 2, 2, 2)])
def test_sharded_experts_equal_unsharded(shape, monkeypatch):
    check_sharded_equals_unsharded(EXPERTS, shape, monkeypatch)


def test_sharded_biases_equal_unsharded(monkeypatch):
    config = dataclasses.replace(CONFIG, family="llama", attention_bias=True, mlp_bias=True)
    check_sharded_equals_unsharded(config, (1, 2, 2, 2), monkeypatch)


def check_sharded_equals_unsharded(config, shape, monkeypatch):
    """Loss, hidden states, log-probs and every gradient, to 1e-5: sums in another order."""
    monkeypatch.setattr("codjax_kernels.xla.logprobs.SINGLE_CHUNK_LOGITS", 0)
    mesh = sharding.make_mesh(*shape)
    model = models.init(config, seed=0)
    shake = jax.random.normal(jax.random.key(1), (99,))  # biases are fresh zeros
    nnx.update(
        model, jax.tree.map(lambda x: x + jnp.resize(0.1 * shake, x.shape), nnx.state(model))
    )
    graphdef, state = nnx.split(model)
    params, batch = nnx.to_pure_dict(state), token_batch(8, 10, 6)
    alone = jax.jit(loss_function(graphdef, sharding.one_device()))(params, batch)
    shardings = sharding.param_shardings(model, mesh)
    run = jax.jit(
        loss_function(graphdef, mesh),
        out_shardings=(None, shardings),
    )
    split = run(
        jax.device_put(params, shardings), jax.device_put(batch, sharding.batch_shardings(mesh))
    )
    assert jax.tree.structure(alone) == jax.tree.structure(split)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    hidden = split[0][1][0]
    num_cuts = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    assert hidden.sharding.shard_shape(hidden.shape)[0] == 8 // num_cuts


def test_parameters_lie_as_the_rules_say():
    mesh = sharding.make_mesh(2, 2, 2)
    shardings = sharding.param_shardings(abstract(CONFIG), mesh)
    assert shardings["embedding"].spec == PartitionSpec(("tensor",), ("fsdp",))
    assert shardings["layers"]["query"].shard_shape((2, 16, 4, 8)) == (2, 8, 2, 8)
    assert shardings["layers"]["down"].shard_shape((2, 32, 16)) == (2, 16, 8)
    assert shardings["final_norm"].shard_shape((16,)) == (16,)


def test_sharded_init_and_load_equal_plain_ones(tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    model = models.init(CONFIG, 0)
    shardings = sharding.param_shardings(model, mesh)

    def fresh():
        return nnx.to_pure_dict(nnx.state(models.init(CONFIG, 0)))

    made = jax.jit(fresh, out_shardings=shardings)()
    models.save_pretrained(model, tmp_path)
    loaded = models.from_pretrained(tmp_path, place=sharding.place(mesh))
    read = nnx.to_pure_dict(nnx.state(loaded))
    for tree in (made, read):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tree, fresh())
        assert jax.tree.map(lambda x: x.sharding, tree) == shardings


def test_batch_rows_are_cut_and_numbers_are_not():
    shardings = sharding.batch_shardings(sharding.make_mesh(2, 2, 2))
    assert shardings.tokens.shard_shape((8, 10)) == (2, 10)
    assert shardings.advantages.shard_shape((8, 6)) == (2, 6)
    assert shardings.num_scored.shard_shape(()) == ()


def test_mesh_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {
        "data": 2,
        "fsdp": 2,
        "context": 1,
        "tensor": 2,
        "expert": 1,
    }
    assert not doctest.testmod(sharding).failed


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), r"must be the number of devices, 8; got mesh.data = 2, mesh.fsdp = 2, mesh.c"),
        ((-1, 3, 1), r"must divide the number of devices, 8; got mesh.data = -1, mesh.fsdp = 3"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 8, 1), "must be at least 1"),
    ],
)
def test_mesh_that_does_not_fit_names_its_keys(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_axis_that_does_not_divide_names_axis_size_and_key():
    mesh = sharding.make_mesh(1, 2, 4)
    with pytest.raises(
        ValueError, match=r"axis 'kv_heads' of size 2 must divide by mesh.tensor = 4"
    ):
        sharding.param_shardings(abstract(CONFIG), mesh)
    odd = dataclasses.replace(CONFIG, num_kv_heads=4, hidden_size=15)
    with pytest.raises(ValueError, match=r"axis 'embed' of size 15 must divide by mesh.fsdp = 2"):
        sharding.param_shardings(abstract(odd), mesh)
    with pytest.raises(ValueError, match=r"'batch' of size 5 must divide by mesh.data \* mesh.fsd"):
        sharding.check_divisible({"batch": 5}, mesh.shape)


def test_every_logical_axis_has_a_rule():
    for config in (CONFIG, EXPERTS):
        axes = jax.tree.leaves(models.logical_axes(abstract(config)))
        assert set(axes) <= set(sharding.RULES)


def test_experts_are_cut_and_must_divide():
    mesh = sharding.make_mesh(1, 2, 1, expert=4)
    gate = sharding.param_shardings(abstract(EXPERTS), mesh)["layers"]["gate"]
    assert gate.shard_shape((2, 8, 16, 12)) == (2, 2, 8, 12)
    odd = dataclasses.replace(EXPERTS, num_experts=6)
    with pytest.raises(ValueError, match=r"axis 'experts' of size 6 must divide by mesh.expert"):
        sharding.param_shardings(abstract(odd), mesh)


# Several slices.


@pytest.fixture(scope="module")
def two_slices():
    """The devices of two slices of 4x4 chips, as the TPU compiler knows them."""
    pytest.importorskip("libtpu")
    with topologies._environment(topologies._WITHOUT_DEVICES):
        found = jax_topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2)
    return list(found.devices)


def test_only_rows_are_cut_from_slice_to_slice(two_slices):
    mesh = sharding.make_mesh(data=4, fsdp=-1, tensor=2, devices=two_slices)
    assert dict(mesh.shape) | {"data": 4, "fsdp": 4, "tensor": 2} == dict(mesh.shape)
    slice_of = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for index, data in enumerate(slice_of):  # data 0 and 1 in one slice, 2 and 3 in the other
        assert set(data.ravel().tolist()) == {index // 2}


def test_an_axis_that_must_leave_its_slice_is_an_error(two_slices):
    with pytest.raises(ValueError, match=r"mesh\.data must be a multiple of 2, the TPU slices"):
        sharding.make_mesh(data=1, fsdp=32, tensor=1, devices=two_slices)


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5e:16x16", {"fsdp": -1, "tensor": 4}),
        ("v6e:16x16", {"fsdp": -1, "tensor": 4}),
        ("v6e:16x16", {"fsdp": -1, "tensor": 4, "context": 16}),
        ("v5p:4x4x4", {"fsdp": -1, "tensor": 4, "context": 8}),
        ("v5p:4x4x4", {"fsdp": -1, "tensor": 2}),
        ("v6e:4x4", {"fsdp": -1, "tensor": 2}),
    ],
)
def test_an_axis_of_the_mesh_may_be_a_part_of_an_axis_of_links(topology, axes):
    pytest.importorskip("libtpu")
    devices = topologies.devices(topology)
    mesh = sharding.make_mesh(**{"data": 1, "tensor": 1, **axes}, devices=devices)
    assert mesh.size == len(devices) == len(set(mesh.devices.ravel()))
    # Devices next to each other along `tensor`, which talk most, are next to each other in space.
    places = np.array([device.coords for device in mesh.devices.ravel()]).reshape(
        *mesh.devices.shape, 3
    )
    along_tensor = np.abs(np.diff(places, axis=3)).sum(axis=-1)
    assert along_tensor.max() <= 2


def test_products_with_gathered_matrices_are_done_at_once():
    pytest.importorskip("libtpu")
    devices = topologies.devices("v5p:4x4x4")
    mesh = sharding.make_mesh(data=1, fsdp=16, tensor=4, devices=devices)

    def lies(*axes):
        return jax.sharding.NamedSharding(mesh, sharding.spec(axes))

    def compiled(options):
        made = jax.jit(
            lambda x, w: jnp.einsum("btd,df->btf", x, w),
            in_shardings=(lies("batch", "tokens", "width"), lies("embed", "mlp")),
            out_shardings=lies("batch", "tokens", "mlp"),
            compiler_options=options,
        )
        shapes = ((64, 16384, 4096), (4096, 12288))
        traced = made.trace(*(jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in shapes))
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text()

    assert "windowed_dot_general" in compiled(None)
    assert "windowed_dot_general" not in compiled(sharding.compiler_options(mesh))
    assert sharding.compiler_options(sharding.one_device()) is None

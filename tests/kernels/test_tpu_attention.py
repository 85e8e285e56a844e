"""TPU attention kernels in the interpreters: against float64, each other, and duplicated rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import reference
from codjax_kernels.tpu import attention, attention_blocks, attention_tiles
from jax.experimental.pallas import tpu as pltpu

from tests.kernels import forests

# Unlike blocks in every kernel, so that a row has several of each.
UNLIKE = attention_blocks.AttentionBlocks(
    forward=attention_blocks.Blocks(queries=128, keys=256),
    query_gradient=attention_blocks.Blocks(queries=256, keys=128),
    key_value_gradient=attention_blocks.Blocks(queries=128, keys=128),
)
# As many queries as keys: blocks on the diagonal are done in strips.
ALIKE = attention_blocks.AttentionBlocks(*[attention_blocks.Blocks(queries=256, keys=256)] * 3)


def problem(rng, shape, dtype=np.float32, num_queries=None):
    """q, k, v and the outputs' gradient for `shape` = (B, T, N, M, H)."""
    rows, num_tokens, num_heads, num_kv_heads, head_dim = shape
    of_queries = (rows, num_queries or num_tokens, num_heads, head_dim)
    of_keys = (rows, num_tokens, num_kv_heads, head_dim)
    drawn = (rng.normal(size=size) for size in (of_queries, of_keys, of_keys, of_queries))
    return tuple(jnp.asarray(x, dtype) for x in drawn)


def value_and_gradients(attend, q, k, v, out_bar):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(out_bar)


@functools.partial(jax.jit, static_argnames=("interpret", "block_sizes"))
def kernels(*inputs_and_ends, start=0, interpret=True, block_sizes=UNLIKE):
    *inputs, ends = inputs_and_ends

    def attend(q, k, v):
        return attention.forest_attention(
            q, k, v, ends, query_start=start, interpret=interpret, block_sizes=block_sizes
        )

    return value_and_gradients(attend, *inputs)


@jax.jit
def dense(q, k, v, out_bar, ends):
    return value_and_gradients(
        lambda q, k, v: reference.forest_attention(q, k, v, ends), q, k, v, out_bar
    )


def exact(*inputs_and_ends):
    *inputs, ends = inputs_and_ends
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        return [np.asarray(x) for x in dense(*wide, jnp.asarray(ends))]


def relative(value, expected):
    return np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected)


EPSILON = float(np.finfo(np.float32).eps)

# Compiling takes the time: tests share the first shape, and try many forests of each.
SHAPES = [(1, 300, 4, 2, 64), (3, 140, 3, 1, 72), (1, 37, 1, 1, 256)]


@pytest.mark.parametrize("block_sizes", [UNLIKE, ALIKE], ids=["unlike", "alike"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("forest", [forests.random_forest, forests.chains])
def test_equals_dense_mask_in_float64(shape, forest, block_sizes):
    rng = np.random.default_rng(0)
    for _ in range(25):
        inputs, ends = problem(rng, shape), forest(rng, *shape[:2])
        found = kernels(*inputs, ends, block_sizes=block_sizes)
        for value, truth in zip(found, exact(*inputs, ends), strict=True):
            # A few roundings. Automatic differentiation makes half as many: it has the sum of
            # p d p, of which delta is another rounding, and no log-normaliser in one number.
            np.testing.assert_allclose(value, truth, atol=2e-5)
            assert relative(value, truth) < 16 * EPSILON


@pytest.mark.parametrize("block_sizes", [UNLIKE, ALIKE], ids=["unlike", "alike"])
def test_bfloat16(block_sizes):
    shape = SHAPES[0]
    rng = np.random.default_rng(1)
    for _ in range(20):
        inputs, ends = problem(rng, shape, jnp.bfloat16), forests.chains(rng, *shape[:2])
        naive = dense(*inputs, ends)
        expected = exact(*inputs, ends)
        found = kernels(*inputs, ends, block_sizes=block_sizes)
        for value, plain, truth in zip(found, naive, expected, strict=True):
            # Weights, their gradients and results are rounded to 8 bits; all sums are float32.
            assert relative(value, truth) < min(4e-3, 1.5 * relative(plain, truth))


def test_slices_of_queries():
    shape, num_queries = (2, 300, 2, 2, 64), 150
    rng = np.random.default_rng(2)
    for start in (0, 7, 128, 150):
        q, k, v, out_bar = problem(rng, shape, num_queries=num_queries)
        ends = forests.chains(rng, *shape[:2])
        around = ((0, 0), (start, shape[1] - num_queries - start), (0, 0), (0, 0))
        whole = exact(jnp.pad(q, around), k, v, jnp.pad(out_bar, around), ends)
        here = slice(start, start + num_queries)
        expected = whole[0][:, here], whole[1][:, here], *whole[2:]
        found = kernels(q, k, v, out_bar, ends, start=start)
        for value, truth in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, truth, atol=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_forest_equals_duplicated_rows(dtype, bound):
    # 0-129 ─┬─ 130-179 ─┬─ 180-239
    #        │           └─ 240-259
    #        └─ 260-299
    ends = np.full((1, 300), 300, np.int32)
    ends[:, 130:180], ends[:, 180:240], ends[:, 240:260] = 260, 240, 260
    q, k, v, out_bar = problem(np.random.default_rng(4), SHAPES[0], dtype)
    paths = forests.paths(ends[0])
    assert [len(path) for path in paths] == [240, 200, 170]
    index = np.zeros((3, 240), int)
    copies_ends = np.tile(np.arange(240, dtype=np.int32) + 1, (3, 1))  # padding sees itself
    counted = np.zeros((3, 240, 1, 1), bool)
    for row, path in enumerate(paths):
        index[row, : len(path)] = path
        copies_ends[row, : len(path)] = len(path)
        # The gradient of an output flows into one of its copies.
        counted[row, : len(path), 0, 0] = ~np.isin(path, np.concatenate([[-1], *paths[:row]]))
    rows = [x[0, index] for x in (q, k, v, out_bar)]
    rows[3] = jnp.where(counted, rows[3], 0)
    out, *bars = kernels(*rows, copies_ends)
    first = [np.argmax(counted[:, :, 0, 0] & (index == token)) for token in range(300)]
    expected = [out.reshape(-1, *out.shape[2:])[np.array(first)]]
    for bar in bars:
        total = np.zeros((300, *bar.shape[2:]))
        for row, path in enumerate(paths):
            total[path] += np.asarray(bar, np.float64)[row, : len(path)]
        expected.append(total)
    for value, truth in zip(kernels(q, k, v, out_bar, ends), expected, strict=True):
        assert relative(value[0], np.asarray(truth, np.float64)) < bound


def test_what_nobody_sees_moves_nothing():
    inputs = problem(np.random.default_rng(5), SHAPES[0])
    ends = np.full((1, 300), 190, np.int32)
    ends[:, 190:] = 0  # not even itself: these queries see nothing
    found = kernels(*inputs, ends)
    alone = [x.at[:, 190:].set(0) for x in inputs]
    for value, expected in zip(found[1:], kernels(*alone, ends)[1:], strict=True):
        np.testing.assert_array_equal(value[:, :190], expected[:, :190])
        assert not value[:, 190:].any()
    assert np.isfinite(found[0]).all()
    for value in kernels(*inputs, np.zeros_like(ends)):
        assert not value.any()  # no pair of blocks at all


def test_what_stands_elsewhere_does_not_matter():
    q, k, v, out_bar = problem(np.random.default_rng(6), SHAPES[0])
    ends = np.full((1, 300), 300, np.int32)
    ends[:, 20:170] = 170
    seen = np.r_[0:20, 170:300]
    before = kernels(q, k, v, out_bar, ends)[0][:, seen]
    k, v = k.at[:, 20:170].set(1e3), v.at[:, 20:170].set(-1e3)
    np.testing.assert_array_equal(kernels(q, k, v, out_bar, ends)[0][:, seen], before)


@pytest.mark.parametrize("detect_races", [False, True])
def test_tpu_interpreter_agrees(detect_races):
    shape = SHAPES[0]
    rng = np.random.default_rng(7)
    inputs, ends = problem(rng, shape), forests.chains(rng, *shape[:2])
    simulated = pltpu.InterpretParams(detect_races=detect_races)
    found = kernels(*inputs, ends, interpret=simulated)
    for value, expected in zip(found, kernels(*inputs, ends), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_head_sizes_that_it_does_not_take():
    for head_dim in (32, 100, 264):
        q, k, v, _ = problem(np.random.default_rng(0), (1, 8, 1, 1, head_dim))
        with pytest.raises(ValueError, match=rf"64 to 256 in steps of 8; got {head_dim}.*'xla'"):
            attention.forest_attention(q, k, v, np.full((1, 8), 8), interpret=True)


@pytest.mark.parametrize(
    ("group", "blocks"),
    # A tile has at most 2,048 rows, queries times heads; 128 queries with 512 keys would be
    # 131,584 pairs, and the list holds 131,072.
    [(4, (512, 512)), (7, (256, 512)), (16, (128, 1024))],
)
def test_blocks_of_long_rows_by_group(group, blocks):
    made = attention_tiles.layout(
        np.full((1, 131_072), 131_072, np.int32),
        0,
        num_queries=131_072,
        group=group,
        blocks=attention_blocks.Blocks(512, 512),
        key_major=False,
    )
    assert (made.block_q, made.block_k) == blocks

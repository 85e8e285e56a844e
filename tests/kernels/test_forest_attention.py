"""forest_attention against the dense mask in float64: values, gradients, memory, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import forest_attention, reference
from codjax_kernels.xla import attention as xla

from tests.kernels import forests


def problem(num_rows, num_tokens, num_heads, num_kv_heads, head_dim):
    rng = np.random.default_rng(num_tokens)
    shape = (num_rows, num_tokens, num_heads, head_dim)
    kv_shape = (num_rows, num_tokens, num_kv_heads, head_dim)
    q, out_bar = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=kv_shape).astype(np.float32) for _ in range(2))
    return q, k, v, forests.random_forest(rng, num_rows, num_tokens), out_bar


def value_and_grad(function, q, k, v, *rest):
    subtree_end, out_bar = rest

    def weighted(q, k, v):
        out = function(q, k, v, subtree_end)
        return jnp.sum(out.astype(out_bar.dtype) * out_bar), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return tuple(np.asarray(x, np.float64) for x in (out, *gradients))


def oracle(q, k, v, subtree_end, out_bar):
    with jax.enable_x64(True):
        q, k, v, out_bar = (jnp.asarray(x, jnp.float64) for x in (q, k, v, out_bar))
        ends = jnp.asarray(subtree_end)
        return value_and_grad(reference.forest_attention, q, k, v, ends, out_bar)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "SINGLE_BLOCK_TOKENS", 8)
    monkeypatch.setattr(xla, "QUERY_BLOCK", 8)


def test_mask_of_a_small_forest():
    # a tree  0 ─ 1 ─ 2   and a lone token 4; token 3 branches off after 0.
    #           └ 3
    mask = reference.forest_mask(jnp.array([[4, 3, 3, 4, 5]]))
    assert np.asarray(mask[0]).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_lone_tokens_give_their_own_value():
    _, k, v, _, _ = problem(1, 5, 2, 2, 4)
    out = forest_attention(v, k, v, np.arange(1, 6, dtype=np.int32)[None])
    np.testing.assert_allclose(out, v, rtol=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("num_tokens", [1, 13, 24, 37])
def test_equals_dense_mask_in_float64(small_blocks, num_tokens, heads):
    inputs = problem(3, num_tokens, *heads, 8)
    for value, expected in zip(
        value_and_grad(forest_attention, *inputs), oracle(*inputs), strict=True
    ):
        np.testing.assert_allclose(value, expected, atol=1e-5)  # float32, sums of ~100 terms


def test_one_block_equals_many(monkeypatch):
    inputs = problem(2, 37, 4, 2, 8)
    whole = value_and_grad(forest_attention, *inputs)
    monkeypatch.setattr(xla, "SINGLE_BLOCK_TOKENS", 8)
    monkeypatch.setattr(xla, "QUERY_BLOCK", 8)
    for one, other in zip(whole, value_and_grad(forest_attention, *inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_queries_in_blocks_over_the_keys_before_their_end(monkeypatch):
    inputs = problem(2, 37, 4, 2, 8)
    whole = value_and_grad(forest_attention, *inputs)
    monkeypatch.setattr(xla, "CAUSAL_BLOCK", 8)
    for one, other in zip(whole, value_and_grad(forest_attention, *inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("start", [0, 5, 24])
def test_some_of_the_queries(start, small_blocks):
    *inputs, subtree_end, _ = problem(2, 37, 4, 2, 8)
    q, k, v = (jnp.asarray(x) for x in inputs)
    whole = reference.forest_attention(q, k, v, jnp.asarray(subtree_end))
    for query_start in (start, jnp.int32(start)):
        some = xla.forest_attention(
            q[:, start : start + 13], k, v, subtree_end, query_start=query_start
        )
        np.testing.assert_allclose(some, whole[:, start : start + 13], atol=1e-5)


def test_bfloat16(small_blocks):
    q, k, v, subtree_end, out_bar = problem(2, 200, 4, 2, 16)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    got = value_and_grad(forest_attention, *half, subtree_end, out_bar)
    expected = oracle(*(np.asarray(x, np.float32) for x in half), subtree_end, out_bar)
    for value, exact in zip(got, expected, strict=True):
        # Weights and results are rounded to 8 bits; sums, over 25 blocks too, are float32.
        assert np.linalg.norm(value - exact) < 6e-3 * np.linalg.norm(exact)


def test_what_stands_elsewhere_does_not_matter():
    q, k, v, _, _ = problem(1, 9, 2, 1, 4)
    subtree_end = np.array([[5, 3, 3, 5, 5, 9, 9, 9, 9]], np.int32)
    out = forest_attention(q, k, v, subtree_end)
    k[:, [1, 2, 5, 8]], v[:, [1, 2, 5, 8]] = 1e3, -1e3
    changed = forest_attention(q, k, v, subtree_end)
    np.testing.assert_array_equal(out[:, [0, 3, 4]], changed[:, [0, 3, 4]])


def test_scores_of_long_rows_exist_by_blocks_only():
    num_tokens = 4096

    def loss(q, k, v, subtree_end):
        return jnp.sum(forest_attention(q, k, v, subtree_end))

    shapes = [jax.ShapeDtypeStruct((1, num_tokens, 1, 8), jnp.float32)] * 3
    ends = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, ends).compile()
    block_bytes = num_tokens * xla.QUERY_BLOCK * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * block_bytes < num_tokens**2 * 4


def test_bad_calls():
    q, k, v, subtree_end, _ = problem(1, 4, 3, 2, 4)
    with pytest.raises(ValueError, match="M dividing N"):
        forest_attention(q, k, v, subtree_end)
    with pytest.raises(ValueError, match="one of 'xla', 'pallas_tpu', 'pallas_gpu'; got 'cuda'"):
        forest_attention(q, q, q, subtree_end, "cuda")
    with pytest.raises(ValueError, match="Pallas kernels only"):
        forest_attention(q, q, q, subtree_end, "xla", True)

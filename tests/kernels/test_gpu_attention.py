"""The GPU kernels of forest_attention: interpreted, against float64, and compiled for an H100.

The interpreter emulates thread blocks, TMA copies and barriers on the CPU, and raises where two
accesses to memory are not ordered by them. How fast the kernels run on a GPU, and whether it
rounds like the interpreter, these tests cannot say.
"""

import importlib.util
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import pairs, reference
from codjax_kernels.gpu import attention, block_lists

from tests.kernels import forests

HAS_MOSAIC = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
mosaic = pytest.mark.skipif(not HAS_MOSAIC, reason="Mosaic GPU kernels need jax >= 0.12")
HAS_CUDA = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def problem(num_rows, num_tokens, num_heads, num_kv_heads, head_size, *, dtype=jnp.bfloat16):
    rng = np.random.default_rng(num_tokens)
    shapes = [(num_rows, num_tokens, n, head_size) for n in (num_heads, num_kv_heads)]
    q, out_bar = (jnp.asarray(rng.normal(size=shapes[0]), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=shapes[1]), dtype) for _ in range(2))
    return q, k, v, jnp.asarray(forests.random_forest(rng, num_rows, num_tokens)), out_bar


def value_and_gradients(function, *inputs):
    """Output, and gradients of q, k and v, as float64 on the host."""
    q, k, v, subtree_end, out_bar = inputs
    out, pull = jax.vjp(lambda q, k, v: function(q, k, v, subtree_end), q, k, v)
    return [np.asarray(x, np.float64) for x in (out, *pull(out_bar.astype(out.dtype)))]


def kernel(q, k, v, subtree_end, **options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True) if HAS_MOSAIC else True
    return attention.forest_attention(q, k, v, subtree_end, interpret=interpret, **options)


def oracle(q, k, v, subtree_end, out_bar):
    half = [np.asarray(x, np.float64) for x in (q, k, v, out_bar)]
    with jax.enable_x64(True):
        q, k, v, out_bar = (jnp.asarray(x) for x in half)
        return value_and_gradients(naive, q, k, v, subtree_end, out_bar)


naive = jax.jit(reference.forest_attention)


def relative_error(got, exact):
    return np.linalg.norm(got - exact) / np.linalg.norm(exact)


def check_against_float64(inputs):
    got = value_and_gradients(kernel, *inputs)
    by_autodiff = value_and_gradients(naive, *inputs)
    exact = oracle(*inputs)
    # 8 bits of mantissa in weights and results; a mean of values is below 4 here.
    np.testing.assert_allclose(got[0], exact[0], atol=1e-2)
    for ours, plain, expected in zip(got, by_autodiff, exact, strict=True):
        # As exact as automatic differentiation of the whole scores in the same dtype, or better.
        assert relative_error(ours, expected) <= 1.5 * relative_error(plain, expected)


@mosaic
def test_equals_dense_mask_in_float64():
    # Two query heads to a key-value head; 200 tokens fill two blocks, the second in part, and the
    # backward pass goes round the ring of slots.
    check_against_float64(problem(1, 200, 2, 1, 64))


@mosaic
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 256, 4, 2, 64), jnp.bfloat16),
        ((1, 130, 2, 2, 128), jnp.bfloat16),
        ((3, 5, 1, 1, 64), jnp.bfloat16),
        ((1, 520, 3, 1, 64), jnp.float16),
    ],
)
def test_equals_dense_mask_in_float64_at_other_sizes(sizes, dtype):
    check_against_float64(problem(*sizes, dtype=dtype))


@mosaic
def test_what_no_query_of_a_block_sees_is_not_read():
    # Two segments of a block each: nan in one would get through any mask, as 0 x nan.
    q, k, v, _, out_bar = problem(1, 256, 1, 1, 64)
    subtree_end = jnp.repeat(jnp.array([128, 256], jnp.int32), 128)[None]
    first, second = slice(None, 128), slice(128, None)
    broken = [x.at[:, first].set(jnp.nan) for x in (q, k, v)]
    got = value_and_gradients(kernel, *broken, subtree_end, out_bar.at[:, first].set(jnp.nan))
    exact = oracle(q, k, v, subtree_end, out_bar)
    for ours, expected in zip(got, exact, strict=True):
        assert np.isnan(ours[:, first]).all()
        assert relative_error(ours[:, second], expected[:, second]) < 5e-3  # bfloat16


@mosaic
def test_queries_that_see_nothing():
    # Keys 0 … 9 end before themselves; so do, unlike in any forest, queries 20 … 29 see none.
    q, k, v, _, out_bar = problem(1, 32, 1, 1, 64)
    index = np.arange(32)
    subtree_end = jnp.asarray(np.where((index >= 10) & (index < 20), 20, 0), jnp.int32)[None]
    out, q_bar, k_bar, v_bar = value_and_gradients(kernel, q, k, v, subtree_end, out_bar)
    blind = (index < 10) | (index >= 20)
    for result in (out, q_bar, k_bar, v_bar):
        assert not result[:, blind].any()
        assert np.isfinite(result).all()
        assert result[:, ~blind].any()


@mosaic
def test_a_slice_of_the_queries():
    q, k, v, subtree_end, _ = problem(1, 200, 1, 1, 64)
    sliced = jax.jit(lambda start: kernel(q[:, 70:180], k, v, subtree_end, query_start=start))
    whole = reference.forest_attention(*(x.astype(jnp.float32) for x in (q, k, v)), subtree_end)
    np.testing.assert_allclose(
        np.asarray(sliced(jnp.int32(70)), np.float32), whole[:, 70:180], atol=1e-2
    )


@mosaic
@pytest.mark.slow
def test_gradients_of_slices_add_up():
    q, k, v, subtree_end, out_bar = problem(1, 200, 2, 1, 64)
    whole = value_and_gradients(kernel, q, k, v, subtree_end, out_bar)
    q_bars, k_bar, v_bar = [], 0.0, 0.0
    for start, stop in ((0, 90), (90, 200)):
        options = {"query_start": start}
        inputs = (q[:, start:stop], k, v, subtree_end, out_bar[:, start:stop])
        _, q_part, k_part, v_part = value_and_gradients(
            lambda *args, options=options: kernel(*args, **options), *inputs
        )
        q_bars.append(q_part)
        k_bar, v_bar = k_bar + k_part, v_bar + v_part
    for parts, expected in zip(
        (np.concatenate(q_bars, axis=1), k_bar, v_bar), whole[1:], strict=True
    ):
        assert relative_error(parts, expected) < 4e-3  # two results rounded to bfloat16, added


@pytest.mark.parametrize(
    ("query_block", "key_block", "offset", "num_queries"),
    [(128, 128, 0, 300), (128, 64, 37, 200), (64, 128, 256, 44)],
)
def test_lists_hold_each_visible_pair_of_blocks_once(query_block, key_block, offset, num_queries):
    subtree_end = forests.random_forest(np.random.default_rng(0), 2, 300)
    visible = block_lists.visible_blocks(
        jnp.asarray(subtree_end),
        jnp.int32(offset),
        num_queries,
        query_block=query_block,
        key_block=key_block,
    )
    query, key = np.arange(offset, offset + num_queries)[:, None], np.arange(300)
    sees = (key <= query) & (query < subtree_end[:, None, :])
    padding = ((0, 0), (0, -num_queries % query_block), (0, -300 % key_block))
    tiles = np.pad(sees, padding)
    shape = (2, tiles.shape[1] // query_block, query_block, tiles.shape[2] // key_block, key_block)
    tiles = np.moveaxis(tiles.reshape(shape), 2, 3)
    for lists, some, every in (
        (block_lists.block_lists(visible), tiles.any((3, 4)), tiles.all((3, 4))),
        (
            block_lists.block_lists(block_lists.transposed(visible)),
            np.swapaxes(tiles.any((3, 4)), 1, 2),
            np.swapaxes(tiles.all((3, 4)), 1, 2),
        ),
    ):
        for where in np.ndindex(*some.shape[:2]):
            partners = np.asarray(lists.partners[where])
            num_whole, num_partners = int(lists.num_whole[where]), int(lists.num_partners[where])
            assert partners[:num_whole].tolist() == np.flatnonzero(every[where]).tolist()
            partly = some[where] & ~every[where]
            assert partners[num_whole:num_partners].tolist() == np.flatnonzero(partly).tolist()
    assert int(visible.some.sum()) == pairs.minimal_pairs(
        subtree_end, query_block, key_block, num_queries=num_queries, query_start=offset
    )


@pytest.mark.skipif(HAS_MOSAIC, reason="this jax has Mosaic GPU kernels")
def test_older_jax_names_the_alternative():
    with pytest.raises(ValueError, match=r"needs jax >= 0\.12 .* use implementation 'xla'"):
        kernel(*problem(1, 4, 1, 1, 64)[:4])


@mosaic
def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match=r"heads of 64 or 128 numbers; got 80: use .* 'xla'"):
        kernel(*problem(1, 4, 1, 1, 80)[:4])
    with pytest.raises(ValueError, match=r"bfloat16 or float16; got float32, .* 'xla'"):
        kernel(*problem(1, 4, 1, 1, 64, dtype=jnp.float32)[:4])


@mosaic
@pytest.mark.slow
@pytest.mark.skipif(not HAS_CUDA, reason="needs jax[cuda13], not a GPU")
@pytest.mark.parametrize("head_size", [64, 128])
def test_nothing_spills_on_an_h100(head_size):
    # In a process of its own: the CUDA plugin is loaded once, with a driver or without.
    program = textwrap.dedent(f"""
        import jax, jax.numpy as jnp
        from codjax_kernels.gpu import attention, target
        q = jax.ShapeDtypeStruct((1, 32768, 32, {head_size}), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((1, 32768, 8, {head_size}), jnp.bfloat16)
        ends = jax.ShapeDtypeStruct((1, 32768), jnp.int32)
        def gradients(q, k, v, ends, out_bar):
            out, pull = jax.vjp(lambda *qkv: attention.forest_attention(*qkv, ends), q, k, v)
            return out, pull(out_bar)
        for kernel in target.compile_for_h100(gradients, q, k, k, ends, q).kernels:
            print(kernel.name, kernel.spilled_bytes)
    """)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert sorted(run.stdout.split("\n")[:-1]) == [
        "forest_attention_forward 0",
        "forest_attention_key_value_gradients 0",
        "forest_attention_query_gradient 0",
    ], run.stderr

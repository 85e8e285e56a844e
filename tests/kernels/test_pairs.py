"""The list of block pairs against the dense mask: exactly the minimal pairs, in order, flagged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import pairs, reference

from tests.kernels import forests

FIRST, LAST, MASKED = pairs.FIRST, pairs.LAST, pairs.MASKED
RANDOM = [(seed, *np.random.default_rng(seed).integers(1, 20, 2).tolist()) for seed in range(40)]


def unpacked(listed):
    """[(major block, minor block, flags)] of the pairs that count."""
    words = np.asarray(listed.words)[: int(listed.num_pairs)]
    flags = words & (FIRST | LAST | MASKED)
    triples = pairs.major_block(words), pairs.minor_block(words), flags
    return list(zip(*(part.tolist() for part in triples), strict=True))


def random_problem(seed, block_q, block_k):
    """Forests, and the options of a list over a slice of their queries."""
    rng = np.random.default_rng(seed)
    num_rows, num_tokens = int(rng.integers(1, 4)), int(rng.integers(1, 70))
    num_queries = int(rng.integers(1, num_tokens + 1))
    options = {"num_queries": num_queries, "block_q": block_q, "block_k": block_k}
    start = int(rng.integers(0, num_tokens - num_queries + 1))
    return forests.random_forest(rng, num_rows, num_tokens), start, options


def dense_blocks(ends, start, options):
    """The mask cut into blocks, [B query blocks, block_q, key blocks, block_k] per row."""
    mask = np.asarray(reference.forest_mask(jnp.asarray(ends)))
    mask = mask[:, start : start + options["num_queries"]]
    block_q, block_k = options["block_q"], options["block_k"]
    mask = np.pad(mask, ((0, 0), (0, -mask.shape[1] % block_q), (0, -mask.shape[2] % block_k)))
    return mask.reshape(mask.shape[0], -1, block_q, mask.shape[2] // block_k, block_k)


def test_pairs_of_two_segments_written_out():
    # Tokens 0-3 and 4-5, a segment each, and padding from 6 to 7, in blocks of two.
    ends = np.array([[4, 4, 4, 4, 6, 6, 7, 8]])
    listed = pairs.block_pairs(ends, num_queries=8, block_q=2, block_k=2)
    assert unpacked(listed) == [
        (0, 0, FIRST | LAST | MASKED),
        (1, 0, FIRST),
        (1, 1, LAST | MASKED),
        (2, 2, FIRST | LAST | MASKED),
        (3, 3, FIRST | LAST | MASKED),
    ]
    by_key = pairs.block_pairs(ends, num_queries=8, block_q=2, block_k=2, key_major=True)
    assert unpacked(by_key)[:2] == [(0, 0, FIRST | MASKED), (0, 1, LAST)]


@pytest.mark.parametrize(("seed", "block_q", "block_k"), RANDOM)
@pytest.mark.parametrize("key_major", [False, True])
def test_equal_the_minimal_pairs_of_the_mask(seed, block_q, block_k, key_major):
    ends, start, options = random_problem(seed, block_q, block_k)
    listed = pairs.block_pairs(ends, query_start=start, key_major=key_major, **options)
    blocks = dense_blocks(ends, start, options)
    row, a, c = np.nonzero(blocks.any((2, 4)))
    query, key = row * blocks.shape[1] + a, row * blocks.shape[3] + c
    masked = np.where(blocks.all((2, 4))[row, a, c], 0, MASKED)
    major, minor = (key, query) if key_major else (query, key)
    expected = sorted(zip(major.tolist(), minor.tolist(), masked.tolist(), strict=True))
    found = unpacked(listed)
    assert [(one, other, flags & MASKED) for one, other, flags in found] == expected
    assert listed.num_pairs == pairs.minimal_pairs(
        ends, block_q, block_k, num_queries=options["num_queries"], query_start=start
    )
    assert np.flatnonzero(listed.visited).tolist() == sorted(set(major.tolist()))
    majors = [one for one, _, _ in found]
    for index, (one, _, flags) in enumerate(found):
        assert bool(flags & FIRST) == (one not in majors[:index])
        assert bool(flags & LAST) == (one not in majors[index + 1 :])


def test_traced_equals_host():
    for seed, block_q, block_k in RANDOM[:4]:
        ends, start, options = random_problem(seed, block_q, block_k)
        for key_major in (False, True):
            host = pairs.block_pairs(ends, query_start=start, key_major=key_major, **options)
            listing = jax.jit(
                lambda e, s, key_major=key_major, options=options: pairs.block_pairs(
                    e, query_start=s, key_major=key_major, **options
                )
            )
            traced = listing(ends, start)
            assert isinstance(host.num_pairs, int)
            assert unpacked(traced) == unpacked(host)
            assert (np.asarray(traced.words)[host.num_pairs :] == pairs.NO_PAIR).all()
            np.testing.assert_array_equal(traced.visited, host.visited)


def test_keys_that_nobody_sees():
    ends = np.array([[0, 0, 0, 0, 8, 8, 8, 8]])  # no forest: tokens 0-3 do not even see themselves
    listed = pairs.block_pairs(ends, num_queries=8, block_q=4, block_k=4)
    assert unpacked(listed) == [(1, 1, FIRST | LAST | MASKED)]
    assert listed.visited.tolist() == [False, True]
    nothing = pairs.block_pairs(np.zeros((1, 8), int), num_queries=8, block_q=4, block_k=4)
    assert nothing.num_pairs == 0
    assert not nothing.visited.any()


def test_longest_row_fits():
    ends = jax.ShapeDtypeStruct((1, 131_072), jnp.int32)
    listed = jax.eval_shape(
        lambda e: pairs.block_pairs(e, num_queries=131_072, block_q=512, block_k=512), ends
    )
    assert listed.words.shape == (256 * 257 // 2,)


def test_too_many_pairs():
    ends = jax.ShapeDtypeStruct((4, 131_072), jnp.int32)
    with pytest.raises(ValueError, match=r"up to 131584 pairs.*the list holds 131072.*fewer rows"):
        jax.eval_shape(
            lambda e: pairs.block_pairs(e, num_queries=131_072, block_q=512, block_k=512), ends
        )

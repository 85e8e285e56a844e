"""The TPU kernels of token_logprobs, in the interpreter, against float64.

Blocks are small, so that most problems have several of them in both directions.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels.records import KlGradient, LogitGradient, Rows, Statistics, Teacher
from codjax_kernels.tpu import blocks as tuned
from codjax_kernels.tpu import (
    logprobs,
    logprobs_backward,
    logprobs_forward,
    logprobs_kl,
    logprobs_stored,
    tiles,
)
from codjax_kernels.tpu.blocks import Blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

ALONG_TABLE = Blocks(rows=128, vocab=32, piece=16)
ALONG_ROWS = Blocks(rows=256, vocab=32, piece=128)
# The bars of the operation on bfloat16 operands; 3e-6 and 6e-6 are measured here.
LOGPROB_TOLERANCE, ENTROPY_TOLERANCE = 2e-5, 5e-5
# Automatic differentiation of whole logits rounds the result to bfloat16, the kernels also what
# enters the matrix units: two roundings of one size make 1.41 times its error.
TIMES_NAIVE = 1.5
# From float64 sums of terms that are rounded alike: float32 sums tip a rounding now and then. The
# weights of float32 logits, up to 50 here, are exact to 3e-6.
TIPPED = {jnp.bfloat16: 6e-4, jnp.float32: 1e-5}


class Case(NamedTuple):
    """A problem, and what is special about it."""

    num_rows: int
    width: int
    vocab_size: int
    dtype: type = jnp.bfloat16
    has_temperature: bool = True
    num_valid: int | None = None
    scale: float = 3.0  # standard deviation of the logits

    @property
    def counted(self):
        return slice(self.num_rows if self.num_valid is None else self.num_valid)


WHOLE_BLOCKS = Case(256, 32, 128, has_temperature=False)
NOTHING_DIVIDES = Case(300, 24, 187)
PADDED = Case(300, 24, 176, num_valid=140)  # a block with padding, and one of nothing else
CONFIDENT = Case(300, 24, 187, scale=30.0)
TINY = Case(1, 5, 37, dtype=jnp.float32)


class Problem(NamedTuple):
    """Operands of the passes, and cotangents of log-probs and entropies."""

    case: Case
    rows: Rows
    table: jax.Array
    bars: tuple[np.ndarray, np.ndarray]


def problem(case, seed=0, *, has_entropy_gradient=True):
    """Random operands; rows that do not count hold nan."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(case.num_rows, case.width))
    hidden[case.counted.stop :] = np.nan
    table = rng.normal(size=(case.vocab_size, case.width)) * case.scale / np.sqrt(case.width)
    inverse = rng.uniform(0.5, 2.0, case.num_rows) if case.has_temperature else None
    rows = Rows(
        hidden=jnp.asarray(hidden, case.dtype),
        targets=jnp.asarray(rng.integers(0, case.vocab_size, case.num_rows), jnp.int32),
        inverse_temperature=None if inverse is None else jnp.asarray(inverse, jnp.float32),
        num_valid=None if case.num_valid is None else jnp.int32(case.num_valid),
    )
    logprob_bar, entropy_bar = rng.normal(size=(2, case.num_rows))
    bars = (logprob_bar, entropy_bar * has_entropy_gradient)
    return Problem(case, rows, jnp.asarray(table, case.dtype), bars)


class Expected(NamedTuple):
    """What whole logits and automatic differentiation say of the rows that count, as float64."""

    logprobs: np.ndarray
    entropy: np.ndarray
    log_normaliser: np.ndarray
    hidden_bar: np.ndarray
    table_bar: np.ndarray


def whole_logits(wanted, dtype):
    """The operation as one would write it, on operands of a dtype."""
    rows, counted = wanted.rows, wanted.case.counted
    inverse = rows.inverse_temperature
    inverse = np.ones(rows.hidden.shape[0]) if inverse is None else np.asarray(inverse)
    wide = jnp.promote_types(dtype, jnp.float32)

    def results(hidden, table):
        logits = jnp.einsum("kd,vd->kv", hidden, table, preferred_element_type=wide)
        logits = logits * jnp.asarray(inverse[counted], wide)[:, None]
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        logprobs = logits - normaliser[:, None]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        targets = rows.targets[counted][:, None]
        return jnp.take_along_axis(logprobs, targets, axis=-1)[:, 0], entropy, normaliser

    def weighted(hidden, table):
        found = results(hidden, table)
        bars = (jnp.asarray(bar[counted], wide) for bar in wanted.bars)
        return sum(jnp.sum(bar * x) for bar, x in zip(bars, found, strict=False)), found

    with jax.enable_x64(dtype == jnp.float64):
        operands = (jnp.asarray(np.asarray(x), dtype) for x in (rows.hidden[counted], wanted.table))
        bars, found = jax.grad(weighted, (0, 1), has_aux=True)(*operands)
        return Expected(*(np.asarray(x, np.float64) for x in (*found, *bars)))


def logit_gradient(wanted, exact):
    """The derivative by the logits; of padding rows anything but zero."""
    fill = np.full(wanted.case.num_rows, 3.0)
    normaliser, mean, logprob_bar, entropy_bar = fill, fill.copy(), *wanted.bars
    normaliser[wanted.case.counted] = exact.log_normaliser
    mean[wanted.case.counted] = exact.log_normaliser - exact.entropy
    of_all, of_logit = -logprob_bar + entropy_bar * mean, -entropy_bar
    float32 = [jnp.asarray(x, jnp.float32) for x in (normaliser, logprob_bar, of_all, of_logit)]
    return LogitGradient(*float32[:3], float32[3] if np.any(entropy_bar) else None)


def distance(found, expected):
    """Relative L2 error; absolute where nothing is expected."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - expected)
    return difference / max(np.linalg.norm(expected), 1e-30)


@functools.partial(jax.jit, static_argnames="interpret")
def all_passes(rows, table, gradient, *, interpret):
    """Results of every pass over one table, by name."""
    settings = {"interpret": interpret, "blocks": ALONG_TABLE}
    by_rows = {"interpret": interpret, "blocks": ALONG_ROWS}
    mean, others = logprobs_forward.statistics_and_mean(rows, table, **by_rows)
    stored_statistics, stored = logprobs_forward.stored_statistics(rows, table, **settings)
    none = jnp.zeros(table.shape, jnp.float32)
    stored_bar, total = logprobs_stored.stored_gradients(
        rows, table, stored, gradient, none, **settings
    )
    return {
        "statistics": logprobs_forward.statistics(rows, table, **settings),
        "mean": mean,
        "stored": stored_statistics,
        "others": others,
        "hidden_bar": logprobs_backward.hidden_gradient(rows, table, gradient, **by_rows),
        "stored_hidden_bar": stored_bar,
        "table_bar": logprobs_backward.table_gradient(rows, table, gradient, **settings),
        "stored_table_bar": total.astype(table.dtype),
    }


def passes(wanted, gradient, interpret=True):
    """The same, of the rows that count."""
    made = all_passes(wanted.rows, wanted.table, gradient, interpret=interpret)
    of_table = ("table_bar", "stored_table_bar")
    return {
        name: x if name in of_table else jax.tree.map(lambda x: x[wanted.case.counted], x)
        for name, x in made.items()
    }


def terms(wanted, gradient):
    """Hidden states, table, and the terms of the logits' derivatives and their sizes, float64."""
    rows, counted = wanted.rows, wanted.case.counted
    hidden, table = (np.asarray(x, np.float64) for x in (rows.hidden[counted], wanted.table))
    inverse = np.ones((len(hidden), 1))
    if rows.inverse_temperature is not None:
        inverse = np.asarray(rows.inverse_temperature, np.float64)[counted, None]
    normaliser, of_target, of_all, of_logit = (
        np.zeros((len(hidden), 1)) if x is None else np.asarray(x, np.float64)[counted, None]
        for x in gradient
    )
    logits = hidden @ table.T * inverse
    is_target = np.arange(len(table)) == np.asarray(rows.targets)[counted, None]
    probabilities = np.exp(logits - normaliser)
    bar = probabilities * (of_all + of_logit * logits) + is_target * of_target
    size = probabilities * (abs(of_all) + abs(of_logit * logits)) + is_target * abs(of_target)
    return hidden, table, bar * inverse, size * inverse


def rounded_gradients(wanted, gradient):
    """Gradients as float64 products, with every rounding that the matrix units ask for."""
    dtype = wanted.case.dtype
    hidden, table, bar, _ = terms(wanted, gradient)
    bar = np.asarray(jnp.asarray(bar, dtype), np.float64)
    made = {"hidden_bar": bar @ table, "table_bar": bar.T @ hidden}
    return {name: np.asarray(jnp.asarray(x, dtype), np.float64) for name, x in made.items()}


def term_sizes(wanted, gradient):
    """Norms of the gradients if nothing in them cancelled: what their rounding grows with."""
    hidden, table, _, size = terms(wanted, gradient)
    made = {"hidden_bar": size @ abs(table), "table_bar": size.T @ abs(hidden)}
    return {name: np.linalg.norm(x) for name, x in made.items()}


def check_statistics(found, exact):
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    logprobs, entropy = (
        found.target_logit - found.log_normaliser,
        found.log_normaliser - found.mean_logit,
    )
    np.testing.assert_allclose(logprobs, exact.logprobs, atol=LOGPROB_TOLERANCE, rtol=0)
    np.testing.assert_allclose(entropy, exact.entropy, atol=ENTROPY_TOLERANCE, rtol=0)


def check(wanted):
    """Every pass against float64."""
    exact = whole_logits(wanted, jnp.float64)
    gradient = logit_gradient(wanted, exact)
    made, expected = passes(wanted, gradient), rounded_gradients(wanted, gradient)
    sizes = term_sizes(wanted, gradient)
    for name in ("statistics", "mean", "stored"):
        check_statistics(made[name], exact)
    for name, bar in expected.items():
        # Few entries over few ids may cancel to almost nothing; a fifth is what is left of most.
        of_terms = 0.2 * sizes[name] / max(np.linalg.norm(bar), 1e-30)
        limit = TIPPED[wanted.case.dtype] * max(1.0, of_terms)
        assert distance(made[name], bar) <= limit, name
        assert distance(made["stored_" + name], bar) <= limit, name


def check_stored(wanted):
    """The passes that keep logits, alone."""
    rows, table, counted = wanted.rows, wanted.table, wanted.case.counted
    exact = whole_logits(wanted, jnp.float64)
    gradient = logit_gradient(wanted, exact)
    settings = {"interpret": True, "blocks": ALONG_TABLE}
    found, stored = logprobs_forward.stored_statistics(rows, table, **settings)
    check_statistics(Statistics(*(x[counted] for x in found)), exact)
    operands = (rows, table, stored, gradient, jnp.zeros(table.shape, jnp.float32))
    hidden_bar, total = logprobs_stored.stored_gradients(*operands, **settings)
    expected = rounded_gradients(wanted, gradient)
    assert distance(hidden_bar[counted], expected["hidden_bar"]) <= TIPPED[wanted.case.dtype]
    table_bar = total.astype(wanted.case.dtype)
    assert distance(table_bar, expected["table_bar"]) <= TIPPED[wanted.case.dtype]


@pytest.mark.parametrize("case", [NOTHING_DIVIDES, PADDED, CONFIDENT, TINY])
def test_equals_whole_logits_in_float64(case):
    check(problem(case))


def test_equals_whole_logits_in_float64_without_temperature_and_entropy_gradient():
    check(problem(WHOLE_BLOCKS, has_entropy_gradient=False))


@pytest.mark.slow
@settings(max_examples=30, derandomize=True)
@given(data=st.data())
def test_equals_whole_logits_in_float64_at_random_sizes(data):
    num_rows = data.draw(st.integers(1, 400))
    dtype = data.draw(st.sampled_from([jnp.bfloat16, jnp.float32]))
    case = Case(
        num_rows=num_rows,
        width=data.draw(st.integers(1, 140)),
        vocab_size=data.draw(st.integers(2, 300)),
        dtype=dtype,
        has_temperature=data.draw(st.booleans()),
        num_valid=data.draw(st.none() | st.integers(1, num_rows)),
        # The bars are of bfloat16 operands; float32 logits of 100 are not that exact themselves.
        scale=data.draw(st.sampled_from([0.1, 3.0] + [10.0] * (dtype == jnp.bfloat16))),
    )
    for seed in range(4):  # compiling takes the time
        check(problem(case, seed))


def test_a_vocabulary_of_one_moves_nothing():
    wanted = problem(Case(20, 16, 1))
    exact = whole_logits(wanted, jnp.float64)
    made = passes(wanted, logit_gradient(wanted, exact))
    for name in ("statistics", "mean", "stored"):
        check_statistics(made[name], exact)
    for name in ("hidden_bar", "table_bar", "stored_hidden_bar", "stored_table_bar"):
        assert np.abs(np.asarray(made[name], np.float64)).max() < 1e-5, name


@pytest.mark.parametrize("case", [NOTHING_DIVIDES, CONFIDENT])
def test_gradients_are_as_exact_as_two_roundings_allow(case):
    wanted = problem(case)
    exact, naive = whole_logits(wanted, jnp.float64), whole_logits(wanted, case.dtype)
    made = passes(wanted, logit_gradient(wanted, exact))
    for name in ("hidden_bar", "stored_hidden_bar", "table_bar", "stored_table_bar"):
        expected, of_naive = (getattr(x, name.removeprefix("stored_")) for x in (exact, naive))
        assert distance(made[name], expected) <= TIMES_NAIVE * distance(of_naive, expected), name


@pytest.mark.parametrize("case", [NOTHING_DIVIDES, CONFIDENT])
def test_mean_row_gives_the_hidden_gradient(case):
    # d logprob / d h = inverse temperature times ((1 - p_y) W_y - others), where nothing cancels
    wanted = problem(case, has_entropy_gradient=False)
    exact, naive = whole_logits(wanted, jnp.float64), whole_logits(wanted, case.dtype)
    rows, table = wanted.rows, np.asarray(wanted.table, np.float64)
    found, others = logprobs_forward.statistics_and_mean(
        rows, wanted.table, interpret=True, blocks=ALONG_ROWS
    )
    not_target = -np.expm1(np.asarray(found.target_logit - found.log_normaliser))
    bar = not_target[:, None] * table[np.asarray(rows.targets)] - np.asarray(others, np.float64)
    bar *= (wanted.bars[0] * np.asarray(rows.inverse_temperature))[:, None]
    bar = np.asarray(jnp.asarray(bar, case.dtype), np.float64)
    limit = TIMES_NAIVE * distance(naive.hidden_bar, exact.hidden_bar)
    assert distance(bar, exact.hidden_bar) <= limit


def test_padding_alone_gives_zeros():
    wanted = problem(PADDED._replace(num_valid=0))
    ones = jnp.ones(PADDED.num_rows, jnp.float32)
    made = passes(wanted, LogitGradient(ones, ones, ones, ones))
    assert not np.any(np.asarray(made["table_bar"], np.float32))
    assert not np.any(np.asarray(made["stored_table_bar"], np.float32))


def test_stored_gradients_add_to_the_total():
    wanted = problem(WHOLE_BLOCKS)
    rows, table = wanted.rows, wanted.table
    gradient = logit_gradient(wanted, whole_logits(wanted, jnp.float64))
    _, stored = logprobs_forward.stored_statistics(rows, table, interpret=True, blocks=ALONG_TABLE)
    totals = [jnp.zeros(table.shape, jnp.float32)]
    for _ in range(2):
        operands = (rows, table, stored, gradient, totals[-1])
        _, total = logprobs_stored.stored_gradients(*operands, interpret=True, blocks=ALONG_TABLE)
        totals.append(total)
    np.testing.assert_allclose(totals[2], 2 * totals[1], rtol=1e-5, atol=1e-5)


def test_a_target_in_another_shard_has_no_share():
    wanted = problem(NOTHING_DIVIDES)
    elsewhere = wanted._replace(rows=wanted.rows._replace(targets=jnp.full(300, -1, jnp.int32)))
    exact = whole_logits(wanted, jnp.float64)
    gradient = logit_gradient(wanted, exact)
    without = passes(elsewhere, gradient)
    none = gradient._replace(of_target=jnp.zeros_like(gradient.of_target))
    here = passes(wanted, none)
    assert not np.any(without["statistics"].target_logit)
    for name in ("hidden_bar", "stored_hidden_bar", "table_bar", "stored_table_bar"):
        np.testing.assert_array_equal(without[name], here[name], name)
    table, rows = np.asarray(wanted.table, np.float64), elsewhere.rows
    logits = np.asarray(rows.hidden, np.float64) @ table.T
    logits *= np.asarray(rows.inverse_temperature)[:, None]
    mean = np.exp(logits - exact.log_normaliser[:, None]) @ table
    assert distance(without["others"], mean) < 4e-3  # two roundings to bfloat16


@functools.partial(jax.jit, static_argnames="interpret")
def kl_passes(rows, table, teacher, gradient, *, interpret):
    made = logprobs_kl.kl_statistics(rows, table, teacher, interpret=interpret, blocks=ALONG_TABLE)
    return made, logprobs_kl.kl_gradients(
        rows, table, teacher, gradient, interpret=interpret, blocks=ALONG_ROWS
    )


def interpreted(wanted, interpret):
    """Results of every kernel."""
    exact = whole_logits(wanted, jnp.float64)
    teacher = problem(wanted.case._replace(width=16), seed=1)
    teacher = Teacher(teacher.rows.hidden, teacher.table)
    kl_gradient = KlGradient(*[jnp.ones(wanted.case.num_rows, jnp.float32)] * 4)
    statistics, (hidden_bar, table_bar) = kl_passes(
        wanted.rows, wanted.table, teacher, kl_gradient, interpret=interpret
    )
    made = passes(wanted, logit_gradient(wanted, exact), interpret)
    of_rows = jax.tree.map(lambda x: x[wanted.case.counted], (*statistics, hidden_bar))
    return {**made, "kl_of_rows": of_rows, "kl_table_bar": table_bar}


def test_equals_with_copies_and_semaphores_interpreted_and_has_no_races():
    # This interpreter raises, and names the line, where two accesses are in no order. Its copies
    # to memory that a result shares with an operand want whole blocks of the table.
    wanted = problem(PADDED._replace(vocab_size=4 * ALONG_TABLE.vocab))
    watched = pltpu.InterpretParams(detect_races=True)

    def check_equal(found, expected):
        # one unit in the last place: the two are compiled into different loops
        assert distance(found, np.asarray(expected, np.float64)) < 1e-6

    jax.tree.map(check_equal, interpreted(wanted, watched), interpreted(wanted, True))


@pytest.mark.parametrize("vocab_size", [3 * 32, 3 * 32 - 5])
def test_two_cores_share_the_table(vocab_size):
    # 3 blocks for 2 cores: the second has a turn without a block.
    with tuned.target("v5p"):
        check_stored(problem(Case(300, 24, vocab_size)))


def test_rows_that_exceed_the_vector_memory_come_in_groups(monkeypatch):
    two_blocks = 2 * ALONG_TABLE.rows * 24 * 4
    chip = dataclasses.replace(tuned.CHIPS["v5e"], resident_bytes=two_blocks)
    monkeypatch.setitem(tuned.CHIPS, "v5e", chip)
    # the third group is padding alone
    check_stored(problem(Case(600, 24, 50, num_valid=300)))


@pytest.mark.parametrize("case", [NOTHING_DIVIDES, PADDED, TINY])
def test_divergence_from_a_teacher_equals_whole_logits_in_float64(case):
    wanted, other = problem(case), problem(case._replace(width=40), seed=1)
    rows, counted, bar = wanted.rows, case.counted, wanted.bars[0]
    inverse = np.asarray(rows.inverse_temperature, np.float64)[counted, None]

    def divergence(hidden, table, teacher_hidden, teacher_table):
        logits, of_teacher = hidden @ table.T * inverse, teacher_hidden @ teacher_table.T * inverse
        normalisers = [jax.nn.logsumexp(x, axis=-1) for x in (logits, of_teacher)]
        logprobs, teacher_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(of_teacher)
        kl = jnp.sum(jnp.exp(logprobs) * (logprobs - teacher_logprobs), axis=-1)
        return jnp.sum(bar[counted] * kl), (kl, *normalisers)

    with jax.enable_x64(True):
        operands = (rows.hidden[counted], wanted.table, other.rows.hidden[counted], other.table)
        operands = [jnp.asarray(np.asarray(x), jnp.float64) for x in operands]
        bars, exact = jax.grad(divergence, (0, 1), has_aux=True)(*operands)
        bars, exact = jax.tree.map(np.asarray, (bars, exact))

    padded = [np.full(case.num_rows, 3.0, np.float32) for _ in exact]
    for lines, known in zip(padded, exact, strict=True):
        lines[counted] = known
    gradient = KlGradient(jnp.asarray(bar, jnp.float32), *map(jnp.asarray, padded))
    teacher = Teacher(other.rows.hidden, other.table)
    (found, of_other), made = kl_passes(rows, wanted.table, teacher, gradient, interpret=True)
    by_row = (found.mean_logit - found.log_normaliser) - (
        of_other.mean_logit - of_other.log_normaliser
    )
    np.testing.assert_allclose(by_row[counted], exact[0], atol=ENTROPY_TOLERANCE, rtol=0)
    limit = 3e-3 if case.dtype == jnp.bfloat16 else 5e-6  # two roundings; sums of large terms
    assert distance(made[0][counted], bars[0]) < limit
    assert distance(made[1], bars[1]) < limit


def test_tuned_blocks_shrink_to_the_problem():
    made = logprobs.passes(True)
    wanted = problem(TINY)
    exact = whole_logits(wanted, jnp.float64)
    found = made.statistics(wanted.rows, wanted.table)
    np.testing.assert_allclose(found.log_normaliser, exact.log_normaliser, atol=1e-6)
    assert made is logprobs.passes(True)  # programs are compiled once


def test_blocks_of_wide_tables_shrink():
    entry = tuned.CHIPS["v5e"].tuned[-1]
    assert tuned.tuned_for(entry.max_width, (entry,)) is entry
    twice = tuned.tuned_for(2 * entry.max_width, (entry,))
    assert twice.table.vocab == max(entry.table.vocab // 2 // 128, 1) * 128


def test_pieces_of_the_last_block():
    assert tiles.pieces(300, 256) == [tiles.Piece(0, 256, 256), tiles.Piece(256, 48, 44)]


def test_chip_without_blocks_is_an_error():
    wanted = problem(TINY)
    with pytest.raises(ValueError, match=r"no block shapes for device 'cpu'.*implementation 'xla'"):
        logprobs_forward.statistics(wanted.rows, wanted.table)
    with pytest.raises(ValueError, match="no block shapes for 'v9'; there are those for v5e, v5p"):
        tuned.target("v9").__enter__()

"""The logprob kernels for Hopper GPUs, run by Pallas' GPU interpreter on the CPU.

The interpreter executes copies, barriers and both warpgroups; it says nothing of speed. Blocks of
the vocabulary are made small, so that small problems have several spans, slices and groups.
"""

import importlib.util
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import reference, token_logprobs
from codjax_kernels.gpu import logprob_kernels, logprobs, target
from codjax_kernels.records import LogitGradient, Rows

IS_NEW = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= target.MINIMUM_JAX
HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
needs_new_jax = pytest.mark.skipif(not IS_NEW, reason="Mosaic GPU kernels need jax >= 0.12")
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="needs jax[cuda13]; no GPU is needed")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(logprob_kernels, "SPAN_TILES", 2)
    monkeypatch.setattr(logprob_kernels, "SLICE_TILES", 1)
    monkeypatch.setattr(logprob_kernels, "SLICE_UNIT", 256)
    monkeypatch.setattr(logprob_kernels, "ROW_BLOCKS", 2)
    monkeypatch.setattr(logprobs, "MINIMUM_SLICE", 256)
    monkeypatch.setattr(logprobs, "STAGED_LOGITS", 1)


def problem(num_rows, width, vocab_size, *, seed=0):
    """Operands in bfloat16 with logits of some units, targets, temperatures and cotangents."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(num_rows, width)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(vocab_size, width)) * 2 / width**0.5, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, vocab_size, num_rows), jnp.int32)
    temperature = jnp.asarray(rng.uniform(0.5, 1.5, num_rows), jnp.float32)
    return (
        hidden,
        table,
        targets,
        temperature,
        jnp.asarray(rng.normal(size=(2, num_rows)), jnp.float32),
    )


def value_and_grad(function, hidden, table, *rest, **settings):
    """Log-probs, entropies and the gradients of their sums weighted by the cotangents."""
    targets, temperature, bars = rest

    def weighted(hidden, table):
        found, entropy = function(hidden, table, targets, temperature, **settings)
        return jnp.sum(bars[0] * found) + jnp.sum(bars[1] * entropy), (found, entropy)

    (_, values), gradients = jax.value_and_grad(weighted, (0, 1), has_aux=True)(hidden, table)
    return tuple(np.asarray(x, np.float64) for x in (*values, *gradients))


def oracle(hidden, table, targets, temperature, bars):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, table, temperature, bars)]
        return value_and_grad(reference.token_logprobs, *wide[:2], jnp.asarray(targets), *wide[2:])


def naive_logprobs(hidden, table, targets, temperature):
    """Whole logits in float32; autodiff rounds the gradients once, at the end."""
    wide = (hidden.astype(jnp.float32), table.astype(jnp.float32))
    return reference.token_logprobs(*wide, targets, temperature)


def relative(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@needs_new_jax
@pytest.mark.parametrize(
    ("num_rows", "width", "vocab_size"),
    [
        (100, 64, 300),  # fractions of tiles, 2 slices, a vocabulary that 8 does not divide
        pytest.param(5, 64, 37, marks=pytest.mark.slow),  # less than one tile
        pytest.param(128, 64, 512, marks=pytest.mark.slow),  # whole tiles
        pytest.param(300, 128, 600, marks=pytest.mark.slow),  # 3 blocks of rows in 2 groups
        pytest.param(130, 192, 1000, marks=pytest.mark.slow),  # a width of 3 tiles of 64
        pytest.param(64, 512, 300, marks=pytest.mark.slow),  # more steps than slots, tiles of 256
    ],
)
def test_equals_whole_logits_in_float64(num_rows, width, vocab_size):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = problem(num_rows, width, vocab_size)
    expected, naive = oracle(*inputs), value_and_grad(naive_logprobs, *inputs)
    watched = plgpu.InterpretGPUParams(detect_races=True)  # raises where it finds one
    found = value_and_grad(token_logprobs, *inputs, implementation="pallas_gpu", interpret=watched)
    # Products of bfloat16 numbers are exact in float32: values have float32 errors.
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=5e-5)
    assert found[0].max() <= 0.0
    for ours, plain, exact in zip(found[2:], naive[2:], expected[2:], strict=True):
        # The derivative by the logits is rounded once more than in naive autodiff: sqrt(2).
        assert relative(ours, exact) <= 1.5 * relative(plain, exact)


@needs_new_jax
def test_padding_costs_and_changes_nothing():
    hidden, table, *rest = problem(130, 64, 100)
    found = value_and_grad(
        token_logprobs,
        hidden.at[70:].set(jnp.nan),
        table,
        *rest,
        implementation="pallas_gpu",
        interpret=True,
        num_valid=70,
    )
    expected = oracle(hidden[:70], table, *(x[..., :70] for x in rest))
    for ours, exact in zip(found[:3], expected[:3], strict=True):
        # As above; the gradient is of numbers of up to 8, rounded to 8 bits twice.
        np.testing.assert_allclose(ours[:70], exact, atol=5e-5 if ours.ndim == 1 else 0.03)
        np.testing.assert_array_equal(ours[70:], 0.0)
    assert relative(found[3], expected[3]) < 4e-3


@needs_new_jax
def test_no_valid_row_leaves_a_gradient_of_zeros():
    hidden, table, targets, _, _ = problem(3, 64, 20)
    nowhere = LogitGradient(*[jnp.full(3, jnp.nan)] * 3, of_logit=None)
    rows = Rows(hidden, targets, None, jnp.int32(0))
    _, table_bar = logprobs.gradients(rows, table, nowhere, interpret=True)
    np.testing.assert_array_equal(table_bar, np.zeros((20, 64)))


@needs_new_jax
def test_target_in_another_shard():
    hidden, table, _, _, _ = problem(2, 64, 40)
    rows = Rows(hidden, jnp.array([-1, 7]), None, None)
    found = logprobs.statistics(rows, table, interpret=True)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    np.testing.assert_allclose(found.target_logit, [0.0, logits[1, 7]], atol=1e-5)
    np.testing.assert_allclose(
        found.log_normaliser, np.log(np.sum(np.exp(logits), axis=1)), atol=1e-5
    )


@needs_new_jax
@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (64, jnp.float32, "takes bfloat16 operands; got hidden float32"),
        (96, jnp.bfloat16, "a model width that 64 divides; got 96"),
    ],
)
def test_operands_that_the_kernels_do_not_take(width, dtype, message):
    hidden, table = jnp.ones((2, width), dtype), jnp.ones((8, width), dtype)
    with pytest.raises(ValueError, match=f"{message}.*use implementation 'xla'"):
        token_logprobs(hidden, table, jnp.zeros(2, jnp.int32), 1.0, "pallas_gpu", interpret=True)


@pytest.mark.skipif(IS_NEW, reason="this jax is new enough")
def test_old_jax_is_an_error_that_names_the_alternative():
    hidden, table = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((8, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"needs jax >= 0\.12 .*use implementation 'xla'"):
        token_logprobs(hidden, table, jnp.zeros(2, jnp.int32), 1.0, "pallas_gpu")


@needs_new_jax
@pytest.mark.skipif(HAS_PLUGIN, reason="the plugin is installed")
def test_compiling_without_the_plugin_says_what_to_install():
    with pytest.raises(RuntimeError, match=r"pip install 'jax\[cuda13\]"):
        target.compile_for_h100(jnp.sin, jax.ShapeDtypeStruct((4,), jnp.float32))


def operands(num_rows, width, vocab_size):
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    rows = Rows(
        shape(num_rows, width, dtype=jnp.bfloat16),
        shape(num_rows, dtype=jnp.int32),
        shape(num_rows),
        shape(dtype=jnp.int32),
    )
    return rows, shape(vocab_size, width, dtype=jnp.bfloat16), LogitGradient(*[shape(num_rows)] * 4)


@needs_new_jax
@needs_plugin
@pytest.mark.parametrize(
    ("num_rows", "width", "vocab_size"),
    [
        (1000, 896, 2000),
        pytest.param(16_384, 4096, 151_936, marks=pytest.mark.slow),  # Qwen3-8B
    ],
)
def test_compiles_for_an_h100_without_spills(monkeypatch, num_rows, width, vocab_size):
    monkeypatch.undo()  # blocks as they are
    rows, table, gradient = operands(num_rows, width, vocab_size)
    forward = target.compile_for_h100(logprobs.statistics, rows, table)
    backward = target.compile_for_h100(logprobs.gradients, rows, table, gradient)
    found = {kernel.name: kernel for kernel in (*forward.kernels, *backward.kernels)}
    assert set(found) == {"statistics", "derivatives", "times_table", "times_hidden"}
    assert [kernel.spilled_bytes for kernel in found.values()] == [0, 0, 0, 0]
    # Nothing of K x V is kept: the derivatives of one slice, and what adds up [K D] in float32.
    staged = 2 * max(logprobs.STAGED_LOGITS, num_rows * logprobs.MINIMUM_SLICE)
    assert backward.temp_bytes < staged + 14 * (num_rows + 128) * width + 2 * table.size


def check_gpu_kernels():
    """Exit status of the script."""
    path = pathlib.Path(__file__).parents[2] / "scripts" / "check_gpu_kernels.py"
    return runpy.run_path(str(path))["main"]([])


@needs_new_jax
def test_check_without_a_gpu_says_what_needs_none(capsys):
    assert check_gpu_kernels() == 2
    assert "no Hopper GPU here" in (message := capsys.readouterr().err)
    assert "--compile-only" in message


@pytest.mark.skipif(IS_NEW, reason="for jax < 0.12")
def test_check_with_an_old_jax_says_so(capsys):
    assert check_gpu_kernels() == 2
    assert "needs jax >= 0.12 (Python >= 3.12); this is jax" in capsys.readouterr().err

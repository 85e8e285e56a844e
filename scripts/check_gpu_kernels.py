"""Check the GPU kernels: registers and spills, results against float64, speed against XLA.

check_gpu_kernels.py [--compile-only] [--output=FILE.json] [--rounds=N]. Registers and spills need
no GPU; the rest needs one of the Hopper generation. Exits with 1 if a kernel spills or is not as
exact as it should be, with 2 if nothing could be checked.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from codjax_kernels import forest_attention, reference, token_logprobs
from codjax_kernels.gpu import target

# K, D, V and B, T, N, M, H: Qwen3-8B and a small model, then sizes that no block divides.
LOGPROB_SIZES = ((16_384, 4096, 151_936), (8192, 1024, 151_936), (1000, 896, 50_257))
ATTENTION_SIZES = ((1, 32_768, 32, 8, 128), (4, 8192, 16, 8, 64), (2, 1000, 4, 2, 128))
EXACT_LOGPROB_SIZES = ((1000, 256, 3000), (130, 1024, 777))
EXACT_ATTENTION_SIZES = ((2, 512, 4, 2, 64), (1, 700, 4, 2, 128))
# Absolute errors of values; gradients are compared with what naive autodiff would give.
LIMITS = {"logprob": 2e-5, "entropy": 5e-5, "attention": 1e-2}
GRADIENT_FACTOR = 1.5


def logprob_problem(num_rows, width, vocab_size):
    """Operands of token_logprobs, with logits of some units, and cotangents of both results."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (num_rows, width), jnp.bfloat16)
    table = jax.random.normal(keys[1], (vocab_size, width), jnp.bfloat16) * (2 / width**0.5)
    targets = jax.random.randint(keys[2], (num_rows,), 0, vocab_size)
    temperature = jax.random.uniform(keys[3], (num_rows,), minval=0.5, maxval=1.5)
    bars = jax.random.normal(keys[4], (2, num_rows))
    return (hidden, table.astype(jnp.bfloat16)), (targets, temperature), tuple(bars)


def attention_problem(num_rows, num_tokens, num_heads, num_kv_heads, head_size):
    """Operands of forest_attention: a prefix of a quarter of the row, then six branches."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(num_rows, num_tokens, n, head_size) for n in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys[:3], shapes, strict=True)
    )
    index = np.arange(num_tokens)
    prefix, branch = num_tokens // 4, -(-(num_tokens - num_tokens // 4) // 6)
    ends = np.where(index < prefix, num_tokens, prefix + ((index - prefix) // branch + 1) * branch)
    subtree_end = jnp.asarray(np.tile(np.minimum(ends, num_tokens), (num_rows, 1)), jnp.int32)
    bar = jax.random.normal(keys[3], shapes[0], jnp.bfloat16)
    return (q, k, v), (subtree_end,), (bar,)


def values_and_gradients(function, operands, rest, bars):
    """Results, a tuple, and gradients of the operands."""

    def results(*operands):
        out = function(*operands, *rest)
        return out if isinstance(out, tuple) else (out,)

    values, pull = jax.vjp(results, *operands)
    cast = tuple(bar.astype(value.dtype) for bar, value in zip(bars, values, strict=True))
    return values, pull(cast)


def naive_logprobs(hidden, table, targets, temperature):
    """Whole logits in float32, which is harder to match than logits in bfloat16."""
    wide = (hidden.astype(jnp.float32), table.astype(jnp.float32))
    return reference.token_logprobs(*wide, targets, temperature)


# The operation, the one for float64, the naive one whose gradients are compared, its operands.
OPERATIONS = {
    "token_logprobs": (
        token_logprobs,
        reference.token_logprobs,
        naive_logprobs,
        logprob_problem,
    ),
    "forest_attention": (
        forest_attention,
        reference.forest_attention,
        reference.forest_attention,
        attention_problem,
    ),
}


def exact(function, problem):
    """The same on the CPU in float64."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(np.asarray, problem)
        wide = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float64), wide)
        return values_and_gradients(function, *jax.tree.map(jnp.asarray, wide))


def resources(sizes):
    """Registers and spills of every kernel of both operations, by the compiler for the H100."""
    rows = []
    for name, (function, _, _, make) in OPERATIONS.items():
        for size in sizes[name]:
            shapes = jax.eval_shape(functools.partial(make, *size))
            run = functools.partial(function, implementation="pallas_gpu")
            compiled = target.compile_for_h100(
                functools.partial(values_and_gradients, run), *shapes
            )
            for kernel in compiled.kernels:
                row = {"operation": name, "size": "x".join(map(str, size))} | kernel._asdict()
                rows.append(row | {"temp_MiB": round(compiled.temp_bytes / 2**20, 1)})
    return rows


def exactness(sizes, interpret=False):
    """Errors of values, and those of gradients beside naive autodiff's on the same operands."""
    rows = []
    for name, (function, plain, naive, make) in OPERATIONS.items():
        for size in sizes[name]:
            problem = make(*size)
            run = functools.partial(function, implementation="pallas_gpu", interpret=interpret)
            found, expected = values_and_gradients(run, *problem), exact(plain, problem)
            by_autodiff = values_and_gradients(naive, *problem)[1]
            labels = ("logprob", "entropy") if name == "token_logprobs" else ("attention",)
            row = {"operation": name, "size": "x".join(map(str, size))}
            for label, ours, right in zip(labels, found[0], expected[0], strict=True):
                error = float(np.abs(np.asarray(ours, np.float64) - np.asarray(right)).max())
                rows.append(row | {"of": label, "error": error, "limit": LIMITS[label]})
            operands = ("hidden", "unembedding") if name == "token_logprobs" else ("q", "k", "v")
            for label, gradient, other, right in zip(
                operands, found[1], by_autodiff, expected[1], strict=True
            ):
                errors = {
                    "error": relative(gradient, right),
                    "limit": GRADIENT_FACTOR * relative(other, right),
                }
                rows.append(row | {"of": f"gradient of {label}"} | errors)
    return rows


def relative(found, right):
    """Relative error in the L2 norm."""
    found, right = np.asarray(found, np.float64), np.asarray(right)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def speed(sizes, rounds):
    """Median milliseconds of the kernels and of XLA, measured in turn, and their ratio."""
    rows = []
    for name, (function, _, _, make) in OPERATIONS.items():
        for size in sizes[name]:
            operands, rest, bars = make(*size)
            for what in ("forward", "forward and backward"):
                programs = {}
                for implementation in ("pallas_gpu", "xla"):
                    run = functools.partial(function, implementation=implementation)
                    whole = functools.partial(values_and_gradients, run)
                    if what == "forward":
                        program = jax.jit(run).lower(*operands, *rest).compile()
                        programs[implementation] = functools.partial(program, *operands, *rest)
                    else:
                        program = jax.jit(whole).lower(operands, rest, bars).compile()
                        programs[implementation] = functools.partial(program, operands, rest, bars)
                took = medians(programs, rounds)
                row = {"operation": name, "size": "x".join(map(str, size)), "what": what}
                row |= {f"{key}_ms": round(value, 3) for key, value in took.items()}
                rows.append(row | {"xla/pallas_gpu": round(took["xla"] / took["pallas_gpu"], 3)})
    return rows


def medians(programs, rounds):
    """Median milliseconds of each program, run in turn after one run that does not count."""
    taken = {name: [] for name in programs}
    for counts in [False] + [True] * rounds:
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if counts:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def show(title, rows):
    columns = list(rows[0])
    cells = [[text(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def text(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def has_hopper():
    """Whether the default device can run the kernels."""
    if jax.default_backend() != "gpu":
        return False
    return str(jax.devices()[0].compute_capability).startswith("9.")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile-only", action="store_true", help="no GPU: registers, spills")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for all numbers")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of every program")
    options = parser.parse_args(arguments)
    try:
        target.require_jax()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.compile_only and not has_hopper():
        print(
            f"no Hopper GPU here ({jax.devices()[0].device_kind}): results and speed need one. "
            "Registers and spills do not: scripts/check_gpu_kernels.sh --compile-only",
            file=sys.stderr,
        )
        return 2
    sizes = {"token_logprobs": LOGPROB_SIZES, "forest_attention": ATTENTION_SIZES}
    try:
        report = {"resources": resources(sizes)}  # first: a kernel that has run reports nothing
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    show("what the compiler for the H100 gives the kernels", report["resources"])
    is_right = not any(row["spilled_bytes"] for row in report["resources"])
    if not options.compile_only:
        small = {"token_logprobs": EXACT_LOGPROB_SIZES, "forest_attention": EXACT_ATTENTION_SIZES}
        report["exactness"] = exactness(small)
        show(
            "errors against float64; limits of gradients are naive autodiff's", report["exactness"]
        )
        is_right &= all(row["error"] <= row["limit"] for row in report["exactness"])
        report["speed"] = speed(sizes, options.rounds)
        show("median milliseconds", report["speed"])
    report |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "none" if options.compile_only else jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2))
    print("\nas it should be" if is_right else "\nnot as it should be: see the tables")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

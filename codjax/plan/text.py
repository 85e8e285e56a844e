"""A plan as `codjax plan` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codjax.plan import advice as advices

_GIB = 2**30


def describe(plan: Mapping[str, Any]) -> str:
    """Everything but the advice, in about thirty lines."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    batch, model = plan["batch"], plan["model"]
    lines = [
        f"{plan['topology']}: {plan['num_devices']} devices, {mesh or 'no axis cut'}",
        f"{model['num_parameters'] / 1e6:,.1f} M parameters in {model['num_layers']} layers; a "
        f"micro-batch has {batch['rows']} rows of {batch['row_length']:,} tokens, "
        f"{batch['scored_per_row']:,} of them scored",
        "",
        *_memory(plan),
        "",
    ]
    for name, program in plan["programs"].items():
        if program["memory"] is not None:
            lines += [*_program(name, program), ""]
    if plan["throughput"] is not None:
        lines += [*_throughput(plan), ""]
    lines += [_verdict(plan), _sampler(plan)]
    return "\n".join(lines)


def advise(found: Mapping[str, Any]) -> str:
    """What to change, or that nothing of the list is enough."""
    if found["overrides"] is None:
        return (
            f"None of {len(found['tried'])} changes makes it fit: take a larger topology, or a "
            "smaller model."
        )
    return (
        f"It fits, with {found['total_bytes'] / _GIB:.2f} GiB a device, under\n"
        f"    {advices.as_typed(found['overrides'])}"
    )


def _memory(plan: Mapping[str, Any]) -> list[str]:
    state = plan["state_bytes"]
    parts = ", ".join(f"{name} {value / _GIB:.2f}" for name, value in state.items() if value)
    rows = ["GiB a device    arguments   outputs  temporaries    peak   beside    total"]
    for name, program in plan["programs"].items():
        memory = program["memory"]
        if memory is None:
            rows.append(f"{name:<14}  refused: {program['refused']}")
            continue
        values = [memory[key] for key in ("arguments", "outputs", "temporaries", "peak")]
        values += [program["beside_bytes"], program["total_bytes"]]
        widths = (10, 9, 12, 7, 8, 8)
        cells = (f"{v / _GIB:{w}.2f}" for v, w in zip(values, widths, strict=True))
        rows.append(f"{name:<14}" + " ".join(cells))
    return [*rows, f"state: {parts}"]


def _program(name: str, program: Mapping[str, Any]) -> list[str]:
    floor = program["floor"]
    lines = [
        f"{name}: compiled in {program['compile_s']:.0f} s, {program['num_kernels']} kernels; at "
        f"least {_time(floor['floor_s'])}, bound by {floor['bound']}",
        f"  {program['hardware_flops'] / 1e12:.3f} Tflop {_time(floor['compute_s'])}; "
        f"{program['memory_bytes'] / 1e9:.2f} GB of memory traffic {_time(floor['memory_s'])}; "
        f"links {_time(floor['links_s'])}",
    ]
    for row in program["collectives"]:
        if row["received_bytes"] >= 1e6:
            axes = "+".join(row["axes"])
            gigabytes = row["received_bytes"] / 1e9
            lines.append(f"  {row['kind']:<19}{axes:<16}{row['count']:>6} x {gigabytes:>9.3f} GB")
    return lines


def _throughput(plan: Mapping[str, Any]) -> list[str]:
    bounds = plan["throughput"]
    return [
        f"an update of n micro-batches takes at least n x {_time(bounds['microbatch_s'])} + "
        f"{_time(bounds['apply_s'])}; at most {bounds['tokens_per_s']:,.0f} tokens/s, "
        f"{bounds['scored_tokens_per_s']:,.0f} scored tokens/s, MFU {bounds['mfu']:.0%}",
    ]


def _sampler(plan: Mapping[str, Any]) -> str:
    found, usable = plan["sampler"], plan["chip"]["usable_bytes"] / _GIB
    parts = (
        f"weights {found['weights_bytes'] / _GIB:.2f} and cache "
        f"{found['cache_bytes'] / _GIB:.2f} GiB"
    )
    if found["fits"]:
        return f"Sampling in process fits beside it: {parts} more."
    return (
        f"Sampling in process does not fit beside it: {parts} more on a device of each of "
        f"{found['num_processes']} processes, of {usable:.2f} GiB; this is the learner alone."
    )


def _verdict(plan: Mapping[str, Any]) -> str:
    usable = plan["chip"]["usable_bytes"] / _GIB
    totals = [program["total_bytes"] for program in plan["programs"].values()]
    says = "It fits" if plan["fits"] else "It does not fit"
    if None in totals:
        return f"{says}: the compiler refuses it ({usable:.2f} GiB a device can be used)."
    return f"{says}: {max(totals) / _GIB:.2f} of {usable:.2f} GiB a device that can be used."


def _time(seconds: float) -> str:
    """
    >>> _time(0.01234)
    '12.3 ms'
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"

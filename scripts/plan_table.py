"""The plans of docs/plans.md: makes those that are missing, in turn, and prints a table.

    python scripts/plan_table.py                 # docs/plans/NAME.json for every NAME of PLANS
    python scripts/plan_table.py --only=8b_v5e   # this one, again

Each takes minutes and a few GiB; where a file is there already, it is only read.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "plans"


def _long(*, context, rows):
    """Overrides for rows of 128k tokens, cut along `context`."""
    return (
        "--config.batching.row_length=131072",
        "--config.batching.scored_per_row=32768",
        f"--config.mesh.context={context}",
        f"--config.batching.rows_per_microbatch={rows}",
    )


PLANS = {  # name: config, topology, overrides
    "8b_v5e": ("frozen_lake_qwen3_8b", "v5e:16x16", ()),
    "8b_v5p": ("frozen_lake_qwen3_8b", "v5p:4x4x4", ()),
    "8b_v6e": ("frozen_lake_qwen3_8b", "v6e:16x16", ()),
    "8b_no_red_is_v5e": ("frozen_lake_qwen3_8b_no_red_is", "v5e:16x16", ()),
    "32b_v5p": ("frozen_lake_qwen3_32b", "v5p:4x4x4", ()),
    "30b_a3b_v5p": ("frozen_lake_qwen3_30b_a3b", "v5p:4x4x4", ()),
    "8b_v5e_128k": ("frozen_lake_qwen3_8b", "v5e:16x16", _long(context=16, rows=4)),
    "8b_v5p_128k": ("frozen_lake_qwen3_8b", "v5p:4x4x4", _long(context=8, rows=2)),
    "8b_v6e_128k": ("frozen_lake_qwen3_8b", "v6e:16x16", _long(context=16, rows=4)),
    "32b_v5p_128k": ("frozen_lake_qwen3_32b", "v5p:4x4x4", _long(context=4, rows=4)),
    "30b_a3b_v5p_128k": ("frozen_lake_qwen3_30b_a3b", "v5p:4x4x4", _long(context=8, rows=8)),
    "8b_v5e_4_layers": ("frozen_lake_qwen3_8b", "v5e:16x16", ("--config.model.num_layers=4",)),
    "8b_v5e_2x4": ("frozen_lake_qwen3_8b", "v5e:2x4", ("--config.batching.rows_per_microbatch=2",)),
}
GIB = 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PLANS, help="make this plan again")
    only = parser.parse_args().only
    FOLDER.mkdir(exist_ok=True)
    for name in [only] if only else PLANS:
        if only or not (FOLDER / f"{name}.json").exists():
            make(name)
    sys.stdout.write(table())


def make(name):
    """Runs `codjax plan`; a config that does not fit is an answer too."""
    config, topology, overrides = PLANS[name]
    command = [sys.executable, "-m", "codjax", "plan", f"--config={ROOT}/configs/{config}.py"]
    command += [*overrides, f"--topology={topology}", f"--output={FOLDER}/{name}.json"]
    status = subprocess.run(command, check=False, cwd=ROOT).returncode
    if status not in (0, 1):  # fits, does not fit
        sys.exit(f"{' '.join(command)} made no plan.")


def table():
    """The plans that are there, in Markdown."""
    rows = [
        "| plan | devices, mesh | rows x tokens | GiB a device: state + step = total of usable | "
        "fits | + sampling in process, fits | Tflop a device | links GB | "
        "floor of a micro-batch, bound by | MFU at most | tokens/s at most | compiled in |",
        "|---|---|---|---|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for name in PLANS:
        path = FOLDER / f"{name}.json"
        if path.exists():
            rows.append(row(name, json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join([*rows, ""])


def row(name, plan):
    """One line of the table."""
    step, bounds, batch = plan["programs"]["accumulate"], plan["throughput"], plan["batch"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    state = sum(plan["state_bytes"].values()) / GIB
    cells = [
        name,
        f"{plan['topology']}: {mesh}",
        f"{batch['rows']} x {batch['row_length']:,}",
    ]
    usable = plan["chip"]["usable_bytes"] / GIB
    if bounds is None:
        found = plan["advice"]["overrides"]
        refused = f"refused; {found or 'no change that was tried'} makes it fit"
        return "| " + " | ".join([*cells, refused, "no", *[""] * 7]) + " |"
    totals = [program["total_bytes"] / GIB for program in plan["programs"].values()]
    sampler = plan["sampler"]
    total = max(totals)
    links = sum(one["received_bytes"] for one in step["collectives"]) / 1e9
    seconds = sum(program["compile_s"] for program in plan["programs"].values())
    cells += [
        f"{state:.2f} + {total - state:.2f} = {total:.2f} of {usable:.2f}",
        "yes" if plan["fits"] else "no",
        f"{(sampler['weights_bytes'] + sampler['cache_bytes']) / GIB:.0f}, "
        + ("yes" if sampler["fits"] else "no"),
        f"{step['hardware_flops'] / 1e12:,.0f}",
        f"{links:,.1f}",
        f"{step['floor']['floor_s']:.2f} s, {step['floor']['bound']}",
        f"{bounds['mfu']:.0%}",
        f"{bounds['tokens_per_s']:,.0f}",
        f"{seconds:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()

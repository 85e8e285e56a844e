"""The runs of scripts/laptop_study.sh as one Markdown table: study_table.py FOLDER.

Means over seeds of the mean reward by position; the last column is the gap, last minus first
position, seed by seed.
"""

import json
import pathlib
import sys

import numpy as np

# Line of the table: prefix of the workdir, which part of eval.json, entry of the matrix.
LINES = (
    ("after the warm-up, before RL", "cod", "base", "lake"),
    ("**after CoD training**", "cod", "trained", "lake"),
    ("… its hints blanked", "cod", "trained", "hint_blanked"),
    ("… its hints swapped with another pack's", "cod", "trained", "hint_swapped"),
    ("control: trained with blanked hints", "trained_blank", "trained", "lake"),
    ("control: γ = 0, task-by-task RL", "gamma0", "trained", "lake"),
)


def rewards(report, part, entry):
    source = report["base"] if part == "base" else report
    return [position["reward"] for position in source["tasksets"][entry]["positions"]]


def main(folder):
    reports = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/eval.json")
    }
    rows = []
    for label, prefix, part, entry in LINES:
        names = sorted(name for name in reports if name.startswith(f"{prefix}_seed"))
        if names:
            rows.append((label, np.array([rewards(reports[n], part, entry) for n in names])))
    num_positions = rows[0][1].shape[1]
    header = [f"pos {k}" for k in range(num_positions)]
    lines = [
        "| mean reward | " + " | ".join(header) + " | gap by seed |",
        "|---" * (num_positions + 2) + "|",
    ]
    for label, values in rows:
        means = " | ".join(f"{value:.3f}" for value in values.mean(axis=0))
        gaps = ", ".join(f"{gap:+.3f}" for gap in values[:, -1] - values[:, 0])
        lines.append(f"| {label} | {means} | {gaps} |")
    ladder = next(iter(reports[sorted(reports)[0]]["ladder"].values()))
    for player, values in ladder.items():
        exact = " | ".join(f"{value:.3f}" for value in values)
        gap = f"{values[-1] - values[0]:+.3f}"
        lines.append(f"| exact: {player.replace('_', ' ')} | {exact} | {gap} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not list(pathlib.Path(sys.argv[1]).glob("cod_seed*/eval.json")):
        sys.exit(
            "usage: study_table.py FOLDER, the folder of scripts/laptop_study.sh with its runs"
        )
    main(pathlib.Path(sys.argv[1]))

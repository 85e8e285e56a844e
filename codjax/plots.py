"""Pictures of a run: reward by position after it, and over its steps.

Drawn with Matplotlib's own figure objects, so that no display, backend or global state is needed.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart, with a marker for
each; positions over time, which are ordered, take an ordered scale.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, colormaps, figure, lines

from codjax import metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LADDER_STYLES: tuple[Any, ...] = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
SIZE_INCHES, DOTS_PER_INCH = (8.0, 4.6), 150


def plot_reward_by_position(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    ladder: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
) -> None:
    """Mean reward at each position of the pack, with 95 % intervals over packs.

    Args:
        results: label -> the `positions` of an entry of eval.json; the order is kept.
        ladder: label -> exact values per position, such as the ceiling of a perfect memory; drawn
            as plain grey lines. May be empty.
        path: of the PNG.
    """
    fig, ax = _figure()
    # Side by side by a little, so that intervals at one position do not hide each other.
    offsets = (np.arange(len(results)) - (len(results) - 1) / 2) * 0.04
    for index, (label, positions) in enumerate(results.items()):
        ax.errorbar(
            np.arange(len(positions)) + offsets[index],
            [position["reward"] for position in positions],
            yerr=[position["reward_ci95"] for position in positions],
            label=label,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
            linewidth=2,
            markersize=6,
        )
    for index, (label, values) in enumerate(ladder.items()):
        style = LADDER_STYLES[index % len(LADDER_STYLES)]
        ax.plot(
            values,
            linestyle=style,
            label=f"exact: {label.replace('_', ' ')}",
            color="0.45",
            linewidth=1.5,
            zorder=1,
        )
    longest = max(map(len, [*results.values(), *ladder.values()]), default=1)
    ax.set_xticks(range(longest))
    ax.set_xlabel("position in the pack")
    ax.set_ylabel("mean reward, 95 % intervals")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    _finish(fig, ax, path)


def plot_training(metrics_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Training reward at each position over the steps: a smooth line over the raw numbers.

    Args:
        metrics_path: a metrics.jsonl.
        path: of the PNG.
    """
    rows = metrics.read_metrics(metrics_path)
    keys = {key for row in rows for key in row}
    matches = [re.fullmatch(r"reward/position_(\d+)", key) for key in keys]
    positions = sorted(int(match[1]) for match in matches if match)
    fig, ax = _figure()
    for place, position in enumerate(positions):
        key = f"reward/position_{position}"
        points = [(row["step"], row[key]) for row in rows if key in row]
        steps, values = np.array(points).T
        colour = colormaps["viridis"](0.85 * place / max(len(positions) - 1, 1))
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        smooth = _smooth(values, width=max(len(values) // 25, 1))
        ax.plot(steps, smooth, color=colour, linewidth=2, label=f"position {position}")
    ax.set_xlabel("step")
    ax.set_ylabel("mean reward in training")
    _finish(fig, ax, path)


def _smooth(values: np.ndarray, *, width: int) -> np.ndarray:
    """Centred moving mean over `2 * width + 1` values, fewer at the ends.

    >>> _smooth(np.array([0.0, 3.0, 0.0]), width=1).tolist()
    [1.5, 1.0, 1.5]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _figure() -> tuple[figure.Figure, axes.Axes]:
    fig = figure.Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    return fig, ax


def _finish(fig: figure.Figure, ax: axes.Axes, path: str | os.PathLike[str]) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # What was measured before what it is held against, which Matplotlib lists the other way.
        is_line = [isinstance(handle, lines.Line2D) for handle in handles]
        order = sorted(range(len(handles)), key=lambda index: is_line[index])
        ax.legend(
            [handles[index] for index in order],
            [labels[index] for index in order],
            frameon=False,
            loc="center left",  # beside the axes: rising curves leave no corner free
            bbox_to_anchor=(1.0, 0.5),
        )
    fig.savefig(path)

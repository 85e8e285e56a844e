"""How far a run is, for the person who watches it.

On a terminal, one line that stays in place: a bar, the step, a few words, seconds per step, and
the time that is left. Anywhere else (a log file, CI) a sentence every few steps, through
`logging`, so that the log stays readable.

    with Progress("train", total=400, start=state.step) as progress:
        for step in …:
            progress.update(step, reward_text(metrics), step_s=seconds)
"""

from __future__ import annotations

import collections
import datetime
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import rich.console
import rich.progress

logger = logging.getLogger(__name__)


class Progress:
    """Owns the line on the terminal while a stage runs; use it as a context manager.

    Log messages of other modules go above the line when their handler is rich's, and may break it
    once otherwise; nothing is lost. `update` may be called between enter and exit only.

    Args:
        label: name of the stage, one word.
        total: number of steps of the whole stage.
        start: steps done before, by the run that is resumed.
        console: where to draw; None for stderr.
        every: without a terminal, log every so many steps …
        interval_s: … or after so many seconds, whichever comes first.
        clock: seconds, rising.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int,
        start: int = 0,
        console: rich.console.Console | None = None,
        every: int = 10,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._every = every
        self._interval_s = interval_s
        self._clock = clock
        self._logged_at = clock()
        self._logged_step = start
        self._step_times: collections.deque[float] = collections.deque(maxlen=20)
        console = console or rich.console.Console(stderr=True)
        self._bar: rich.progress.Progress | None = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, text="")

    def update(self, step: int, text: str = "", *, step_s: float | None = None) -> None:
        """Says that `step` steps are done.

        Args:
            step: number of steps done, from 1.
            text: a few words about the last one, such as `reward_text` gives.
            step_s: how long it took; the time left is guessed from the last twenty.
        """
        if step_s is not None:
            self._step_times.append(step_s)
        parts = [text] if text else []
        if self._step_times:
            mean_s = sum(self._step_times) / len(self._step_times)
            left = datetime.timedelta(seconds=round(mean_s * max(self._total - step, 0)))
            parts.append(f"{mean_s:.2f} s/step, {left} left")
        summary = ", ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=summary)
            return
        now = self._clock()
        is_due = (
            step - self._logged_step >= self._every
            or now - self._logged_at >= self._interval_s
            or step >= self._total
        )
        if is_due:
            logger.info("%s: step %d of %d, %s", self._label, step, self._total, summary)
            self._logged_at, self._logged_step = now, step

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def reward_text(metrics: Mapping[str, float]) -> str:
    """Reward at the first and the last position, the number that a run is about.

    >>> reward_text({"reward/position_0": 0.21, "reward/position_3": 0.8, "reward/mean": 0.5})
    'reward 0.210 → 0.800'
    """
    matches = [re.fullmatch(r"reward/position_(\d+)", key) for key in metrics]
    positions = sorted(int(match[1]) for match in matches if match)
    if not positions:
        return "no reward"
    first, last = (metrics[f"reward/position_{k}"] for k in (positions[0], positions[-1]))
    return f"reward {first:.3f} → {last:.3f}"

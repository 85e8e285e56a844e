"""Complete rollout steps that wait to be trained on: which one is next, and which are too old.

    replay = Replay(rules)
    dropped = replay.put(Item(step=7, version=5, uses=0, payload=groups))
    item, too_old = replay.draw(update=9)

An item is a whole rollout step, and an update trains on one item: its scores were made from its
own groups, so that nothing of it is mixed with another's (spec/algorithm.md §11). The published
trainer cuts items into batches of a fixed number of samples; here an update takes as many
micro-batches as its item needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codjax import seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How items are kept and served.

    Attributes:
        capacity: most items that wait; one more evicts that of the lowest priority.
        max_staleness: most updates between the weights that sampled a token and those that it
            is trained into.
        max_uses: updates that may train on one item.
        decay: what each use takes off the priority.
        noise: standard deviation of what is added to the priority, drawn once per insertion.
        seed: of that noise.
        in_order: serve the steps in their order, whatever their priority.
    """

    capacity: int
    max_staleness: int
    max_uses: int = 1
    decay: float = 2.0
    noise: float = 2.0
    seed: int = 0
    in_order: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A rollout step.

    Attributes:
        step: its number, from 0; no two items that wait have the same.
        version: of its newest sample, which is that of the oldest weights behind a token of it.
            Older samples of the item are left out one by one where it is trained on.
        uses: updates that trained on it.
        payload: the trajectories.
    """

    step: int
    version: int
    uses: int = 0
    payload: Any = dataclasses.field(repr=False)


class Replay:
    """The items that wait. Owns no thread; what is in it belongs in a checkpoint (`items`)."""

    def __init__(self, rules: Rules, items: Sequence[Item] = ()) -> None:
        self._rules = rules
        self._items = {item.step: item for item in items}

    @property
    def items(self) -> tuple[Item, ...]:
        """What waits, by step."""
        return tuple(self._items[step] for step in sorted(self._items))

    def put(self, item: Item) -> Item | None:
        """Add an item.

        Returns:
            The one that had no room: that of the lowest priority, which may be the new one.
        """
        assert item.step not in self._items
        self._items[item.step] = item
        if len(self._items) <= self._rules.capacity:
            return None
        lowest = min(self._items.values(), key=self._rank)
        return self._items.pop(lowest.step)

    def draw(
        self, update: int, among: Mapping[int, int] | None = None
    ) -> tuple[Item | None, list[Item]]:
        """Take out the item that is served next, and all that are too old for good.

        Args:
            update: the update it is for, from 1: as many as will have been made with it.
            among: steps that may be taken → version to judge them by; None: all, each by its own.

        Returns:
            The item, None if there is none; and those that were too old.
        """
        among = {item.step: item.version for item in self.items} if among is None else among
        judged = [dataclasses.replace(self._items[step], version=among[step]) for step in among]
        oldest = oldest_version(update, max_staleness=self._rules.max_staleness)
        too_old = [item for item in judged if item.version < oldest]
        fresh = [item for item in judged if item.version >= oldest]
        served = max(fresh, key=self._rank, default=None)
        for item in [*too_old, *([] if served is None else [served])]:
            del self._items[item.step]
        return served, too_old

    def put_back(self, item: Item) -> Item | None:
        """An item that was trained on waits again, unless it has been used up.

        Returns:
            As `put`; None too for an item that is used up.
        """
        used = dataclasses.replace(item, uses=item.uses + 1)
        return self.put(used) if used.uses < self._rules.max_uses else None

    def priority(self, item: Item) -> float:
        """Higher is served first: newer weights, fewer uses, and noise that shuffles the near."""
        draw = np.random.default_rng(
            seeds.derive_seed(self._rules.seed, "replay", item.step, item.uses)
        ).standard_normal()
        return item.version - self._rules.decay * item.uses + self._rules.noise * float(draw)

    def _rank(self, item: Item) -> float:
        return -item.step if self._rules.in_order else self.priority(item)


def oldest_version(update: int, *, max_staleness: int) -> int:
    """The oldest weights whose samples an update may train on.

    Args:
        update: from 1.
        max_staleness: K.

    >>> [oldest_version(update, max_staleness=20) for update in (21, 22, 100)]
    [0, 1, 79]
    """
    return max(update - max_staleness - 1, 0)

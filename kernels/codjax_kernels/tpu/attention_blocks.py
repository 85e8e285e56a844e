"""Blocks of the attention kernels, per chip generation; the one table to edit after tuning.

Simulated cycles decide (`codjax bench kernels`; jax 0.12.0.1, libtpu 0.0.52). Of a row of 2,048
tokens, 8 heads of 128 on 2 key-value heads, bfloat16, over those that the matrix units need at full
width: a plain causal row, 10 pairs of blocks, and one of four packed segments, 4 pairs.

==============  ===========  ===========  ===========
kernel          v5e          v5p          v6e
==============  ===========  ===========  ===========
forward         1.19   1.17  1.21   1.20  3.35   3.44
query gradient  1.08   0.88  1.10   0.91  2.52   2.10
keys, values    0.96   0.75  0.97   0.76  2.27   2.08
==============  ===========  ===========  ===========

Below 1, because tiles on the diagonal leave out up to 3/8 of the products that are counted here;
strips of 256 tokens instead of 128 take 2 to 15 % more on v5e. The matrix units of v6e and tpu7x
are 256 wide and heads of 128 fill half of them, so that 2 is the least there without strips.

Before diagonal tiles were done in strips, forward blocks of 1,024 keys took 15 % less a token pair
on v6e (1 % on v5e) and visited a third more of them for segments of 1,024 tokens, and blocks of 256
queries took 10 % more on v5e.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from codjax_kernels.tpu.blocks import CHIPS, LANES, Chip

# Rows of a tile, queries times their heads, at most (as far as blocks of 128 queries allow): with
# large groups of heads the buffers and running sums of more would fill the memory of a core.
MAX_TILE_ROWS = 2048
# Keys of a block, at most, where the list of pairs would be too long for the scalar memory.
MAX_KEYS = 2048


class Blocks(NamedTuple):
    """How one kernel cuts its work; multiples of 128."""

    queries: int  # tokens in a block, at most; a tile has a row for each of their heads
    keys: int  # tokens in a block


class AttentionBlocks(NamedTuple):
    """Blocks of the three kernels."""

    forward: Blocks
    query_gradient: Blocks
    key_value_gradient: Blocks


_ALIKE = AttentionBlocks(Blocks(512, 512), Blocks(512, 512), Blocks(512, 512))
TABLE: dict[str, AttentionBlocks] = {
    "v5e": _ALIKE,
    "v5p": _ALIKE,
    "v6e": _ALIKE,
    "tpu7x": _ALIKE,
}


def of_chip(chip: Chip) -> AttentionBlocks:
    """The entry of a chip generation."""
    return TABLE[next(name for name, entry in CHIPS.items() if entry is chip)]


def fitted(block: int, num_tokens: int) -> int:
    """Block size that cuts `num_tokens` into as many blocks as `block` does, with least padding.

    >>> fitted(512, 640), fitted(512, 37)
    (384, 128)
    """
    num_blocks = math.ceil(num_tokens / max(block, LANES))
    return math.ceil(num_tokens / num_blocks / LANES) * LANES

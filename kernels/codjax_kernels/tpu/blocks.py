"""Block shapes of the log-prob kernels, tuned for each chip generation.

A kernel cuts its problem into blocks of `rows` hidden states by `vocab` rows of the table and
works through a block in pieces of `piece`, so that the matrix units make the logits of one piece
while the vector units are busy with those of the piece before. What bounds them:

* a block of the table is read once for every block of rows (or the other way round), which the
  memory keeps up with from about 512 rows on v5e and v5p, 1,024 on v6e and TPU7x;
* `rows`, `vocab` and the width decide what lies in the vector memory: two buffers of every operand,
  the float32 sums, and two pieces of logits.

The chip that counts is the one that `target` names, else that of the mesh at hand, else that of the
first device. Entries are those with the fewest cycles that the TPU compiler simulates, as
``codjax bench kernels --tune --topology=v5e`` searches them; only `kl` is a guess after `hidden`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

LANES = 128
CHUNK = 16  # rows of the table done at once: those of one register of bfloat16 numbers


class Blocks(NamedTuple):
    """How one kernel cuts its problem; all multiples of 128."""

    rows: int  # hidden states
    vocab: int  # rows of the table
    piece: int  # rows or table rows of a block that are done at a time


class Tuned(NamedTuple):
    """Blocks of every kernel for tables up to some width."""

    max_width: int
    statistics: Blocks  # cut into pieces along the vocabulary, as `table`
    mean: Blocks  # along the rows, as `hidden`
    hidden: Blocks
    table: Blocks
    stored_statistics: Blocks
    stored_gradients: Blocks
    kl: Blocks  # all three kernels with two tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What the kernels must know of a TPU generation.

    Attributes:
        device_kinds: as JAX names its devices.
        num_cores: cores that one kernel can use; they share its parallel grid dimensions.
        vmem_bytes: vector memory that a kernel may take.
        resident_bytes: of them, for hidden gradients that stay over the whole table.
        tuned: entries of rising width.
    """

    device_kinds: tuple[str, ...]
    num_cores: int
    vmem_bytes: int
    resident_bytes: int
    tuned: tuple[Tuned, ...]


_MIB = 2**20

CHIPS = {
    "v5e": Chip(
        device_kinds=("TPU v5 lite", "TPU v5e"),
        num_cores=1,
        vmem_bytes=96 * _MIB,
        resident_bytes=16 * _MIB,
        tuned=(
            Tuned(
                max_width=1536,
                statistics=Blocks(1024, 1024, 256),
                mean=Blocks(1024, 512, 512),
                hidden=Blocks(1024, 1024, 256),
                table=Blocks(2048, 512, 256),
                stored_statistics=Blocks(1024, 1024, 256),
                stored_gradients=Blocks(1024, 512, 256),
                kl=Blocks(512, 512, 256),
            ),
            Tuned(
                max_width=4096,
                statistics=Blocks(512, 512, 256),
                mean=Blocks(512, 512, 256),
                hidden=Blocks(512, 512, 256),
                table=Blocks(1024, 512, 256),
                stored_statistics=Blocks(512, 512, 256),
                stored_gradients=Blocks(512, 256, 256),
                kl=Blocks(512, 512, 256),
            ),
        ),
    ),
    "v5p": Chip(
        device_kinds=("TPU v5", "TPU v5p"),
        num_cores=2,
        vmem_bytes=48 * _MIB,
        resident_bytes=8 * _MIB,
        tuned=(
            Tuned(
                max_width=1536,
                statistics=Blocks(1024, 1024, 256),
                mean=Blocks(512, 1024, 256),
                hidden=Blocks(512, 1024, 256),
                table=Blocks(2048, 512, 256),
                stored_statistics=Blocks(1024, 512, 256),
                stored_gradients=Blocks(512, 512, 256),
                kl=Blocks(512, 512, 256),
            ),
            Tuned(
                max_width=4096,
                statistics=Blocks(512, 512, 256),
                mean=Blocks(512, 256, 256),
                hidden=Blocks(512, 256, 256),
                table=Blocks(512, 256, 256),
                stored_statistics=Blocks(512, 512, 256),
                stored_gradients=Blocks(256, 256, 256),
                kl=Blocks(512, 256, 256),
            ),
        ),
    ),
    "v6e": Chip(
        device_kinds=("TPU v6 lite", "TPU v6e"),
        num_cores=1,
        vmem_bytes=96 * _MIB,
        resident_bytes=16 * _MIB,
        tuned=(
            Tuned(
                max_width=1536,
                statistics=Blocks(2048, 1024, 256),
                mean=Blocks(1024, 512, 512),
                hidden=Blocks(1024, 1024, 256),
                table=Blocks(2048, 1024, 256),
                stored_statistics=Blocks(1024, 1024, 256),
                stored_gradients=Blocks(1024, 512, 256),
                kl=Blocks(512, 512, 256),
            ),
            Tuned(
                max_width=4096,
                statistics=Blocks(1024, 1024, 256),
                mean=Blocks(512, 512, 512),
                hidden=Blocks(512, 512, 256),
                table=Blocks(1024, 512, 256),
                stored_statistics=Blocks(1024, 512, 256),
                stored_gradients=Blocks(1024, 256, 256),
                kl=Blocks(512, 512, 256),
            ),
        ),
    ),
    "tpu7x": Chip(
        device_kinds=("TPU7x",),
        num_cores=1,
        vmem_bytes=48 * _MIB,
        resident_bytes=8 * _MIB,
        tuned=(
            Tuned(
                max_width=1536,
                statistics=Blocks(2048, 1024, 256),
                mean=Blocks(1024, 512, 512),
                hidden=Blocks(1024, 512, 256),
                table=Blocks(2048, 512, 256),
                stored_statistics=Blocks(2048, 512, 256),
                stored_gradients=Blocks(512, 512, 256),
                kl=Blocks(512, 512, 256),
            ),
            Tuned(
                max_width=4096,
                statistics=Blocks(1024, 256, 256),
                mean=Blocks(512, 256, 256),
                hidden=Blocks(512, 256, 256),
                table=Blocks(512, 256, 256),
                stored_statistics=Blocks(512, 512, 256),
                stored_gradients=Blocks(256, 256, 256),
                kl=Blocks(512, 256, 256),
            ),
        ),
    ),
}
INTERPRETED = "v5e"  # whose entries the interpreter uses, where there is no TPU

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Compile kernels for a chip generation, whatever devices there are.

    Args:
        name: one of `CHIPS`.

    Raises:
        ValueError: there is no such entry.
    """
    if name not in CHIPS:
        raise ValueError(f"no block shapes for {name!r}; there are those for {', '.join(CHIPS)}.")
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def chip(*, is_interpreted: bool = False) -> Chip:
    """The chip that kernels are compiled for: `target`, else that of the devices.

    Raises:
        ValueError: they are no TPUs that have an entry, and kernels are not interpreted.
    """
    name = _target.get()
    if name is not None:
        return CHIPS[name]
    kind = _device_kind()
    for entry in CHIPS.values():
        if kind in entry.device_kinds:
            return entry
    if is_interpreted:
        return CHIPS[INTERPRETED]
    raise ValueError(
        f"the TPU kernels have no block shapes for device {kind!r}, only for {', '.join(CHIPS)}; "
        "use implementation 'xla', interpret the kernels, or name what you compile for "
        "in codjax_kernels.tpu.blocks.target."
    )


def _device_kind() -> str:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0].device_kind if device is None else device.device_kind


def tuned_for(width: int, entries: tuple[Tuned, ...]) -> Tuned:
    """The entry for tables of a width; wider than all, its blocks shrink in proportion."""
    for entry in entries:
        if width <= entry.max_width:
            return entry
    shrink = math.ceil(width / entries[-1].max_width)
    return Tuned(width, *(_divided(blocks, shrink) for blocks in entries[-1][1:]))


def fitted(blocks: Blocks, num_rows: int, vocab_size: int) -> Blocks:
    """`blocks` no larger than the problem.

    >>> fitted(Blocks(512, 1024, 256), num_rows=200, vocab_size=37)
    Blocks(rows=256, vocab=48, piece=256)
    """
    return Blocks(
        rows=min(blocks.rows, _multiple(num_rows, LANES)),
        vocab=min(blocks.vocab, _multiple(vocab_size, CHUNK)),
        piece=blocks.piece,
    )


def _divided(blocks: Blocks, by: int) -> Blocks:
    return Blocks(*(max(size // by // LANES, 1) * LANES for size in blocks))


def _multiple(number: int, of: int) -> int:
    return math.ceil(number / of) * of

"""Token sequences → prefix forests → rows → `TokenBatch`, and back.

All sequences placed in one row are merged into tries: a token that several of them share as a
prefix is stored, and computed, once. Nodes stand in depth-first order, so that the descendants of
a node follow it without a gap and attention is an interval (codjax.types.TokenBatch).

The order comes for free: sequences sorted lexicographically are the leaves of their trie in
depth-first order, and what a sequence adds to the row is what follows its longest common prefix
with the sequence before it. Nothing here builds a tree of objects.

    batch, report = batch_sequences(sequences, row_length=512)

Shifting by one (the hidden state of a token predicts the next) happens here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
from jaxtyping import Float, Int

from codjax import types
from codjax.types import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What became of the sequences of one batch.

    Attributes:
        num_sequences: sequences with something to train on.
        num_unscored: sequences left out because none of their tokens is scored.
        plain_tokens: tokens of the sequences, one by one.
        stored_tokens: tokens after prefixes were merged; what the learner computes.
        scored_tokens: scored entries.
        num_rows: rows that hold anything.
        row_length: tokens a row can hold.
    """

    num_sequences: int
    num_unscored: int
    plain_tokens: int
    stored_tokens: int
    scored_tokens: int
    num_rows: int
    row_length: int

    def metrics(self) -> dict[str, int | float]:
        """The report under its metric names; see docs/metrics.md."""
        return {
            "batching/num_sequences": self.num_sequences,
            "batching/unscored_sequences": self.num_unscored,
            "batching/stored_tokens": self.stored_tokens,
            "batching/trained_tokens": self.scored_tokens,
            "batching/num_rows": self.num_rows,
            "batching/dedup_ratio": self.stored_tokens / max(self.plain_tokens, 1),
            "batching/fill_frac": self.stored_tokens / max(self.num_rows * self.row_length, 1),
        }


def build_batch(
    sequences: Iterable[Sequence],
    row_length: int,
    num_rows: int | None = None,
    *,
    scored_per_row: int | None = None,
    sample_weights: Float[np.ndarray, " E"] | None = None,
    normaliser: float | None = None,
    share_prefixes: bool = True,
) -> types.TokenBatch:
    """The train batch of these sequences; `batch_sequences` without its report."""
    batch, _ = batch_sequences(
        sequences,
        row_length=row_length,
        num_rows=num_rows,
        scored_per_row=scored_per_row,
        sample_weights=sample_weights,
        normaliser=normaliser,
        share_prefixes=share_prefixes,
    )
    return batch


def batch_sequences(
    sequences: Iterable[Sequence],
    *,
    row_length: int,
    num_rows: int | None = None,
    rows_multiple: int = 1,
    scored_per_row: int | None = None,
    sample_weights: Float[np.ndarray, " E"] | None = None,
    normaliser: float | None = None,
    share_prefixes: bool = True,
) -> tuple[types.TokenBatch, BatchReport]:
    """Rows of token forests that together hold every sequence, and what became of them.

    Each sequence goes, in lexicographic order, to the row where it adds the fewest tokens.

    Args:
        sequences: the samples of one train batch, each of at most `row_length` tokens.
        row_length: T, tokens in a row.
        num_rows: B; None for as many as are needed.
        rows_multiple: B is padded with empty rows to a multiple of it.
        scored_per_row: K, scored entries in a row; None for the largest number that a row holds
            when only `row_length` limits it.
        sample_weights: weight in the loss of each entry of a sequence; None for 1.
        normaliser: what the loss is divided by; None for the number of scored entries.
        share_prefixes: False stores every sequence whole, as a tree without branches.

    Returns:
        A batch of NumPy arrays `[B T]`, `[B K]`, and its report.

    Raises:
        ValueError: a sequence fits into no row, or the rows are too few.

    >>> s = Sequence([5, 6, 7], [False, True, True], np.ones(3), np.zeros(3))
    >>> build_batch([s], row_length=4).target.tolist()
    [[6, 7]]
    """
    sequences = [
        _checked(index, sequence, row_length, scored_per_row)
        for index, sequence in enumerate(sequences)
    ]
    if sample_weights is None:
        sample_weights = np.ones(len(sequences), np.float32)
    kept = [i for i, sequence in enumerate(sequences) if sequence.is_scored.any()]
    rows = _place(sequences, kept, row_length, scored_per_row, share_prefixes)
    wanted = len(rows) if num_rows is None else num_rows
    if len(rows) > wanted:
        raise ValueError(
            f"num_rows must be at least {len(rows)} to hold {len(kept)} sequences in rows of "
            f"{row_length} tokens; got {wanted}. Raise num_rows or row_length."
        )
    wanted = max(-(-wanted // rows_multiple) * rows_multiple, rows_multiple)
    width = scored_per_row or max((row.num_scored for row in rows), default=1)
    num_scored = sum(row.num_scored for row in rows)
    batch = _empty_batch(wanted, row_length, width)
    for b, row in enumerate(rows):
        _write_row(batch, b, row, sequences, sample_weights)
    report = BatchReport(
        num_sequences=len(kept),
        num_unscored=len(sequences) - len(kept),
        plain_tokens=sum(len(sequences[i].tokens) for i in kept),
        stored_tokens=sum(row.num_tokens for row in rows),
        scored_tokens=num_scored,
        num_rows=len(rows),
        row_length=row_length,
    )
    normaliser = float(max(num_scored, 1)) if normaliser is None else normaliser
    return batch._replace(
        normaliser=np.float32(normaliser), num_scored=np.int32(num_scored)
    ), report


def sequences_of(batch: types.TokenBatch) -> list[Sequence]:
    """The samples of a batch, row by row, each up to its last scored token."""
    found = []
    for b in range(batch.tokens.shape[0]):
        weights, sample_ids = np.asarray(batch.weights[b]), np.asarray(batch.sample_ids[b])
        for sample in np.unique(sample_ids[weights != 0]):
            entries = np.flatnonzero((sample_ids == sample) & (weights != 0))
            found.append(_read_sample(batch, b, entries))
    return found


@dataclasses.dataclass(kw_only=True)
class _Row:
    """A row while it is filled: its sequences in order, with what each shares with the last."""

    members: list[int] = dataclasses.field(default_factory=list)
    shared: list[int] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_scored: int = 0
    common: int = 0  # prefix shared by the last member and the sequence now being placed


def _checked(
    index: int, sequence: Sequence, row_length: int, scored_per_row: int | None
) -> Sequence:
    """The sequence as NumPy arrays of the right types, once it is known to fit into a row."""
    made = Sequence(
        tokens=np.asarray(sequence.tokens, np.int32),
        is_scored=np.asarray(sequence.is_scored, bool),
        advantages=np.asarray(sequence.advantages, np.float32),
        sampler_logprobs=np.asarray(sequence.sampler_logprobs, np.float32),
    )
    fields = (made.is_scored, made.advantages, made.sampler_logprobs)
    if made.tokens.ndim != 1 or any(field.shape != made.tokens.shape for field in fields):
        shapes = [field.shape for field in (made.tokens, *fields)]
        raise ValueError(f"the four fields of sequence {index} differ in length: {shapes}.")
    num_tokens, num_scored = len(made.tokens), int(made.is_scored.sum())
    if num_tokens > row_length:
        raise ValueError(
            f"sequence {index} has {num_tokens} tokens, more than batching.row_length = "
            f"{row_length}. Raise batching.row_length, or lower rollout.max_prompt_tokens."
        )
    if scored_per_row is not None and num_scored > scored_per_row:
        raise ValueError(
            f"sequence {index} has {num_scored} scored tokens, more than "
            f"batching.scored_per_row = {scored_per_row}. Raise batching.scored_per_row."
        )
    if num_tokens and made.is_scored[0]:
        raise ValueError(f"sequence {index} scores its first token, which nothing predicts.")
    if num_tokens and made.tokens.min() < 0:
        raise ValueError(f"sequence {index} holds {made.tokens.min()}, which is no token id.")
    trained = np.concatenate([made.advantages, made.sampler_logprobs])[np.tile(made.is_scored, 2)]
    if not np.isfinite(trained).all():
        raise ValueError(
            f"sequence {index} has a scored token whose advantage or log-prob is not finite."
        )
    return made


def _place(
    sequences: Seq[Sequence],
    kept: list[int],
    row_length: int,
    scored_per_row: int | None,
    share_prefixes: bool,
) -> list[_Row]:
    """Every sequence to the row where it adds the fewest tokens, ties to the newest row."""
    # Big-endian bytes compare as the token ids do, and a prefix sorts before what extends it.
    keys = {i: sequences[i].tokens.astype(">u4").tobytes() for i in kept}
    rows: list[_Row] = []
    last: np.ndarray = np.zeros(0, np.int32)
    for i in sorted(kept, key=keys.__getitem__):
        tokens, num_scored = sequences[i].tokens, int(sequences[i].is_scored.sum())
        common = _common_prefix(last, tokens) if share_prefixes else 0
        best = None
        for row in rows:
            row.common = min(row.common, common)
            fits = row.num_tokens + len(tokens) - row.common <= row_length and (
                scored_per_row is None or row.num_scored + num_scored <= scored_per_row
            )
            if fits and (best is None or row.common >= best.common):
                best = row
        if best is None:
            best = _Row()
            rows.append(best)
        shared = best.common if best.members else 0
        best.members.append(i)
        best.shared.append(shared)
        best.num_tokens += len(tokens) - shared
        best.num_scored += num_scored
        best.common = len(tokens)
        last = tokens
    return rows


def _common_prefix(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"]) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def _empty_batch(num_rows: int, row_length: int, width: int) -> types.TokenBatch:
    """A batch of padding: every token a tree of its own, every entry of weight 0."""
    alone = np.arange(1, row_length + 1, dtype=np.int32)

    def entries(dtype: type) -> np.ndarray:
        return np.zeros((num_rows, width), dtype)

    return types.TokenBatch(
        tokens=np.zeros((num_rows, row_length), np.int32),
        token_positions=np.zeros((num_rows, row_length), np.int32),
        subtree_end=np.tile(alone, (num_rows, 1)),
        source=entries(np.int32),
        target=entries(np.int32),
        sampler_logprobs=entries(np.float32),
        ref_logprobs=entries(np.float32),
        advantages=entries(np.float32),
        weights=entries(np.float32),
        sample_ids=entries(np.int32),
        normaliser=np.float32(1),
        num_scored=np.int32(0),
    )


def _write_row(
    batch: types.TokenBatch,
    b: int,
    row: _Row,
    sequences: Seq[Sequence],
    sample_weights: np.ndarray,
) -> None:
    """Lay the members of a row out as a forest, depth first, with their scored entries."""
    path = np.zeros(batch.tokens.shape[1], np.int32)  # node of the current sequence at each depth
    depth = num_nodes = num_entries = 0
    for sample, (i, shared) in enumerate(zip(row.members, row.shared, strict=True)):
        sequence = sequences[i]
        length = len(sequence.tokens)
        batch.subtree_end[b, path[shared:depth]] = num_nodes
        new = slice(num_nodes, num_nodes + length - shared)
        path[shared:length] = np.arange(new.start, new.stop)
        batch.tokens[b, new] = sequence.tokens[shared:]
        batch.token_positions[b, new] = np.arange(shared, length)
        num_nodes, depth = new.stop, length
        scored = np.flatnonzero(sequence.is_scored)
        entry = slice(num_entries, num_entries + len(scored))
        batch.source[b, entry] = path[scored - 1]
        batch.target[b, entry] = sequence.tokens[scored]
        batch.sampler_logprobs[b, entry] = sequence.sampler_logprobs[scored]
        batch.advantages[b, entry] = sequence.advantages[scored]
        batch.weights[b, entry] = sample_weights[i]
        batch.sample_ids[b, entry] = sample
        num_entries = entry.stop
    batch.subtree_end[b, path[:depth]] = num_nodes


def _read_sample(batch: types.TokenBatch, b: int, entries: np.ndarray) -> Sequence:
    source, target = np.asarray(batch.source[b])[entries], np.asarray(batch.target[b])[entries]
    ends, tokens = np.asarray(batch.subtree_end[b]), np.asarray(batch.tokens[b])
    leaf = source[-1]
    path = np.flatnonzero((np.arange(len(ends)) <= leaf) & (ends > leaf))
    depth = np.asarray(batch.token_positions[b])[source] + 1
    length = len(path) + 1
    is_scored = np.zeros(length, bool)
    advantages, logprobs = np.zeros(length, np.float32), np.zeros(length, np.float32)
    is_scored[depth] = True
    advantages[depth] = np.asarray(batch.advantages[b])[entries]
    logprobs[depth] = np.asarray(batch.sampler_logprobs[b])[entries]
    return Sequence(
        tokens=np.append(tokens[path], target[-1]).astype(np.int32),
        is_scored=is_scored,
        advantages=advantages,
        sampler_logprobs=logprobs,
    )

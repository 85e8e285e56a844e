"""Rows hold forests of the sequences, once each, and give every sequence back."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codjax import batching, types


def sequence(tokens, scored_from, *, advantage=1.0, logprob=-0.5):
    tokens = np.asarray(tokens, np.int32)
    return types.Sequence(
        tokens=tokens,
        is_scored=np.arange(len(tokens)) >= scored_from,
        advantages=np.full(len(tokens), advantage, np.float32),
        sampler_logprobs=np.full(len(tokens), logprob, np.float32),
    )


def test_one_row_written_out():
    # 1 2 3 4   scored 3 4       trie   1 ─ 2 ─ 3 ─ 4
    # 1 2 5     scored 5                     └─ 5
    # 9 8       scored 8                9 ─ 8
    sequences = [
        sequence([9, 8], 1, advantage=3.0),
        sequence([1, 2, 5], 2, advantage=2.0),
        sequence([1, 2, 3, 4], 2, advantage=1.0),
    ]

    batch = batching.build_batch(sequences, row_length=9)

    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 9, 8, 0, 0]]
    assert batch.token_positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 0, 0]]
    assert batch.subtree_end.tolist() == [[5, 5, 4, 4, 5, 7, 7, 8, 9]]
    assert batch.source.tolist() == [[1, 2, 1, 5]]
    assert batch.target.tolist() == [[3, 4, 5, 8]]
    assert batch.advantages.tolist() == [[1.0, 1.0, 2.0, 3.0]]
    assert batch.weights.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert batch.sample_ids.tolist() == [[0, 0, 1, 2]]
    assert batch.num_scored == 4
    assert batch.normaliser == 4.0


def test_equal_samples_share_nodes_but_keep_their_own_entries():
    twice = [sequence([1, 2, 3], 1, advantage=1.0), sequence([1, 2, 3], 1, advantage=-1.0)]

    batch, report = batching.batch_sequences(twice, row_length=4)

    assert batch.tokens.tolist() == [[1, 2, 3, 0]]
    assert batch.source.tolist() == [[0, 1, 0, 1]]
    assert batch.advantages.tolist() == [[1.0, 1.0, -1.0, -1.0]]
    assert report.metrics()["batching/dedup_ratio"] == 0.5


def test_a_turn_is_a_prefix_of_the_next_turn():
    turns = [sequence([1, 2, 3], 2), sequence([1, 2, 3, 4, 5, 6], 5)]

    batch, report = batching.batch_sequences(turns, row_length=6)

    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.target.tolist() == [[3, 6]]
    assert report.stored_tokens == 6
    assert report.plain_tokens == 9


def test_without_sharing_every_sample_is_stored_whole():
    sequences = [sequence([1, 2, 3], 1), sequence([1, 2, 4], 1)]

    batch = batching.build_batch(sequences, row_length=6, share_prefixes=False)

    assert batch.tokens.tolist() == [[1, 2, 3, 1, 2, 4]]
    assert batch.subtree_end.tolist() == [[3, 3, 3, 6, 6, 6]]


def test_an_older_row_takes_what_still_fits():
    sequences = [sequence([1] * 4, 1), sequence([2] * 6, 1), sequence([3] * 2, 1)]

    batch, report = batching.batch_sequences(sequences, row_length=6)

    assert report.num_rows == 2
    assert batch.tokens.tolist() == [[1, 1, 1, 1, 3, 3], [2, 2, 2, 2, 2, 2]]


def test_rows_are_cut_by_scored_entries_and_padded_to_a_multiple():
    sequences = [sequence([k, 1, 1, 1], 1) for k in range(1, 5)]

    batch, report = batching.batch_sequences(
        sequences, row_length=100, scored_per_row=6, rows_multiple=3
    )

    assert report.num_rows == 2
    assert batch.source.shape == (3, 6)
    assert batch.weights.sum() == 12
    assert batch.subtree_end[2].tolist() == list(range(1, 101))


def test_unscored_sequences_are_counted_and_left_out():
    batch, report = batching.batch_sequences(
        [sequence([1, 2], 2), sequence([3, 4], 1)], row_length=4
    )

    assert report.num_unscored == 1
    assert batch.tokens.tolist() == [[3, 4, 0, 0]]


def test_nothing_to_train_on_is_a_batch_of_padding():
    batch, report = batching.batch_sequences([], row_length=4, rows_multiple=2)

    assert report.scored_tokens == 0
    assert batch.tokens.shape == (2, 4)
    assert batch.normaliser == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 3}, "sequence 0 has 4 tokens, more than batching.row_length = 3"),
        ({"row_length": 8, "scored_per_row": 2}, "3 scored tokens, more than batching.scored"),
        ({"row_length": 4, "num_rows": 1}, "num_rows must be at least 2"),
    ],
)
def test_what_fits_nowhere_is_refused(options, message):
    sequences = [sequence([1, 2, 3, 4], 1), sequence([2, 2, 3, 4], 1)]
    with pytest.raises(ValueError, match=message):
        batching.build_batch(sequences, **options)


def test_a_scored_first_token_is_refused():
    with pytest.raises(ValueError, match="scores its first token"):
        batching.build_batch([sequence([1, 2], 0)], row_length=4)


@st.composite
def sequence_lists(draw):
    """Sequences over few symbols, so that they share prefixes; the last token is scored."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = draw(st.lists(st.integers(1, 3), min_size=2, max_size=8))
        scored = np.array([False, *draw(st.lists(st.booleans(), min_size=7, max_size=7))])
        scored = scored[: len(tokens)]
        scored[-1] = True
        found.append(
            dataclasses.replace(sequence(tokens, 0, advantage=float(len(found))), is_scored=scored)
        )
    return found


@settings(deadline=None, max_examples=200)
@given(sequence_lists(), st.integers(8, 30), st.booleans())
def test_rows_give_the_sequences_back(sequences, row_length, share):
    batch, report = batching.batch_sequences(sequences, row_length=row_length, share_prefixes=share)

    def key(s):
        return (s.tokens.tolist(), s.is_scored.tolist(), s.advantages[s.is_scored].tolist())

    assert sorted(map(key, batching.sequences_of(batch))) == sorted(map(key, sequences))
    assert report.scored_tokens == sum(int(s.is_scored.sum()) for s in sequences)
    assert report.stored_tokens <= report.plain_tokens


@settings(deadline=None, max_examples=100)
@given(sequence_lists())
def test_no_two_siblings_of_a_row_hold_the_same_token(sequences):
    batch = batching.build_batch(sequences, row_length=200)
    ends, tokens = batch.subtree_end[0], batch.tokens[0]
    num_tokens = int((tokens != 0).sum())
    paths = set()
    for i in range(num_tokens):
        ancestors = [j for j in range(i + 1) if ends[j] > i]
        paths.add(tuple(tokens[ancestors].tolist()))
        assert batch.token_positions[0, i] == len(ancestors) - 1
    assert len(paths) == num_tokens

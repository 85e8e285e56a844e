"""`codjax bench forests`: what prefix forests and block lists save, counted on real groups.

Nothing is timed. A group's samples (one a model call, each with its whole prompt) are put into rows
in three ways, and the work of an update with a Qwen3-8B is counted for each:

* *forest*: prefixes stored once, attention over the blocks that the mask leaves, distinct sources
  projected onto the vocabulary;
* *alone*: every sample a row of its own length, causal blocks, its sampled tokens projected;
* *packed*: samples packed into rows of the same length as the forests', causal attention over whole
  rows (what a mask inside of a dense causal kernel costs), every token projected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from codjax_kernels import pairs

from codjax import batching, types
from codjax.bench import updates
from codjax.bench.material import Row

_BLOCK = 512  # queries and keys of an attention block


class Sizes(NamedTuple):
    """Of the model whose work is counted."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def products_per_token(self) -> int:
        """Multiply-adds of the layers' matrices for one token."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.width * (attention + 3 * self.mlp)


QWEN3_8B = Sizes(
    width=4096, mlp=12288, layers=36, heads=32, kv_heads=8, head_dim=128, vocab_size=151936
)


class Work(NamedTuple):
    """What an update goes through."""

    tokens: int
    attention_pairs: int  # of tokens, in visited blocks, for one head of one layer
    projections: int

    def teraflops(self, sizes: Sizes) -> float:
        """Operations of forward and backward (three times the forward), nothing rematerialised."""
        layers = 2 * self.tokens * sizes.products_per_token
        attention = 4 * self.attention_pairs * sizes.heads * sizes.head_dim * sizes.layers
        head = 2 * self.projections * sizes.width * sizes.vocab_size
        return 3 * (layers + attention + head) / 1e12


def bench(
    *,
    pack_size: int = 4,
    group_size: int = 8,
    max_turns: int = 8,
    num_thoughts: int = 6,
    num_rounds: int = 15,
    row_length: int = 32768,
) -> list[Row]:
    """Tokens, attention pairs, projections and operations of an update, for two groups.

    Args:
        pack_size: S.
        group_size: G.
        max_turns: of a FrozenLake episode, as published.
        num_thoughts: most sentences of reasoning in a FrozenLake response.
        num_rounds: of an episode of the long conversations.
        row_length: T of the forests and of the packed rows.

    Returns:
        A row for each group and way of storing it; `x_…` are multiples of the forest's.
    """
    lake = updates.samples(
        pack_size=pack_size, group_size=group_size, max_turns=max_turns, num_thoughts=num_thoughts
    )
    long = conversations(pack_size=pack_size, group_size=group_size, num_rounds=num_rounds)
    groups = {"FrozenLake-Obscure": lake, f"{num_rounds} rounds": long}
    return [
        row
        for group, sequences in groups.items()
        for row in _rows_of(group, count(sequences, row_length=row_length))
    ]


def conversations(*, pack_size: int, group_size: int, num_rounds: int) -> list[types.Sequence]:
    """Samples of a group of long conversations, with the lengths of Alchemy's and no meaning.

    An episode has a system prompt that all share, a hint that the run wrote (from the second
    position on), and rounds of a response (150 tokens) and an observation (60); the update that
    follows reads all of it. Tokens are random: two runs part at their first response.
    """
    rng = np.random.default_rng(0)
    system = rng.integers(3, 1000, 700)
    made = []
    for _ in range(group_size):
        hint = np.zeros(0, np.int64)
        for _ in range(pack_size):
            text = np.concatenate([system, hint])
            for _ in range(num_rounds):
                text, sample = _turn(rng, text, prompt_tokens=60, response_tokens=150)
                made.append(sample)
            text, sample = _turn(rng, text, prompt_tokens=300, response_tokens=250)
            made.append(sample)
            hint = text[-200:]
    return made


def count(sequences: Sequence[types.Sequence], *, row_length: int) -> dict[str, Work]:
    """The work of an update on these samples, by the way they are stored."""
    forest, report = batching.batch_sequences(sequences, row_length=row_length)
    _, packed = batching.batch_sequences(sequences, row_length=row_length, share_prefixes=False)
    visited = pairs.block_pairs(
        forest.subtree_end,
        num_queries=forest.subtree_end.shape[1],
        block_q=_BLOCK,
        block_k=_BLOCK,
    )
    sources = sum(
        len(np.unique(source[weights != 0]))
        for source, weights in zip(forest.source, forest.weights, strict=True)
    )
    lengths = [len(sequence.tokens) for sequence in sequences]
    blocks = [math.ceil(length / _BLOCK) for length in lengths]
    alone = sum(n * (n + 1) // 2 for n in blocks) * _BLOCK**2
    row_blocks = math.ceil(row_length / _BLOCK)
    whole = packed.num_rows * row_blocks * (row_blocks + 1) // 2 * _BLOCK**2
    return {
        "forest": Work(report.stored_tokens, int(visited.num_pairs) * _BLOCK**2, sources),
        "alone": Work(sum(lengths), alone, report.scored_tokens),
        "packed": Work(sum(lengths), whole, sum(lengths)),
    }


def _turn(
    rng: np.random.Generator, text: np.ndarray, *, prompt_tokens: int, response_tokens: int
) -> tuple[np.ndarray, types.Sequence]:
    """The conversation after one more turn, and the turn as a sample."""
    prompt = np.concatenate([text, rng.integers(3, 1000, prompt_tokens)])
    tokens = np.concatenate([prompt, rng.integers(3, 1000, response_tokens)])
    is_scored = np.arange(len(tokens)) >= len(prompt)
    ones = np.ones(len(tokens), np.float32)
    return tokens, types.Sequence(tokens.astype(np.int32), is_scored, ones, -ones)


def _rows_of(group: str, works: dict[str, Work]) -> list[Row]:
    least = works["forest"]
    return [
        {
            "way": f"{group}, {way}",
            "tokens": work.tokens,
            "attention_pairs_M": work.attention_pairs / 1e6,
            "projections": work.projections,
            "update_tflop": work.teraflops(QWEN3_8B),
            "x_tokens": work.tokens / least.tokens,
            "x_attention_pairs": work.attention_pairs / least.attention_pairs,
            "x_projections": work.projections / least.projections,
            "x_tflop": work.teraflops(QWEN3_8B) / least.teraflops(QWEN3_8B),
        }
        for way, work in works.items()
    ]

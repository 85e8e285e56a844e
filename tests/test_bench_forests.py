"""Counted work: by hand for samples that share a prompt, and less for forests on real groups."""

import numpy as np
import pytest

from codjax import types
from codjax.bench import forests


def sample(*tokens, num_scored):
    is_scored = np.arange(len(tokens)) >= len(tokens) - num_scored
    ones = np.ones(len(tokens), np.float32)
    return types.Sequence(np.array(tokens, np.int32), is_scored, ones, -ones)


def test_two_answers_to_one_prompt_by_hand():
    prompt = list(range(600))
    samples = [sample(*prompt, 7, 8, num_scored=2), sample(*prompt, 9, num_scored=1)]
    works = forests.count(samples, row_length=1024)
    # The first tokens of both answers are predicted by the one end of the prompt; the forest's
    # 603 tokens, and each sample, lie in two blocks of 512, of which three pairs are visited.
    assert works["forest"] == forests.Work(603, 3 * 512**2, 2)
    assert works["alone"] == forests.Work(602 + 601, 2 * 3 * 512**2, 3)
    assert works["packed"] == forests.Work(602 + 601, 2 * 3 * 512**2, 602 + 601)


def test_operations_by_hand():
    sizes = forests.Sizes(width=2, mlp=3, layers=5, heads=2, kv_heads=1, head_dim=4, vocab_size=7)
    # Query and output 2 * 8, key and value 2 * 4, MLP 3 * 3, from or to a width of 2.
    assert sizes.products_per_token == 5 * 2 * (16 + 8 + 9)
    work = forests.Work(tokens=10, attention_pairs=55, projections=4)
    expected = 2 * 10 * 330 + 4 * 55 * 2 * 4 * 5 + 2 * 4 * 2 * 7
    assert work.teraflops(sizes) == pytest.approx(3 * expected / 1e12)


def test_forests_do_less_of_everything_on_real_groups():
    rows = forests.bench(
        pack_size=2, group_size=2, max_turns=2, num_thoughts=2, num_rounds=3, row_length=4096
    )
    assert [row["way"] for row in rows][:3] == [
        f"FrozenLake-Obscure, {way}" for way in ("forest", "alone", "packed")
    ]
    for row in rows:
        assert min(row["x_tokens"], row["x_attention_pairs"], row["x_projections"]) >= 1
    assert rows[1]["x_tflop"] > 1.5
    assert rows[2]["x_tflop"] > rows[1]["x_tflop"]

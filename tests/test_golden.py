"""Losses of three updates of a fixed model on a fixed batch, as they were when last looked at.

A change of these numbers is a change of what codjax computes: make it on purpose, and say why.

    python -m tests.test_golden > tests/golden/three_updates.json     # writes them anew
"""

import functools
import json
import pathlib
import sys

import numpy as np
import optax
import pytest

from codjax import batching, build, learner, losses, models, sharding, types
from tests import small

GOLDEN = pathlib.Path(__file__).parent / "golden" / "three_updates.json"
NAMES = ("loss/total", "loss/policy", "loss/entropy", "loss/clip_frac", "optimizer/grad_norm")


def three_updates():
    config = small.decoder_config(
        vocab_size=32, tie_embeddings=True, init_std=0.1, embedding_std=0.3, remat="full"
    )
    rng = np.random.RandomState(0)  # legacy: its stream never changes
    stem = rng.randint(1, 32, 6)
    sequences = [
        types.Sequence(
            tokens=np.concatenate([stem[: rng.randint(1, 6)], rng.randint(1, 32, 5)]).astype(
                np.int32
            ),
            is_scored=np.array([], bool),
            advantages=rng.normal(size=11).astype(np.float32),
            sampler_logprobs=rng.normal(-3.4, 0.3, 11).astype(np.float32),
        )
        for _ in range(8)
    ]
    sequences = [
        types.Sequence(
            tokens=s.tokens,
            is_scored=np.arange(len(s.tokens)) >= 3,
            advantages=s.advantages[: len(s.tokens)],
            sampler_logprobs=s.sampler_logprobs[: len(s.tokens)],
        )
        for s in sequences
    ]
    made = learner.Learner(
        models.init(config, seed=0),
        optimizer=optax.adamw(1e-2),
        schedule=optax.constant_schedule(1e-2),
        objective=learner.Objective(
            policy_loss=functools.partial(losses.rec_loss),
            is_per_token=True,
            temperature=1.0,
            entropy_coef=0.01,
        ),
        mesh=sharding.one_device(),
        rows_per_microbatch=2,
    )
    state, found = made.init_state(build.params_of(models.init(config, seed=0))), []
    for _ in range(3):
        batch = batching.build_batch(sequences, 24, 4, scored_per_row=24)
        state, metrics = made.update(state, batch)
        found.append({name: metrics[name] for name in NAMES})
    return found


def test_three_updates_are_what_they_were():
    for found, expected in zip(three_updates(), json.loads(GOLDEN.read_text()), strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


if __name__ == "__main__":
    json.dump(three_updates(), sys.stdout, indent=1)

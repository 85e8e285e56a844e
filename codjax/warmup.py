"""The warm-up: a model without pre-training imitates a sloppy scripted player.

A language model brings two weak abilities along: to use a hint when one is there, and to write
something in the hint's format. A model that starts from random weights brings neither, and CoD
training cannot begin: reading is worth nothing while hints are noise, and writing is worth nothing
while nobody reads. The warm-up supplies both, and no more. It shows single tasks, never a pack, in
which the player

* is given a hint that is true, though partial, or is random characters;
* acts on its hint, true or not, in most demonstrations, and presses at random in the others;
* writes what it was given corrected by what it saw in a minority of demonstrations, and random
  characters in all the others.

Imitating it, reward does not rise with the position: too little of what is written is true. The
tasks are played through the ordinary machinery (environment, prompts, chat, episodes), and every
token is imitated, observations included, since they too tell what the keys do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from codjax import batching, build, checks, learner, models, seeds, types
from codjax import chat as chats
from codjax.envs import frozen_lake_compact as lake
from codjax.rollout import episode as episodes
from codjax.rollout import scripted

_DIRECTIONS = "UDLR"
_NOTHING = "?"  # a note must say something
_FACT = re.compile(f"([{lake.CODES}])([{_DIRECTIONS}])")
# ^ hint : bearing (code ; effect bearing)*, and in an update the reward and #
_TASK = re.compile(r"\^([^:]*):(..)((?:[abcd];...)*)")


@dataclasses.dataclass(kw_only=True)
class SloppyPlayer:
    """Plays `frozen_lake_compact` and writes notes, from the text of the prompt alone.

    Attributes:
        follows: whether it acts on its hint; else it presses at random.
        writes_truth: whether its note is what it was given and saw; else random characters.
    """

    follows: bool
    writes_truth: bool

    def __call__(self, prompt: str, rng: random.Random) -> str:
        """Its answer to a prompt of the compact style."""
        found = _TASK.match(prompt)
        if found is None:
            raise ValueError(f"the sloppy player reads compact prompts only; got {prompt!r}.")
        hint, bearing, presses = found.groups()
        known = dict(_FACT.findall(hint))
        for code, _, effect, *bearing_now in zip(*[iter(presses)] * 5, strict=True):
            bearing = "".join(bearing_now)
            if effect in _DIRECTIONS:
                known[code] = effect
        if prompt.endswith("#"):
            return f"<{self._note(known, rng)}>"
        return self._press(known, bearing, rng)

    def _press(self, known: dict[str, str], bearing: str, rng: random.Random) -> str:
        useful = [code for code, direction in known.items() if direction in bearing]
        return rng.choice(useful if useful and self.follows else lake.CODES)

    def _note(self, known: dict[str, str], rng: random.Random) -> str:
        return note_of(known) if self.writes_truth else random_note(rng)


def note_of(facts: Mapping[str, str]) -> str:
    """Facts as a note, in the order of the codes.

    >>> note_of({"c": "U", "a": "L"}), note_of({})
    ('aLcU', '?')
    """
    return "".join(code + facts[code] for code in lake.CODES if code in facts) or _NOTHING


def random_note(rng: random.Random) -> str:
    """A note that means nothing; how many codes it speaks of varies from note to note."""
    return note_of(_some({code: rng.choice(_DIRECTIONS) for code in lake.CODES}, rng))


def true_note(pack_seed: int, rng: random.Random) -> str:
    """Some of what is true in the world of this pack."""
    return note_of(_some(lake.draw_codes(pack_seed), rng))


def _some(facts: Mapping[str, str], rng: random.Random) -> dict[str, str]:
    """Each fact with a probability that is itself drawn, so that all amounts are as likely."""
    kept = rng.random()
    return {code: direction for code, direction in facts.items() if rng.random() < kept}


def make_demos(
    config: ConfigDict, chat: chats.Chat, tasksets: Sequence[build.TaskSet]
) -> list[list[types.Sequence]]:
    """Demonstrations: each a list of sequences in which every token is imitated once.

    Args:
        config: the run's; `config.warmup` says how many and how sloppy.
        chat: the tokenizer.
        tasksets: the training task sets, all of the environment `frozen_lake_compact`.
    """
    settings = episodes.settings_from(config.rollout, keep_env_memory=False)

    async def play_all() -> list[list[types.Sequence]]:
        return [
            await _demonstrate(config, chat, tasksets[index % len(tasksets)], settings, index)
            for index in range(config.warmup.num_demos)
        ]

    return asyncio.run(play_all())


def run(
    config: ConfigDict,
    *,
    chat: chats.Chat,
    model: models.Decoder,
    params: learner.Params,
    mesh: jax.sharding.Mesh,
    tasksets: Sequence[build.TaskSet],
) -> Iterator[tuple[learner.TrainState, dict[str, float]]]:
    """The steps of the warm-up: yields the state and the metrics after each.

    A state is used up by the next step; keep the last one.
    """
    demos = make_demos(config, chat, tasksets)
    warm = config.warmup
    imitator = build.make_learner(
        config,
        model,
        mesh,
        optimizer=warm.optimizer,
        objective=learner.imitation_objective(),
        num_steps=warm.num_steps,
    )
    state = imitator.init_state(params)
    for step in range(warm.num_steps):
        chosen = _chosen(step, len(demos), warm.batch_episodes, seed=config.seed)
        batch, _ = batching.batch_sequences(
            [sequence for index in chosen for sequence in demos[index]],
            row_length=config.batching.row_length,
            rows_multiple=config.batching.rows_per_microbatch,
            scored_per_row=config.batching.scored_per_row or config.batching.row_length,
        )
        state, metrics = imitator.update(state, batch)
        yield state, metrics


async def _demonstrate(
    config: ConfigDict,
    chat: chats.Chat,
    taskset: build.TaskSet,
    settings: episodes.RolloutSettings,
    index: int,
) -> list[types.Sequence]:
    """One task, solved and noted down by a player whose sloppiness is drawn for it."""
    rng = random.Random(seeds.derive_seed(config.seed, "demo", index))
    warm = config.warmup
    row = rng.randrange(len(taskset.records))
    task = types.Task(
        taskset=taskset.name,
        taskset_id=taskset.taskset_id,
        index=row,
        record=taskset.records[row],
    )
    pack = types.Pack(
        tasks=(task,), seed=rng.getrandbits(32), mode=types.PackMode.COD, env_task_indices=(0,)
    )
    is_true = rng.random() < warm.true_hint_in_frac
    hint = true_note(pack.seed, rng) if is_true else random_note(rng)
    player = SloppyPlayer(
        follows=rng.random() < warm.follow_frac,
        writes_truth=rng.random() < warm.true_hint_out_frac,
    )
    sampler = scripted.ScriptedSampler(scripted.speaks(player, chat))
    solved = await episodes.solve(
        pack,
        0,
        env=taskset.rules().env_factory(),
        hint=hint,
        sampler=sampler,
        chat=chat,
        settings=settings,
        seed=rng.getrandbits(32),
    )
    updated = await episodes.update(
        solved,
        show_reward=taskset.show_reward,
        sampler=sampler,
        chat=chat,
        settings=settings,
        seed=rng.getrandbits(32),
    )
    return _imitated([solved.episode, updated])


def _imitated(played: Sequence[types.Episode]) -> list[types.Sequence]:
    """The conversations as sequences; a prefix that was there before is not imitated twice."""
    sequences: list[types.Sequence] = []
    for episode in played:
        if not episode.turns:
            raise checks.ConfigError(
                "rollout.max_prompt_tokens is too small for the demonstrations of the warm-up: a "
                "prompt of theirs did not fit; raise it."
            )
        turn = episode.turns[-1]
        tokens = np.concatenate([turn.prompt_tokens, turn.response_tokens])
        is_new = np.ones(len(tokens), bool)
        is_new[0] = False
        for other in sequences:
            length = min(len(tokens), len(other.tokens))
            is_same = np.cumprod(tokens[:length] == other.tokens[:length]).astype(bool)
            is_new[:length] &= ~is_same
        sequences.append(
            types.Sequence(
                tokens=tokens,
                is_scored=is_new,
                advantages=np.ones(len(tokens), np.float32),
                sampler_logprobs=np.zeros(len(tokens), np.float32),
            )
        )
    return sequences


def _chosen(step: int, num_demos: int, batch_size: int, *, seed: int) -> list[int]:
    """Which demonstrations a step imitates: epochs of all of them, in shuffled orders."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng(seeds.derive_seed(seed, "demo_order", epoch)).permutation(
            num_demos
        )
        for epoch in {position // num_demos for position in positions}
    }
    return [int(orders[position // num_demos][position % num_demos]) for position in positions]

"""Whole runs over HTTP: the order of solve, feedback and update, and runs beside every fault."""

import re

import numpy as np

from codjax import chat as chats
from codjax import config as configs
from codjax import types
from codjax.envs import protocol
from codjax.rollout import prompts, runner, scripted, settings
from codjax.rollout.sglang.replicas import ExpectedModel
from codjax.rollout.sglang.sampler import SGLangSampler
from tests.rollout.sglang import serving
from tests.rollout.sglang.fake_server import FakeServer
from tests.rollout.sglang.faults import Fault

CHAT = chats.load_chat("builtin:bytes")
BEGIN, END = prompts.FULL.start_delimiter, prompts.FULL.end_delimiter
EXPECTED = ExpectedModel(
    architecture="Qwen3ForCausalLM", vocab_size=CHAT.vocab_size, context_tokens=12000
)
ANSWER_BEGINS = "<|im_start|>assistant\n"
# Everything that a request survives, with good answers between.
SURVIVED = [
    fault
    for fault in Fault
    if fault not in (Fault.STATUS_400, Fault.LATE, Fault.STALE_VERSION, Fault.FOREIGN_VERSION)
]


class OneShot:
    """One turn, solved by any answer; `diary` lists what it was asked, in order."""

    system_prompt = "Answer."
    max_turns = 1

    def __init__(self, diary):
        self.diary = diary

    def reset(self, record, *, pack_seed, slot, pack_size, env_task_idx):
        self.row = record["row"]
        self.diary.append(f"reset {self.row}")
        return f"task {self.row} of pack {pack_seed}"

    def step(self, text):
        self.diary.append(f"step {self.row}: {text}")
        return protocol.StepResult(observation="done", done=True)

    def result(self):
        self.diary.append(f"feedback {self.row}")
        return protocol.EpisodeResult(
            raw_reward=1.0, is_success=True, feedback="fine", format_error=False, num_turns=1
        )


def numbered_hints(prompt):
    """Solves by what it was hinted at; as hint, counts the updates by what it was given."""
    number = max((int(n) for n in re.findall(r"#(\d+)", prompt)), default=0)
    if "## Record of the latest task" not in prompt:
        return f"go #{number}"
    return f"{BEGIN}\n#{number + 1}\n{END}"


def replays(diary):
    """A server's script: the text's tokens, from where the request leaves off."""

    def script(ids):
        text = CHAT.show(np.array(ids))
        start = text.rindex(ANSWER_BEGINS) + len(ANSWER_BEGINS)
        answer = CHAT.respond(numbered_hints(text[:start])).tolist()
        num_done = len(ids) - len(CHAT.tokenizer.encode(text[:start]))
        diary.append("update" if BEGIN in numbered_hints(text[:start]) else "solve")
        return ((token, -token / 1000) for token in answer[num_done:])

    return script


def make_pack(seed, num_tasks=3):
    tasks = tuple(
        types.Task(taskset="toy", taskset_id=0, index=row, record={"row": row})
        for row in range(num_tasks)
    )
    return types.Pack(
        tasks=tasks,
        seed=seed,
        mode=types.PackMode.COD,
        env_task_indices=tuple(range(num_tasks)),
    )


async def run_packs(sampler, diary, *, num_packs=1, group_size=1):
    rules = runner.TasksetRules(env_factory=lambda: OneShot(diary), show_reward=True)
    return await runner.run_packs(
        [make_pack(seed) for seed in range(num_packs)],
        group_size=group_size,
        tasksets={"toy": rules},
        sampler=sampler,
        chat=CHAT,
        settings=settings.settings_from(configs.default_config().rollout, keep_env_memory=False),
        seed=0,
    )


def over_http(*, faults=(), num_servers=1, **shape):
    """(groups, diary, sampler, servers) of runs over fake servers that commit these faults."""
    diary = []

    async def scenario():
        servers = [
            FakeServer(replays(diary), vocab_size=CHAT.vocab_size) for _ in range(num_servers)
        ]
        for server in servers:
            server.context_length = 20000
            await server.start()
            server.faults = list(faults)
        changes = {"max_retries": 99, "max_failures": 99}
        made = SGLangSampler(serving.settings(servers, **changes), EXPECTED, run_id="run")
        async with made as sampler:
            await sampler.connect()
            for server in servers:
                await sampler.readmit(server.url, policy_version=0)
            groups = await run_packs(sampler, diary, **shape)
        for server in servers:
            await server.stop()
        return groups, diary, sampler, servers

    return serving.run(scenario())


def test_a_run_solves_hears_and_updates_in_order():
    [[trajectory]], diary, sampler, _ = over_http()
    assert trajectory.failure is None
    assert diary == [
        *("reset 0", "solve", "step 0: go #0", "feedback 0", "update"),
        *("reset 1", "solve", "step 1: go #1", "feedback 1", "update"),
        *("reset 2", "solve", "step 2: go #2", "feedback 2"),
    ]
    assert sampler.counters.requests == 5
    turn = trajectory.episodes[0].turns[0]
    assert turn.response_tokens.tolist() == CHAT.respond("go #0").tolist()
    np.testing.assert_array_equal(
        turn.sampler_logprobs, np.float32(turn.response_tokens / np.float64(-1000))
    )
    assert turn.version_spans == (types.VersionSpan(0, 0, len(turn.response_tokens)),)
    assert turn.stop_reason is types.StopReason.STOP_TOKEN


def test_runs_beside_faults_are_the_runs_of_a_sampler_without_any():
    script = scripted.speaks(lambda prompt, rng: numbered_hints(prompt), CHAT)
    calm = serving.run(run_packs(scripted.ScriptedSampler(script), [], num_packs=4, group_size=8))
    faults = [
        fault for pair in zip(SURVIVED, [None] * len(SURVIVED), strict=True) for fault in pair
    ]
    stormy, _, sampler, servers = over_http(faults=faults, num_servers=2, num_packs=4, group_size=8)
    assert [len(server.faults) for server in servers] == [0, 0]
    assert (sampler.counters.retries, sampler.counters.aborted) == (2 * len(SURVIVED) - 4, 4)
    assert [[told(run) for run in group] for group in stormy] == [
        [told(run) for run in group] for group in calm
    ]


def tokens_of(turn):
    return turn.prompt_tokens.tolist(), turn.response_tokens.tolist()


def told(run):
    """What was said in a run, to the token."""
    return [
        (episode.kind, episode.reward, episode.hint_out, turn.stop_reason, *tokens_of(turn))
        for episode in run.episodes
        for turn in episode.turns
    ]


def test_a_run_whose_request_is_refused_is_dropped_and_says_why():
    groups, _, _, _ = over_http(faults=[Fault.STATUS_400], group_size=3)
    failed = [run for run in groups[0] if run.failure is not None]
    assert [run.failure for run in failed] == [types.StopReason.SAMPLER_FAILED]
    assert "answered 400: told to refuse" in failed[0].episodes[-1].feedback
    assert all(len(run.episodes) == 5 for run in groups[0] if run.failure is None)

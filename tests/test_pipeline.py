"""Who samples what, by which weights, and when: rollouts that a test lets go on one by one."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import pytest

from codjax import pipeline, replay, waits
from codjax.checks import StalledError

SYNCHRONOUS = pipeline.Settings(
    num_steps=4,
    max_staleness=0,
    in_flight_updates=False,
    max_concurrent=1,
    sync_every=1,
    is_repeatable=True,
    deadline_s=20,
    deadline_key="rollout.deadline_s",
)


class World:
    """Scripted rollouts, and a record of what happened.

    Attributes:
        log: "load v" and "begin step by v", in order.
        gates: a step's rollout goes on when its gate is set; without one, at once.
    """

    def __init__(self, tmp_path, **changes):
        self.log, self.gates, self.version = [], {}, None
        self.settings = dataclasses.replace(SYNCHRONOUS, **changes)
        self.rules = replay.Rules(
            capacity=100,
            max_staleness=self.settings.max_staleness,
            noise=0,
            in_order=not self.settings.in_flight_updates,
        )
        self.stalls = waits.Waits(tmp_path)

    def open(self, **options):
        return pipeline.Pipeline(
            self.settings,
            sample=self.sample,
            load=self.load,
            rules=self.rules,
            stalls=self.stalls,
            **options,
        )

    async def load(self, weights, version):
        assert weights == f"weights {version}"
        await asyncio.sleep(0.01)
        self.version = version
        self.log.append(f"load {version}")

    async def sample(self, step):
        begun = self.version
        self.log.append(f"begin {step} by {begun}")
        while step in self.gates and not self.gates[step].is_set():
            await asyncio.sleep(0.005)
        return f"groups {step}", begun


def train(world, made, *, until=None, pause=0.0, late=0.0, idle=0.0, version=0):
    """The learner's loop, with pauses where a busy machine has them; the steps it trained on."""
    trained = []
    made.offer(f"weights {version}", version=version)
    while until is None or len(trained) < until:
        drawn = made.take(version + 1)
        if drawn is None:
            break
        time.sleep(pause)
        version += 1
        trained.append(drawn.item.step)
        made.offer(f"weights {version}", version=version)
        time.sleep(late)
        made.consumed(drawn)
        time.sleep(idle)
    return trained


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_without_staleness_every_step_is_sampled_by_the_weights_before_it(tmp_path, pause):
    world = World(tmp_path)
    with world.open() as made:
        assert train(world, made, pause=pause) == [0, 1, 2, 3]
    assert world.log[:8] == [
        text for step in range(4) for text in (f"load {step}", f"begin {step} by {step}")
    ]


@pytest.mark.parametrize("pauses", [{}, {"pause": 0.05}, {"late": 0.05}, {"idle": 0.05}])
def test_one_step_ahead_is_sampled_by_the_weights_before_the_last_whatever_the_timing(
    tmp_path, pauses
):
    world = World(tmp_path, max_staleness=1, num_steps=6)
    with world.open() as made:
        assert train(world, made, **pauses) == [0, 1, 2, 3, 4, 5]
        assert made.position().next_step == 7
    begun = [text for text in world.log if text.startswith("begin")]
    # The last one is for a run that goes on later.
    assert begun == ["begin 0 by 0", *[f"begin {step} by {step - 1}" for step in range(1, 7)]]


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_in_flight_steps_overlap_within_the_limit_and_weights_are_handed_on_at_once(tmp_path):
    world = World(tmp_path, max_staleness=3, in_flight_updates=True, max_concurrent=2, num_steps=10)
    world.gates = {step: threading.Event() for step in range(10)}
    with world.open() as made:
        made.offer("weights 0", version=0)
        wait_until(lambda: len(world.log) == 3)
        time.sleep(0.05)
        assert world.log == ["load 0", "begin 0 by 0", "begin 1 by 0"]  # two at once
        made.offer("weights 1", version=1)
        wait_until(lambda: world.log[-1] == "load 1")  # beside the two
        for step in range(10):
            world.gates[step].set()
        # Four wait, or are sampled: the fifth would be staler than allowed.
        wait_until(lambda: "begin 3 by 1" in world.log)
        time.sleep(0.05)
        assert len([text for text in world.log if text.startswith("begin")]) == 4


def test_weights_are_handed_on_every_so_many_updates(tmp_path):
    world = World(tmp_path, max_staleness=1, sync_every=2, num_steps=5)
    with world.open() as made:
        train(world, made)
    weights = [text.split()[-1] for text in world.log if text.startswith("begin")]
    assert weights == ["0", "0", "2", "2", "4"]


def test_what_no_update_would_train_on_is_not_sampled(tmp_path):
    world = World(tmp_path, max_staleness=9, in_flight_updates=True, max_concurrent=4, num_steps=5)
    with world.open() as made:
        assert sorted(train(world, made, pause=0.02)) == [0, 1, 2, 3, 4]
        assert made.take(6) is None
        assert made.position() == pipeline.Position(num_trained=5, next_step=5)


def test_what_is_trained_on_twice_is_sampled_half_as_often(tmp_path):
    world = World(tmp_path, max_staleness=3, in_flight_updates=True, max_concurrent=1, num_steps=6)
    world.rules = dataclasses.replace(world.rules, max_uses=2)
    with world.open() as made:
        trained = train(world, made, pause=0.02)
    assert len(trained) == 6
    assert made.position().next_step <= 5
    assert max(trained.count(step) for step in trained) == 2


def test_processes_take_the_step_that_waits_in_all_of_them(tmp_path):
    world = World(tmp_path, max_staleness=3, in_flight_updates=True, max_concurrent=4, num_steps=4)
    elsewhere = [{}, {0: 0}, {0: 0, 2: 0}]

    def agree(mine):
        theirs = elsewhere.pop(0)
        return {step: version for step, version in mine.items() if step in theirs}

    world.gates = {step: threading.Event() for step in (0, 3)}
    with world.open(agree=agree) as made:
        made.offer("weights 0", version=0)
        wait_until(lambda: len(made.position().items) == 2)  # 1 and 2
        assert made.take(1).item.step == 2
    assert not elsewhere


def test_a_run_that_is_to_stop_does_not_wait_for_the_step_under_way(tmp_path):
    world = World(tmp_path)
    world.gates = {0: threading.Event()}
    with world.open(agree=lambda mine: None) as made:
        made.offer("weights 0", version=0)
        wait_until(lambda: len(world.log) == 2)
        assert made.take(1) is None
        assert made.position().unfinished == (0,)


def test_the_seconds_of_a_step_are_told(tmp_path):
    world = World(tmp_path, num_steps=1)
    world.gates = {0: threading.Event()}
    with world.open() as made:
        time.sleep(0.1)
        made.offer("weights 0", version=0)
        wait_until(lambda: len(world.log) == 2)
        threading.Timer(0.1, world.gates[0].set).start()
        seconds = made.take(1).seconds
    assert seconds["load"] >= 0.01
    assert seconds["wait_learner"] >= 0.1
    assert seconds["rollout"] >= 0.1


def test_what_surrounds_the_rollouts_lives_on_their_loop_and_is_left_at_the_end(tmp_path):
    log = []

    @contextlib.asynccontextmanager
    async def around():
        log.append(("open", threading.current_thread().name))
        try:
            yield
        finally:
            await asyncio.sleep(0.01)
            log.append(("close", threading.current_thread().name))

    world = World(tmp_path)
    with world.open(around=around()) as made:
        assert train(world, made, until=1) == [0]
    assert log == [("open", "rollouts"), ("close", "rollouts")]


def test_what_is_too_old_is_given_up_and_the_run_goes_on(tmp_path):
    world = World(tmp_path, max_staleness=1, num_steps=3)
    old = replay.Item(step=0, version=0, payload="groups 0")
    begin = pipeline.Position(num_trained=1, next_step=1, items=(old,))
    with world.open(position=begin) as made:
        made.offer("weights 5", version=5)
        drawn = made.take(6)
        assert (drawn.item.step, drawn.too_old) == (1, (old,))
        made.offer("weights 6", version=6)
        made.consumed(drawn)
        assert train(world, made, version=6) == [
            2
        ]  # in place of the one that was dropped: 3 in all


def test_a_run_goes_on_with_what_waits_and_begins_the_unfinished_again(tmp_path):
    world = World(tmp_path, max_staleness=2, in_flight_updates=True, max_concurrent=2, num_steps=6)
    world.rules = dataclasses.replace(world.rules, max_staleness=9)  # nothing is dropped
    world.gates = {step: threading.Event() for step in range(6)}
    world.gates[1].set()
    with world.open() as made:
        made.offer("weights 0", version=0)
        wait_until(lambda: made.position().items)
        position = made.position()
    assert [item.step for item in position.items] == [1]
    assert (position.unfinished, position.next_step) == ((0, 2), 3)
    for gate in world.gates.values():
        gate.set()
    with world.open(position=position) as made:
        assert sorted(train(world, made)) == [0, 1, 2, 3, 4, 5]


def test_a_step_that_the_newest_weights_sample_is_begun_again(tmp_path):
    world = World(tmp_path, num_steps=3)
    world.gates = {1: threading.Event()}
    with world.open() as made:
        assert train(world, made, until=1) == [0]
        wait_until(lambda: world.log[-1] == "begin 1 by 1")
        position = made.position()
    assert position == pipeline.Position(num_trained=1, next_step=2, unfinished=(1,))


def test_a_checkpoint_waits_for_the_step_that_older_weights_sample(tmp_path):
    world = World(tmp_path, max_staleness=1, num_steps=3)
    world.gates = {1: threading.Event()}
    with world.open() as made:
        assert train(world, made, until=1) == [0]
        threading.Timer(0.1, world.gates[1].set).start()
        position = made.position()
    assert (position.next_step, position.unfinished) == (2, ())
    assert [(item.step, item.version) for item in position.items] == [(1, 0)]


@pytest.mark.parametrize("where", ["sample", "load"])
def test_what_a_rollout_raises_is_raised_where_it_is_awaited(tmp_path, where):
    world = World(tmp_path)

    async def fail(*_):
        raise KeyError("mine")

    setattr(world, where, fail)
    with world.open() as made, pytest.raises(KeyError, match="mine"):
        train(world, made)


def test_what_a_rollout_raises_during_an_update_is_raised_at_the_next_take(tmp_path):
    world = World(tmp_path, max_staleness=1)
    world.gates = {1: threading.Event()}
    sample = world.sample

    async def fail_at_1(step):
        result = await sample(step)
        if step == 1:
            raise KeyError("the one clear sentence")
        return result

    world.sample = fail_at_1
    with world.open() as made:
        made.offer("weights 0", version=0)
        drawn = made.take(1)
        world.gates[1].set()
        wait_until(lambda: not made._thread.is_alive())
        made.offer("weights 1", version=1)
        made.consumed(drawn)
        with pytest.raises(KeyError, match="the one clear sentence"):
            made.take(2)


def test_weights_are_due_by_what_was_offered_alone(tmp_path):
    """Not by what a sampler has taken, which differs between processes."""
    world = World(tmp_path, max_staleness=3, sync_every=2)
    with world.open() as made:
        assert made.is_due(0)
        made.offer("weights 0", version=0)
        assert [made.is_due(version) for version in (0, 1, 2)] == [False, False, True]


def test_a_rollout_that_does_not_come_is_a_stall_with_its_stack(tmp_path):
    world = World(tmp_path, deadline_s=0.2)
    world.gates = {0: threading.Event()}
    with world.open() as made, pytest.raises(StalledError) as caught:
        train(world, made)
    assert (
        "for a rollout step for update 1; last sign of life of rollouts: 0 s ago: step 0 was"
        in (str(caught.value))
    )
    (path,) = tmp_path.glob("stall-*.txt")
    assert "rollout step 0" in path.read_text()


def test_after_an_error_a_rollout_that_hangs_is_not_waited_for(tmp_path, caplog):
    """In one of several processes: the others wait for this one."""
    world, is_over = World(tmp_path, close_failed_s=0.2), threading.Event()

    async def hang(step):
        world.log.append("hangs")
        is_over.wait(30)
        return "groups", 0

    world.sample = hang
    made = world.open()
    made.offer("weights 0", version=0)
    wait_until(lambda: "hangs" in world.log)
    begin = time.monotonic()
    made.__exit__(ValueError, ValueError(), None)
    assert time.monotonic() - begin < 5
    assert "did not end in time" in caplog.text
    is_over.set()
    made._thread.join(10)


def test_a_step_that_was_dropped_before_a_stop_is_counted_by_the_next_item(tmp_path):
    world = World(tmp_path, max_staleness=1, num_steps=3)
    old = replay.Item(step=0, version=0, payload="groups 0")
    answers = [{0: 0}, None]
    with world.open(
        position=pipeline.Position(next_step=1, items=(old,)),
        agree=lambda mine: answers.pop(0) if answers else mine,
    ) as made:
        made.offer("weights 5", version=5)
        assert made.take(6) is None
        assert [item.step for item in made.take(6).too_old] == [0]


def test_closing_cancels_what_is_sampled_and_ends_the_thread(tmp_path):
    world = World(tmp_path)
    world.gates = {0: threading.Event()}
    made = world.open()
    made.offer("weights 0", version=0)
    wait_until(lambda: len(world.log) == 2)
    made.close()
    assert "rollouts" not in {thread.name for thread in threading.enumerate()}

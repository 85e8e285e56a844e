import collections
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codjax import packs
from codjax.types import PackMode, Task


def make_tasks(*counts):
    """counts[i] tasks of task set i, one task set after the other."""
    return [
        Task(taskset=f"set{taskset_id}", taskset_id=taskset_id, index=index, record={})
        for taskset_id, count in enumerate(counts)
        for index in range(count)
    ]


def members(pack):
    return [(task.taskset_id, task.index) for task in pack.tasks]


# Seeds


@pytest.mark.parametrize(
    ("pairs", "seed"),
    [
        ([[0, 0], [0, 1], [0, 2], [0, 3]], 15069623396018555611),
        ([(0, row) for row in range(8)], 16109384123688988985),
        ([(2, row) for row in range(8, 16)], 4342574806193475013),
        ([(1, 5)] * 4, 7658849944502078984),
    ],
)
def test_golden_seeds(pairs, seed):
    assert packs.stable_seed(pairs) == seed
    assert packs.stable_seed(reversed(pairs)) == seed
    assert packs.stable_seed(tuple(pairs)) == seed
    assert packs.stable_seed(np.array(pairs, np.int32)) == seed
    assert packs.stable_seed([(np.int64(a), np.uint8(b)) for a, b in pairs]) == seed


def test_seed_of_a_later_epoch_is_another():
    pairs = [(0, 0), (0, 1)]
    assert packs.stable_seed(pairs, epoch=0) == packs.stable_seed(pairs)
    assert len({packs.stable_seed(pairs, epoch=epoch) for epoch in range(5)}) == 5
    with pytest.raises(ValueError, match="at least 0"):
        packs.stable_seed(pairs, epoch=-1)


def test_seed_does_not_round_a_row_number():
    with pytest.raises(TypeError):
        packs.stable_seed([(0, 1.5)])


# Packs


def test_packs_keep_order_and_never_mix_task_sets():
    first, second = make_tasks(4, 4)[:4], make_tasks(4, 4)[4:]
    mixed = [task for pair in zip(first, second, strict=True) for task in pair]
    made = packs.make_packs(mixed, size=2, mode="cod", pad_to_full=False)
    assert [members(pack) for pack in made] == [
        [(0, 0), (0, 1)],
        [(0, 2), (0, 3)],
        [(1, 0), (1, 1)],
        [(1, 2), (1, 3)],
    ]
    assert all(pack.env_task_indices == (0, 1) for pack in made)
    assert all(pack.mode is PackMode.COD for pack in made)
    assert [pack.seed for pack in made] == [packs.stable_seed(members(pack)) for pack in made]
    assert len({pack.seed for pack in made}) == 4


def test_a_remainder_is_completed_from_the_start_of_its_task_set():
    made = packs.make_packs(make_tasks(5), size=4, mode="cod", pad_to_full=True)
    assert [members(pack) for pack in made] == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 4), (0, 0), (0, 1), (0, 2)],
    ]
    assert packs.num_dropped(make_tasks(5), size=4, mode="cod", pad_to_full=True) == 0


def test_a_remainder_is_dropped_without_padding_and_counted():
    made = packs.make_packs(make_tasks(6), size=4, mode="cod", pad_to_full=False)
    assert [members(pack) for pack in made] == [[(0, 0), (0, 1), (0, 2), (0, 3)]]
    assert packs.num_dropped(make_tasks(6), size=4, mode="cod", pad_to_full=False) == 2


def test_a_task_set_smaller_than_a_pack_is_dropped_even_with_padding():
    tasks = make_tasks(3, 4)
    made = packs.make_packs(tasks, size=4, mode="cod", pad_to_full=True)
    assert [pack.tasks[0].taskset_id for pack in made] == [1]
    assert packs.num_dropped(tasks, size=4, mode="cod", pad_to_full=True) == 3


def test_ralph_sample_repeats_the_first_task_of_every_pack():
    made = packs.make_packs(make_tasks(6), size=4, mode=PackMode.RALPH_SAMPLE, pad_to_full=True)
    assert [members(pack) for pack in made] == [[(0, 0)] * 4, [(0, 4)] * 4]
    assert [pack.env_task_indices for pack in made] == [(0, 0, 0, 0)] * 2
    assert made[0].seed == packs.stable_seed([(0, 0)] * 4)


def test_ralph_full_repeats_every_task_and_drops_none():
    made = packs.make_packs(make_tasks(5, 1), size=4, mode="ralph_full", pad_to_full=False)
    assert [members(pack) for pack in made] == [[(0, row)] * 4 for row in range(5)] + [[(1, 0)] * 4]
    assert [pack.env_task_indices for pack in made] == [
        (index,) * 4 for index in (0, 1, 2, 3, 0, 0)
    ]
    assert packs.num_dropped(make_tasks(5, 1), size=4, mode="ralph_full", pad_to_full=False) == 0


def test_a_pack_has_the_epoch_of_its_first_task():
    tasks = make_tasks(4)
    (whole,) = packs.make_packs(tasks, size=4, mode="cod", pad_to_full=True, epoch=2)
    assert whole.seed == packs.stable_seed(members(whole), epoch=2)
    (mixed,) = packs.make_packs(tasks, size=4, mode="cod", pad_to_full=True, epoch=(0, 0, 1, 1))
    assert mixed.seed == packs.stable_seed(members(mixed))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"packs\.size must be at least 1.*got 0"):
        packs.make_packs([], size=0, mode="cod", pad_to_full=True)
    with pytest.raises(ValueError, match=r"packs\.mode must be one of cod, ralph_sample.*'ralf'"):
        packs.make_packs([], size=4, mode="ralf", pad_to_full=True)
    assert packs.make_packs([], size=4, mode="cod", pad_to_full=True) == []


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    size=st.integers(1, 5),
    mode=st.sampled_from(list(PackMode)),
    pad_to_full=st.booleans(),
)
def test_every_task_is_in_a_pack_or_counted(counts, size, mode, pad_to_full):
    tasks = make_tasks(*counts)
    made = packs.make_packs(tasks, size=size, mode=mode, pad_to_full=pad_to_full)
    dropped = packs.num_dropped(tasks, size=size, mode=mode, pad_to_full=pad_to_full)
    assert all(len(pack.tasks) == len(pack.env_task_indices) == size for pack in made)
    assert all(len({task.taskset_id for task in pack.tasks}) == 1 for pack in made)
    assert len({pack.seed for pack in made}) == len(made)
    if mode is PackMode.RALPH_SAMPLE:
        regular = packs.make_packs(tasks, size=size, mode="cod", pad_to_full=pad_to_full)
        assert [pack.tasks[0] for pack in made] == [pack.tasks[0] for pack in regular]
    else:
        used = {member for pack in made for member in members(pack)}
        assert len(used) + dropped == len(tasks)


# The data cursor


def make_records(*counts):
    return {
        f"set{i}": [{"name": f"{i}/{row}"} for row in range(count)]
        for i, count in enumerate(counts)
    }


def draws(records, *, num_steps, tasks_per_step, seed=0):
    found = []
    for step in range(num_steps):
        drawn = packs.step_tasks(records, step=step, tasks_per_step=tasks_per_step, seed=seed)
        assert len(drawn.tasks) == len(drawn.epochs) == tasks_per_step
        found += zip(drawn.epochs, drawn.tasks, strict=True)
    return found


def test_a_task_carries_its_name_its_number_and_its_record():
    records = make_records(2, 3)
    for _, task in draws(records, num_steps=5, tasks_per_step=1):
        assert task.taskset == f"set{task.taskset_id}"
        assert task.record is records[task.taskset][task.index]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(any),
    tasks_per_step=st.integers(1, 11),
    seed=st.integers(0, 3),
)
def test_every_epoch_draws_every_row_once_and_in_the_order_of_its_task_set(
    counts, tasks_per_step, seed
):
    num_steps = -(-3 * sum(counts) // tasks_per_step)
    found = draws(
        make_records(*counts), num_steps=num_steps, tasks_per_step=tasks_per_step, seed=seed
    )
    rows = collections.defaultdict(list)
    for epoch, task in found:
        rows[epoch, task.taskset_id].append(task.index)
    assert [epoch for epoch, _ in found] == sorted(epoch for epoch, _ in found)
    for epoch in range(3):
        for taskset_id, count in enumerate(counts):
            assert rows[epoch, taskset_id] == list(range(count))


def test_the_steps_are_slices_of_one_list():
    records = make_records(5, 8)
    one_by_one = draws(records, num_steps=42, tasks_per_step=1)
    assert draws(records, num_steps=6, tasks_per_step=7) == one_by_one
    crossing = packs.step_tasks(records, step=1, tasks_per_step=7, seed=0)
    assert crossing.epochs == (0,) * 6 + (1,)


def test_the_order_mixes_task_sets_and_depends_on_seed_and_epoch():
    def ids(epoch, seed):
        drawn = packs.step_tasks(make_records(50, 50), step=epoch, tasks_per_step=100, seed=seed)
        return [task.taskset_id for task in drawn.tasks]

    assert ids(0, 0) == ids(0, 0)
    assert len({tuple(ids(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9
    assert 10 < sum(ids(0, 0)[:50]) < 40


def test_golden_order():
    # A resumed run, also with another NumPy, must go on with the same tasks. Made by this call.
    drawn = packs.step_tasks(make_records(3, 4), step=2, tasks_per_step=5, seed=7)
    found = [
        (epoch, task.taskset_id, task.index)
        for epoch, task in zip(drawn.epochs, drawn.tasks, strict=True)
    ]
    assert found == [(1, 1, 2), (1, 1, 3), (1, 0, 1), (1, 0, 2), (2, 1, 0)]


def test_no_two_packs_of_a_run_share_a_world():
    records = make_records(6)
    seeds = []
    for step in range(12):
        drawn = packs.step_tasks(records, step=step, tasks_per_step=8, seed=0)
        made = packs.make_packs(
            drawn.tasks, size=4, mode="cod", pad_to_full=True, epoch=drawn.epochs
        )
        seeds += [pack.seed for pack in made]
    assert len(seeds) == len(set(seeds)) == 24


def test_a_late_step_of_large_task_sets_is_cheap():
    records = {name: [{}] * 50_000 for name in "abc"}
    packs.step_tasks(records, step=4000, tasks_per_step=256, seed=0)
    start = time.perf_counter()
    for step in range(4001, 4101):
        packs.step_tasks(records, step=step, tasks_per_step=256, seed=0)
    # About 0.1 s; without its cache the cursor would take minutes.
    assert time.perf_counter() - start < 10.0


def test_bad_steps_are_refused():
    with pytest.raises(ValueError, match="have no rows"):
        packs.step_tasks({"a": []}, step=0, tasks_per_step=4, seed=0)
    with pytest.raises(ValueError, match="tasks_per_step 0"):
        packs.step_tasks(make_records(2), step=0, tasks_per_step=0, seed=0)
    with pytest.raises(ValueError, match="got step -1"):
        packs.step_tasks(make_records(2), step=-1, tasks_per_step=4, seed=0)

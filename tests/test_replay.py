"""Which rollout step is trained on next: priorities by hand, staleness, capacity, uses."""

import numpy as np
import pytest

from codjax import replay
from codjax.replay import Item, Replay, Rules


def item(step, version=None, uses=0):
    return Item(step=step, version=step if version is None else version, uses=uses, payload=[step])


def make(items=(), **changes):
    return Replay(Rules(**({"capacity": 4, "max_staleness": 3, "noise": 0.0} | changes)), items)


def steps(made):
    return [one.step for one in made.items]


@pytest.mark.parametrize(("update", "oldest"), [(1, 0), (20, 0), (21, 0), (22, 1), (100, 79)])
def test_the_oldest_version_is_that_of_the_specification(update, oldest):
    assert replay.oldest_version(update, max_staleness=20) == oldest


def test_the_newest_weights_are_served_first():
    made = make([item(0), item(2), item(1)])
    assert [made.draw(3)[0].step for _ in range(3)] == [2, 1, 0]
    assert made.draw(3) == (None, [])


def test_what_is_too_old_is_dropped_for_good():
    made = make([item(0, 0), item(1, 1), item(2, 2)], max_staleness=1)
    found, too_old = made.draw(4)  # of versions 2 and 3
    assert (found.step, [one.step for one in too_old]) == (2, [0, 1])
    assert made.draw(1) == (None, [])


def test_without_staleness_only_the_weights_of_now_count():
    made = make([item(4, 4), item(5, 5)], max_staleness=0)
    found, too_old = made.draw(6)
    assert (found.step, [one.step for one in too_old]) == (5, [4])


def test_a_full_queue_evicts_its_lowest_or_refuses_the_new_one():
    made = make([item(1), item(2)], capacity=2)
    assert made.put(item(3)).step == 1
    assert made.put(item(0)).step == 0
    assert steps(made) == [2, 3]


def test_a_used_item_waits_behind_and_is_used_up():
    made = make(max_uses=2, decay=2.0)
    made.put(item(5))
    first, _ = made.draw(6)
    assert made.put_back(first) is None
    made.put(item(4))  # 4 beats 5 - 2
    assert made.draw(6)[0].step == 4
    again, _ = made.draw(7)
    assert (again.step, again.uses) == (5, 1)
    made.put_back(again)
    assert steps(made) == []


def test_in_order_the_first_step_is_served_first():
    made = make([item(0), item(2), item(1)], in_order=True, noise=2.0)
    assert [made.draw(3)[0].step for _ in range(3)] == [0, 1, 2]


def test_other_processes_narrow_the_choice_and_age_it():
    made = make([item(4), item(5), item(6)], max_staleness=1)
    found, too_old = made.draw(6, {4: 4, 5: 3})  # of versions 4 and 5
    assert (found.step, found.version) == (4, 4)
    assert [one.step for one in too_old] == [5]
    assert steps(made) == [6]


def test_noise_is_drawn_once_per_insertion_and_survives_a_checkpoint():
    made = make([item(step, 0) for step in range(50)], capacity=50, noise=2.0, max_staleness=9)
    priorities = [made.priority(one) for one in made.items]
    assert np.std(priorities) == pytest.approx(2.0, rel=0.25)
    restored = make(made.items, capacity=50, noise=2.0, max_staleness=9)
    order = [made.draw(1)[0].step for _ in range(50)]
    assert order != sorted(order)
    assert [restored.draw(1)[0].step for _ in range(50)] == order
    again = made.priority(item(0, 0, uses=1)) - made.priority(item(0, 0))
    assert again != pytest.approx(-2.0)  # the decay alone


def test_neighbours_are_shuffled_and_the_far_are_not():
    made = make([item(step) for step in range(40)], capacity=40, noise=2.0, max_staleness=40)
    order = [made.draw(40)[0].step for _ in range(40)]
    assert order != sorted(order, reverse=True)
    assert np.abs(np.array(order) - np.arange(39, -1, -1)).max() < 12

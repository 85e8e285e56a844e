import io
import logging

import rich.console

from codjax import progress


def test_without_a_terminal_it_logs_sentences(caplog):
    now = [0.0]
    console = rich.console.Console(file=io.StringIO(), force_terminal=False)
    caplog.set_level(logging.INFO)
    with progress.Progress(
        "train", total=25, start=3, console=console, every=10, interval_s=60, clock=lambda: now[0]
    ) as bar:
        for step in range(4, 26):
            now[0] += 40 if step == 20 else 1
            if step == 20:
                now[0] += 60
            bar.update(step, "reward 0.1 → 0.2", step_s=2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "train: step 13 of 25, reward 0.1 → 0.2, 2.00 s/step, 0:00:24 left",  # ten steps
        "train: step 20 of 25, reward 0.1 → 0.2, 2.00 s/step, 0:00:10 left",  # a minute
        "train: step 25 of 25, reward 0.1 → 0.2, 2.00 s/step, 0:00:00 left",  # the end
    ]
    assert console.file.getvalue() == ""


def test_on_a_terminal_it_draws_one_line():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress.Progress("train", total=4, console=console) as bar:
        for step in (1, 2, 3, 4):
            bar.update(step, f"reward 0.1 → 0.{step}", step_s=0.5)
    drawn = console.file.getvalue()
    assert "4/4" in drawn
    assert "reward 0.1 → 0.4, 0.50 s/step, 0:00:00 left" in drawn


def test_reward_text_takes_first_and_last_position():
    metrics = {f"reward/position_{k}": k / 10 for k in range(11)} | {"reward/lake/position_12": 9.0}
    assert progress.reward_text(metrics) == "reward 0.000 → 1.000"
    assert progress.reward_text({}) == "no reward"

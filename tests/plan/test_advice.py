"""Which changes are tried for a config that does not fit, and in what order."""

import pytest

from codjax import config_files
from codjax.checks import ConfigError
from codjax.plan import advice

MESH = {"data": 2, "fsdp": 2, "context": 1, "tensor": 1, "expert": 1}
GIB = 2**30


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "large.py"
    path.write_text(
        "from codjax.config import default_config, taskset\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.tokenizer.source = 'builtin:bytes'\n"
        "    config.tasksets.lake = taskset(env='frozen_lake_obscure', split='train')\n"
        "    config.rollout.tasksets = ('lake',)\n"
        "    config.model.remat = 'none'\n"
        "    config.mesh.data = config.mesh.fsdp = 2\n"
        "    config.batching.row_length = 16384\n"
        "    config.batching.scored_per_row = 2000\n"
        "    config.batching.rows_per_microbatch = 8\n"
        "    return config\n"
    )
    return config_files.load(str(path))


def search(config, needs, *, state=lambda config: 0):
    """The search on a machine where a config takes `needs(config)` GiB of 16."""
    asked = []

    def make_plan(changed):
        total = needs(changed)
        asked.append(total)
        step = {"total_bytes": total and total * GIB, "refused": None if total else "too large"}
        return {"fits": total is not None and total <= 16, "programs": {"accumulate": step}}

    plan = {"mesh": MESH, "chip": {"usable_bytes": 16 * GIB}}
    return advice.search(config, plan, make_plan, state), asked


def test_what_costs_only_time_comes_first(config):
    found, asked = search(config, lambda c: 10 if c.model.remat == "full" else 20)
    assert found["overrides"] == {"model.remat": "full"}
    assert found["total_bytes"] == 10 * GIB
    assert asked == [10]
    assert advice.as_typed(found["overrides"]) == "--config.model.remat=full"


def test_a_single_change_is_preferred_to_two(config):
    found, _ = search(config, lambda c: 10 if c.optimizer.momentum_dtype == "bfloat16" else 20)
    assert found["overrides"] == {"optimizer.momentum_dtype": "bfloat16"}
    assert [tried["overrides"] for tried in found["tried"]] == [
        {"model.remat": "full"},
        {"batching.rows_per_microbatch": 4},
        {"mesh.data": 1, "mesh.fsdp": 4},
        {"mesh.data": 1, "mesh.tensor": 2, "batching.rows_per_microbatch": 4},
        {"mesh.data": 1, "mesh.context": 2, "batching.rows_per_microbatch": 4},
        {"optimizer.momentum_dtype": "bfloat16"},
    ]


def test_a_factored_second_moment_is_the_last_to_be_tried(config):
    found, _ = search(config, lambda c: 10 if c.optimizer.second_moment == "factored" else 20)
    assert found["overrides"] == {"optimizer.second_moment": "factored"}
    assert found["tried"][-2]["overrides"] == {"optimizer.momentum_dtype": "bfloat16"}


def test_changes_are_added_up_where_one_is_not_enough(config):
    def needs(c):
        return 22 - 5 * (c.model.remat == "full") - 2 * (c.batching.rows_per_microbatch == 4)

    found, _ = search(config, needs)
    assert found["overrides"] == {"model.remat": "full", "batching.rows_per_microbatch": 4}


def test_a_state_that_is_too_large_is_not_compiled(config):
    def state(c):
        return 17 * GIB if c.mesh.data == 2 else 0

    found, asked = search(config, lambda c: 10, state=state)
    assert found["overrides"] == {"mesh.data": 1, "mesh.fsdp": 4}
    assert asked == [10]
    assert found["tried"][0]["why"] == f"state alone takes {17 * GIB} bytes"


def test_what_the_compiler_or_the_config_refuses_is_told(config):
    def needs(c):
        if c.mesh.fsdp == 4:
            raise ConfigError("mesh: axis 'embed' of size 6 must divide")

    found, asked = search(config, needs)
    assert found["overrides"] is None
    assert len(asked) <= 10
    whys = [tried["why"] for tried in found["tried"]]
    assert "too large" in whys
    assert "mesh: axis 'embed' of size 6 must divide" in whys

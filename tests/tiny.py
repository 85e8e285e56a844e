"""The quickstart, shrunk: a config file for tests, in this process or in another.

    config = config_files.load("tests/tiny.py")
    python -m codjax train --config=tests/tiny.py --workdir=…

A start takes seconds, a step a fraction of one. The warm-up is long enough for a part of the
answers to be readable, so that rewards, hints and advantages are not all zero.
"""

import pathlib

from codjax import config_files
from codjax.config import evaluation

QUICKSTART = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"


def get_config():
    config = config_files.load(str(QUICKSTART))
    config.num_steps = 5

    config.model.num_layers = 1
    config.model.hidden_size = 16
    config.model.intermediate_size = 32
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.head_dim = 8

    config.packs.size = 3
    config.rollout.tasks_per_step = 6  # 2 packs
    config.rollout.group_size = 2
    config.engine.num_slots = 4
    config.engine.prefill_rows = 4
    config.batching.row_length = 64
    config.batching.scored_per_row = 128
    config.batching.rows_per_microbatch = 8  # of the 8 virtual devices

    config.warmup.num_steps = 200
    config.warmup.batch_episodes = 16
    config.warmup.num_demos = 256
    config.warmup.optimizer.learning_rate = 1e-2
    config.warmup.optimizer.warmup_steps = 0
    config.warmup.optimizer.schedule = "constant"

    config.checkpoint.every_steps = 1
    config.checkpoint.keep = 100
    config.metrics.packs_every_steps = 2
    config.metrics.tensorboard = False

    matrix = config.evaluation.matrix
    for entry in matrix.values():
        entry.pack_size, entry.num_packs = 3, 6
    with matrix.unlocked():
        for mode in ("ralph_sample", "ralph_full"):
            matrix[mode] = evaluation(taskset="lake_test", mode=mode, pack_size=3, num_packs=6)
    return config

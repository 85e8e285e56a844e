"""Qwen3-32B on FrozenLake-Obscure: the class of the published 27B runs, as far as it is built.

Those train a 27B model on three science environments, which codjax does not have yet, with longer
samples. This has their size of model and their limits (prompts of 22,000 tokens and responses of
4,000, of which the model is told; 10 steps of warm-up) on the tasks of
configs/frozen_lake_qwen3_8b.py.

    codjax plan  --config=configs/frozen_lake_qwen3_32b.py --topology=v5p:4x4x4
    codjax train --config=configs/frozen_lake_qwen3_32b.py --workdir=runs/lake_32b \\
        --config.model.source=DIR/Qwen3-32B --config.tokenizer.source=DIR/Qwen3-32B

Hardware: v5p:4x4x4 for the learner (docs/plans.md); a larger slice cuts it finer along `fsdp` and
needs batching.rows_per_microbatch to be a multiple of that. Rollouts are for servers beside it.
"""

import pathlib

from codjax import config_files, shapes


def get_config():
    base = pathlib.Path(__file__).with_name("frozen_lake_qwen3_8b.py")
    config = config_files.load(str(base))
    config.model.update(shapes.QWEN3_32B)
    config.rollout.max_prompt_tokens = 22000
    config.rollout.max_response_tokens = 4000
    config.rollout.response_length_request = 4000
    config.engine.max_tokens = 26000
    config.optimizer.warmup_steps = 10
    config.batching.row_length = 32768
    config.batching.scored_per_row = 8192
    config.batching.rows_per_microbatch = 16
    return config

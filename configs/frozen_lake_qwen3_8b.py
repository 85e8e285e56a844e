"""CoD training of Qwen3-8B on FrozenLake-Obscure: the published run (arXiv:2606.20002).

Packs of 4 tasks, 8 packs a step, 8 runs of each, one epoch of 50,000 tasks; AdamW at 1e-6,
one-sided clip, adaptive re-weighting (RED), no KL. Evaluated on packs of 8 harder boards (6 x 6 and
7 x 7).
The published run had 24 GPUs, up to 20 steps of staleness and a sync of weights every 4 steps; here
rollouts run one step ahead and get new weights every step. Its evaluation allowed prompts of 30,000
tokens, here they end where those of training do.

    codjax plan  --config=configs/frozen_lake_qwen3_8b.py --topology=v5e:16x16
    codjax train --config=configs/frozen_lake_qwen3_8b.py --workdir=runs/lake_8b \\
        --config.model.source=DIR/Qwen3-8B --config.tokenizer.source=DIR/Qwen3-8B

Hardware: v5e:16x16, v6e:16x16 or v5p:4x4x4 hold the learner; docs/plans.md says what a step takes
on each. Rollouts of this size are for servers beside it: sampling in process needs the whole model
and a cache on a device of every host, and a run without that room ends at its start, saying so.

The sizes below let it be planned without the folder of the model, and are not read once
`model.source` is given; without it, weights are random and the tokenizer knows bytes only.
"""

from codjax import shapes
from codjax.config import default_config, evaluation, taskset


def get_config():
    config = default_config()
    config.num_steps = 1562  # 50,000 tasks, 32 a step

    config.model.update(shapes.QWEN3_8B)
    config.tokenizer.source = "builtin:bytes"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 4

    config.tasksets.lake = taskset(env="frozen_lake_obscure", split="train")
    config.tasksets.lake_hard = taskset(
        env="frozen_lake_obscure",
        split="test",
        data={"min_size": 6, "max_size": 7},
        settings={"map_path_bound": 8, "agent_max_steps": 10},
    )
    config.rollout.tasksets = ("lake",)
    config.rollout.response_length_request = 1000
    config.rollout.max_staleness = 1

    config.batching.row_length = 16384  # one sample is at most 12,000
    config.batching.scored_per_row = 4096  # of 12,000 tokens, at most 2,000 were sampled
    config.batching.rows_per_microbatch = 64

    config.checkpoint.every_steps = 100
    config.evaluation.matrix.lake_hard = evaluation(taskset="lake_hard", num_packs=500)
    return config

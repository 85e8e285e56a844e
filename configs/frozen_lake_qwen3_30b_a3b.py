"""Qwen3-30B-A3B, 128 experts of which 8 run, on the tasks of configs/frozen_lake_qwen3_8b.py.

Nobody has published such a run: it is the recipe of the 8B model with a mixture of experts, cut
over `mesh.expert`. Optimizer, credit and rollouts are the base's.

    codjax plan  --config=configs/frozen_lake_qwen3_30b_a3b.py --topology=v5p:4x4x4

Hardware: the learner's step takes what docs/plans.md says on v5p:4x4x4. The rollouts of this size
are for servers: no device holds the learner's share and a whole copy of the weights.
"""

import pathlib

from codjax import config_files, shapes


def get_config():
    base = pathlib.Path(__file__).with_name("frozen_lake_qwen3_8b.py")
    config = config_files.load(str(base))
    config.model.update(shapes.QWEN3_30B_A3B)
    config.mesh.tensor = 1
    config.mesh.expert = 2  # more parts hold more of each other's pairs: docs/models.md
    return config

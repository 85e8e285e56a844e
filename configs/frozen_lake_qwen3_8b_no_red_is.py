"""Ablation of configs/frozen_lake_qwen3_8b.py: no RED, and importance weights in the policy loss.

The second of the published ablations, which adds importance sampling to the first; on
FrozenLake-Obscure as configs/frozen_lake_qwen3_8b_no_red.py.

    codjax plan --config=configs/frozen_lake_qwen3_8b_no_red_is.py --topology=v5e:16x16
"""

import pathlib

from codjax import config_files


def get_config():
    base = pathlib.Path(__file__).with_name("frozen_lake_qwen3_8b_no_red.py")
    config = config_files.load(str(base))
    config.loss.weight_mode = "importance"
    return config

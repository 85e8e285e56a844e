"""Ablation of configs/frozen_lake_qwen3_8b.py: scores of the samples are not re-weighted (no RED).

Published on the Alchemy environment; here on FrozenLake-Obscure, with the base's hardware, command
and notes.

    codjax plan --config=configs/frozen_lake_qwen3_8b_no_red.py --topology=v5e:16x16
"""

import pathlib

from codjax import config_files


def get_config():
    base = pathlib.Path(__file__).with_name("frozen_lake_qwen3_8b.py")
    config = config_files.load(str(base))
    config.credit.reweight = "off"
    return config

"""Qwen3-8B on FrozenLake-Obscure as published, with rollouts on SGLang servers beside the learner.

As `frozen_lake_qwen3_8b.py`, but samples come from servers on GPUs, up to 20 updates old as in the
published run (arXiv:2606.20002), and new weights reach answers that are under way. The published
trainer pushed weights every 4 steps, with what was in flight finished first.

On one machine with 8 GPUs, four for the learner and one for each of four servers that the run
starts itself (docs/servers.md has this for several machines):

    CUDA_VISIBLE_DEVICES=0,1,2,3 codjax train --config=configs/frozen_lake_qwen3_8b_servers.py \\
        --workdir=runs/lake_8b --config.model.source=DIR/Qwen3-8B \\
        --config.tokenizer.source=DIR/Qwen3-8B --config.server.weights_folder=/dev/shm/lake_8b

With servers that run already, on other machines: --config.server.urls="('http://10.0.0.2:30000',)".
Nothing of this size has run: no GPU was at hand.
"""

import pathlib

from codjax import config_files

BASE = pathlib.Path(__file__).parent / "frozen_lake_qwen3_8b.py"


def get_config():
    config = config_files.load(str(BASE))
    config.rollout.sampler = "sglang"
    config.rollout.max_staleness = 20
    config.rollout.in_flight_updates = True
    config.server.local.num = 4
    config.server.local.first_gpu = 4
    # SGLang lives in an environment of its own (docs/servers.md).
    config.server.local.arguments = (
        "--skip-tokenizer-init",
        "--mem-fraction-static=0.85",
        "--context-length=12288",
    )
    return config

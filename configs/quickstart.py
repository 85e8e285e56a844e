"""First light: an agent that learns to learn, from scratch, on two CPU cores, in a few minutes.

The compact FrozenLake (docs/quickstart.md): four keys move a player on a 4 x 4 board; which key
goes where is hidden and stays the same for the four tasks of a pack. After each task the agent
writes a note of a few characters, and the note is all it carries on. A model of 57,000 parameters
first imitates a sloppy scripted player (70 % of its notes are noise), after which reward hardly
rises with the position in the pack; CoD training makes it rise.

    codjax train --config=configs/quickstart.py --workdir=runs/quickstart
    codjax eval  --config=configs/quickstart.py --workdir=runs/quickstart

or both, with the report: bash scripts/quickstart.sh
"""

from codjax.config import default_config, evaluation, taskset


def get_config():
    config = default_config()
    config.num_steps = 300

    config.tokenizer.source = "builtin:symbols"
    config.model.num_layers = 2
    config.model.hidden_size = 48
    config.model.intermediate_size = 128
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 12
    config.model.rope_theta = 1e4  # texts of 30 tokens
    config.model.tie_embeddings = False
    config.model.embedding_std = 0.5  # with 0.02, reading the note is learned far later
    config.model.dtype = "float32"  # two cores have no use for bfloat16
    config.model.remat = "none"

    config.tasksets.lake = taskset(env="frozen_lake_compact", split="train")
    config.tasksets.lake_test = taskset(
        env="frozen_lake_compact", split="test", data={"num_test": 8192}
    )
    config.rollout.tasksets = ("lake",)
    config.rollout.prompt_style = "compact"
    config.rollout.tasks_per_step = 64  # 16 packs of 4
    config.rollout.group_size = 8
    config.rollout.max_response_tokens = 12  # "<aUbDcLdR>" and its end, and one to spare
    config.rollout.max_prompt_tokens = 32
    config.rollout.include_final_observation = True  # what the second press did
    config.rollout.length_penalty.coef = 0.0  # a task has two presses; there is nothing to save
    config.rollout.max_staleness = 0

    config.engine.num_slots = 128  # all runs of a step
    config.engine.max_tokens = 48
    config.engine.prefill_chunks = (8, 16)
    config.engine.prefill_rows = 128
    config.engine.decode_steps = 8
    config.engine.min_shared_prefix = 64  # copying is dearer than computing at this size

    config.loss.entropy_coef = 0.005  # 0 works as well; 0.02 drowns the reward in noise
    config.optimizer.learning_rate = 1e-3  # 3e-3 forgets how to read before it learns to write
    config.optimizer.b2 = 0.98
    config.batching.row_length = 128
    config.batching.scored_per_row = 256  # runs that agree share tokens, but each has its entries
    config.batching.rows_per_microbatch = 16

    config.warmup.num_steps = 2500
    config.warmup.optimizer.warmup_steps = 50
    config.warmup.optimizer.schedule = "cosine"
    config.checkpoint.every_steps = 50

    none = {"taskset": "lake_test", "pack_size": 4, "num_packs": 2048}
    config.evaluation.matrix.lake = evaluation(**none)
    config.evaluation.matrix.hint_blanked = evaluation(**none, condition="hint_blanked")
    config.evaluation.matrix.hint_swapped = evaluation(**none, condition="hint_swapped")
    return config

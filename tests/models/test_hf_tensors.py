"""Parameters on the devices → named tensors on the host → a folder that is the same model."""

import jax
import numpy as np
import pytest
from flax import nnx

from codjax import models, sharding
from codjax.models import hf_tensors
from codjax.rollout.sglang import weights
from tests import converting, small

MODELS = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "biases": {"family": "qwen2"},
    "experts": {
        "family": "qwen3_moe",
        "num_experts": 4,
        "experts_per_token": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("case", MODELS)
def test_the_tensors_are_those_of_a_folder(case, tmp_path):
    model = converting.random_model(small.decoder_config(**MODELS[case]))
    models.save_pretrained(model, tmp_path)
    wanted = converting.tensors_in(tmp_path)
    found = dict(hf_tensors.tensors(model.config, params_of(model), "float32"))
    assert list(found) == list(hf_tensors.layouts(model.config, "float32"))
    assert ("lm_head.weight" in found) == (case != "tied")
    assert {
        name: (str(array.dtype), array.shape, array.tobytes()) for name, array in found.items()
    } == wanted


def test_they_are_cast_to_what_the_server_has():
    model = converting.random_model(small.decoder_config())
    layouts = hf_tensors.layouts(model.config, "bfloat16")
    for name, array in hf_tensors.tensors(model.config, params_of(model), "bfloat16"):
        assert (array.dtype, array.shape) == layouts[name]


def test_of_a_sharded_model_they_are_gathered():
    model = converting.random_model(small.decoder_config(tie_embeddings=True))
    whole = dict(hf_tensors.tensors(model.config, params_of(model), "float32"))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params_of(model), sharding.param_shardings(model, mesh))
    assert not params["embedding"].is_fully_replicated
    for name, array in hf_tensors.tensors(model.config, params, "float32"):
        np.testing.assert_array_equal(array, whole[name])


def test_a_staged_folder_is_the_model(tmp_path):
    model = converting.random_model(small.decoder_config())
    tokens = np.asarray([[3, 1, 4, 1, 5, 9]])
    logprobs = np.asarray(models.score(model, tokens))[0]
    made = weights.NamedWeights(
        run_id="run",
        policy_version=2,
        layouts=hf_tensors.layouts(model.config, "float32"),
        tensors=hf_tensors.tensors(model.config, params_of(model), "float32"),
        config=model.config.to_hf(),
        probe=weights.Probe(tokens=tokens[0], logprobs=logprobs),
    )
    folder = weights.stage_folder(made, folder=tmp_path, max_shard_bytes=4000).folder
    again = models.from_pretrained(folder)
    np.testing.assert_array_equal(np.asarray(models.score(again, tokens))[0], logprobs)

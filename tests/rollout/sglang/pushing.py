"""Weights of a model of two tensors, for tests of pushing."""

import numpy as np

from codjax.rollout.sglang import weights
from tests.rollout.sglang import push_server

F32 = np.dtype(np.float32)
LAYOUTS = {"model.embed_tokens.weight": (F32, (5, 2)), "lm_head.weight": (F32, (5, 2))}
CONFIG = {"tie_word_embeddings": False, "vocab_size": 5}
TOKENS = np.asarray([1, 4, 0], np.int32)


def tensors_of(value):
    return {
        name: np.full(shape, value + place, dtype)
        for place, (name, (dtype, shape)) in enumerate(LAYOUTS.items())
    }


def make(policy_version=1, **changes):
    """Weights full of the version's number; the probe is what the scripted server's model says."""
    tensors = tensors_of(policy_version)
    made = {
        "run_id": "run",
        "policy_version": policy_version,
        "layouts": LAYOUTS,
        "tensors": tensors.items(),
        "config": CONFIG,
        "probe": weights.Probe(tokens=TOKENS, logprobs=push_server.logprobs_of(tensors, TOKENS)),
    }
    return weights.NamedWeights(**(made | changes))

"""Tiny models of every family, as a published `config.json` spells them, and weights for them."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from codjax import models

_SIZES = {
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
}
# What the families differ in, and both spellings of the rotary settings, with bases that are not
# the default. Texts of 24 tokens turn by several radians.
CASES = {
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 12,
        "rope_theta": 7000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 2,
    },
    "qwen3_bias": {
        "model_type": "qwen3",
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "attention_bias": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "sliding_window": 16,  # not used, as it says
        "use_sliding_window": False,
        "max_window_layers": 1,
    },
    "llama3_scaled": {
        "model_type": "llama",
        "head_dim": 12,
        "rope_theta": 5e3,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    "llama_biases": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 9e3, "factor": 3.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm2": {
        "model_type": "llama",
        "rope_theta": 1e5,
        "rope_interleaved": False,
        "is_llama_config": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "rope_theta": 1e6,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    },
    "qwen3_moe_raw_weights": {
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "rope_theta": 1e4,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}
NUM_NEW = 8


def fields_of(name):
    return _SIZES | CASES[name]


def tokens_of(num_rows, num_tokens):
    rng = np.random.RandomState(0)  # legacy: its stream never changes
    return rng.randint(0, _SIZES["vocab_size"], (num_rows, num_tokens)).astype(np.int32)


def write_folder(folder, fields, shapes):
    """A Hugging Face folder whose weights follow from the names of the tensors."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        around = 1.0 if name.endswith("norm.weight") else 0.0
        tensors[name] = (around + 0.3 * rng.normal(size=shape)).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))


def greedy(model, prompt, num_new):
    """The likeliest continuation of every row, sampled with the KV cache."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(params, cache, tokens, start):
        model = nnx.merge(graphdef, params)
        hidden, cache = models.extend(model, cache, tokens, start)
        logits = hidden[:, -1] @ model.unembedding.T
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    num_rows, length = prompt.shape
    cache = models.init_cache(model.config, num_rows, length + num_new)
    token, cache = step(params, cache, prompt, jnp.zeros(num_rows, jnp.int32))
    found = [token]
    for index in range(length, length + num_new - 1):
        token, cache = step(params, cache, token[:, None], jnp.full(num_rows, index))
        found.append(token)
    return np.stack(found, axis=1)

"""Models that are large enough to go wrong and small enough to compile at once."""

from codjax import models


def decoder_config(**changes):
    """Two layers, grouped queries, untied, float32; weights far from zero, so that errors show."""
    config = {
        "vocab_size": 24,
        "num_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "init_std": 0.3,
        "embedding_std": 0.5,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": "none",
    }
    return models.DecoderConfig(**(config | changes))

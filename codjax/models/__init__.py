"""The Flax decoder: one file per family, its cache for decoding, published weights.

model = models.from_pretrained("/path/to/Qwen3-0.6B", dtype="bfloat16")
model = models.init(DecoderConfig(…), seed=0)
models.score(model, token_ids)                    # log-prob of each next token
"""

from codjax.models.cache import KVCache, extend, init_cache
from codjax.models.config import DecoderConfig, RopeScaling
from codjax.models.decoder import Decoder, init, logical_axes
from codjax.models.scoring import score, score_rows
from codjax.models.weights import from_pretrained, read_config, save_pretrained

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "RopeScaling",
    "extend",
    "from_pretrained",
    "init",
    "init_cache",
    "logical_axes",
    "read_config",
    "save_pretrained",
    "score",
    "score_rows",
]

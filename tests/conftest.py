"""Eight virtual CPU devices, strict ranks and checked shapes for every test.

Also keeps transformers from asking the network for anything.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Shape annotations of the mathematics are checked while tests run.
install_import_hook(
    [
        "codjax.credit",
        "codjax.masked",
        "codjax.losses",
        "codjax.batching",
        "codjax.logprobs",
        "codjax_kernels",
    ],
    "beartype.beartype",
)

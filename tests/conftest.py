"""Eight virtual CPU devices, strict ranks and checked shapes for every test.

Also keeps transformers from asking the network for anything, and compiles equal programs once:
tests start many small runs of the same shapes, in this process, in others and in subprocesses.
"""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the processes of pytest -n inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="codjax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
# With the scheduler's default order, devices may wait for each other in different collectives of
# one program, for ever.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    )
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")

# Shape annotations of the mathematics are checked while tests run.
install_import_hook(
    [
        "codjax.credit",
        "codjax.scoring",
        "codjax.masked",
        "codjax.losses",
        "codjax.batching",
        "codjax.logprobs",
        "codjax_kernels",
    ],
    "beartype.beartype",
)

# Two cores, shared: how long an example takes says nothing.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

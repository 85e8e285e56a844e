"""The passes of `token_logprobs` as Pallas kernels for TPUs."""

from __future__ import annotations

import functools

from codjax_kernels.records import LogprobPasses
from codjax_kernels.tpu.launch import Interpret
from codjax_kernels.tpu.logprobs_backward import gradients, table_gradient
from codjax_kernels.tpu.logprobs_forward import (
    statistics,
    statistics_and_mean,
    stored_statistics,
)
from codjax_kernels.tpu.logprobs_kl import kl_gradients, kl_statistics
from codjax_kernels.tpu.logprobs_stored import stored_gradients

STORED_ROWS = 1024


@functools.cache
def passes(interpret: Interpret) -> LogprobPasses:
    """The passes, compiled for the chip at hand or interpreted."""
    return LogprobPasses(
        statistics=functools.partial(statistics, interpret=interpret),
        statistics_and_mean=functools.partial(statistics_and_mean, interpret=interpret),
        gradients=functools.partial(gradients, interpret=interpret),
        table_gradient=functools.partial(table_gradient, interpret=interpret),
        stored_statistics=functools.partial(stored_statistics, interpret=interpret),
        stored_gradients=functools.partial(stored_gradients, interpret=interpret),
        block_rows=STORED_ROWS,
        kl_statistics=functools.partial(kl_statistics, interpret=interpret),
        kl_gradients=functools.partial(kl_gradients, interpret=interpret),
    )

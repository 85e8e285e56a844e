"""The passes of `token_logprobs` as Pallas kernels for TPUs: forward, backward, stored, divergence.

With hidden states h `[K D]`, a table W `[V D]` and logits z = h . W (times an inverse temperature
for each row), in matrix products of K D V multiply-adds:

    pass                  products  kept in vector memory        written
    statistics                   1  running sums of a row block  3 numbers a row
    statistics_and_mean          2  and sum_v p_v W_v            and it, [K D]
    hidden gradient              2  sum_v dz_v W_v               [K D]
    table gradient               2  sum_k dz_v h_k               [V D]
    stored_statistics            1  running sums                 and the logits, float32 [V K]
    stored_gradients             2  both sums                    [K D], and added to [V D]

So a training step costs 4 products when the mean row is kept (`statistics_and_mean`, then
`table_gradient`), 5 when the entropy has a gradient (`statistics`, then `gradients`), and 3 when
the gradient is made in the forward pass (`stored_…`). The first two keep no logit; the third keeps
those of `STORED_ROWS` rows.

Roofline. A block of r rows that a table passes by does 2 r operations for each of its 2-byte
elements and product: with 512 rows that is above what v5e and v5p can compute for each byte that
their main memory delivers (240 and 166), with 1,024 above v6e (560) and TPU7x (313), so that the
matrix units are the bound. The vector units need 8 to 12 operations a logit; the matrix units take
D / 65,536 cycles for it on v5e and D / 262,144 on v6e and TPU7x, so that at D 1,024 they hide them
on v5e and barely on the others. Hence tiles laid out vocabulary by rows (`tiles.py`), pieces whose
products overlap the vector work on the piece before, and no masks but at the table's end.

Speeds are what the TPU compiler simulates (`codjax bench kernels`; docs/benchmarks.md has the
table). No TPU has run these kernels.

Not supported: a logit soft cap. `shard_map` around a pass needs ``check_vma=False``.
"""

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

# Rows whose logits are kept at once, 4 V bytes each: float32 sums of the table's gradient are read
# and written once for so many, which on v5e takes a third of the time of the matrix units.
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

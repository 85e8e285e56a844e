"""The two expensive operations of training on token forests, each behind one signature.

* `token_logprobs`: vocabulary projection, log-softmax and gather in one, without the logits;
  `scored_logprobs` for the entries of rows, `scored_loss` and `token_loss` for losses whose
  gradient is made in the forward pass.
* `forest_attention`: attention in which a token sees its ancestors of a prefix forest.

And `embedding_lookup`, which is cheap on one device and needs care on many.

`ops.py` holds the public functions, `dispatch.py` the table of implementations: `xla/` runs
everywhere, `tpu/` and `gpu/` hold Pallas kernels. `logprobs.py` and `in_forward.py` hold the
mathematics that implementations share, `reference.py` the oracles of tests and benchmarks. The
package imports jax, jaxtyping and numpy only, and may be used without codjax.
"""

from codjax_kernels.dispatch import (
    IMPLEMENTATIONS,
    has_gradient_in_forward,
    implementation_of,
    why_not,
)
from codjax_kernels.lookup import embedding_lookup
from codjax_kernels.ops import (
    forest_attention,
    scored_logprobs,
    scored_loss,
    token_kl,
    token_logprobs,
    token_loss,
)
from codjax_kernels.records import Layout

__all__ = [
    "IMPLEMENTATIONS",
    "Layout",
    "embedding_lookup",
    "forest_attention",
    "has_gradient_in_forward",
    "implementation_of",
    "scored_logprobs",
    "scored_loss",
    "token_kl",
    "token_logprobs",
    "token_loss",
    "why_not",
]

"""The two expensive operations of training on token forests, each behind one signature.

* `token_logprobs`: vocabulary projection, log-softmax and gather in one, without the logits.
* `forest_attention`: attention in which a token sees its ancestors of a prefix forest.

`ops.py` holds the public functions and, in one table, which implementation runs where; `xla.py`
the implementation that runs everywhere; `reference.py` the oracles of tests and benchmarks. The
package imports jax, jaxtyping and numpy only, and may be used without codjax.
"""

from codjax_kernels.ops import forest_attention, token_logprobs

__all__ = ["forest_attention", "token_logprobs"]

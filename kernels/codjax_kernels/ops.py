"""The public operations, and the table that says which implementation runs.

Shapes, in the letters of codjax: `K` scored entries, `D` model width, `V` vocabulary, `B` rows,
`T` tokens in a row, `N` query heads, `M` key-value heads, `H` head size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codjax_kernels import xla

AnyArray = Array | np.ndarray

# name → (token_logprobs, forest_attention); what None stands for on a platform is in `_choose`.
IMPLEMENTATIONS: dict[str, tuple[Callable[..., tuple[Array, Array]], Callable[..., Array]]] = {
    "xla": (xla.token_logprobs, xla.forest_attention),
}


def token_logprobs(  # noqa: PLR0917 - the order is public
    hidden: Float[AnyArray, "K D"],
    unembedding: Float[AnyArray, "V D"],
    targets: Int[AnyArray, " K"],
    temperature: float | int | Float[AnyArray, ""] | Float[AnyArray, " K"] = 1.0,
    implementation: str | None = None,
    interpret: bool = False,
    *,
    chunk_size: int = 512,
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Log-probability of each target and entropy of the distribution that it was drawn from.

    Logits are ``hidden @ unembedding.T / temperature``. They never exist for more than
    `chunk_size` entries at once, forward or backward: the backward pass computes them again from
    the saved log-normaliser. Gradients flow to `hidden` and `unembedding`, from the log-prob and
    from the entropy; products accumulate in float32 and the gradient of a bfloat16
    `unembedding` is rounded once, after all entries are summed.

    Args:
        hidden: hidden states that predict, float32 or bfloat16.
        unembedding: output table, one row a token id, of the same dtype as `hidden`.
        targets: token ids; one outside of `[0, V)` is read as 0, so that padding is harmless.
        temperature: what the logits are divided by, one for all or one an entry; above 0.
            It is a constant: no gradient flows to it.
        implementation: None (by platform) or a name; today only "xla".
        interpret: run a Pallas kernel in the interpreter.
        chunk_size: entries whose logits exist at once, over all devices together; at least 1.
            Small problems (xla.SINGLE_CHUNK_LOGITS) are done in one chunk.

    Returns:
        Natural log-probabilities, never above 0, and entropies in nats, never below 0; float32.

    Raises:
        ValueError: unknown implementation, or shapes that do not fit together.
    """
    run = _choose(implementation, interpret=interpret)[0]
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    if hidden.shape[1:] != unembedding.shape[1:] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "token_logprobs takes hidden [K D], unembedding [V D] and targets [K]; got "
            f"{hidden.shape}, {unembedding.shape} and {targets.shape}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    return run(
        hidden,
        unembedding,
        jnp.asarray(targets, jnp.int32),
        jax.lax.stop_gradient(temperatures),
        chunk_size=chunk_size,
    )


def forest_attention(  # noqa: PLR0917 - the order is public
    q: Float[AnyArray, "B T N H"],
    k: Float[AnyArray, "B T M H"],
    v: Float[AnyArray, "B T M H"],
    subtree_end: Int[AnyArray, "B T"],
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Softmax attention of every token over itself and its ancestors in the row's forest.

    Tokens of a row stand in depth-first order, so that token `i` sees token `j` iff
    ``j <= i < subtree_end[j]``. Query head `n` reads key-value head ``n // (N // M)``. Scores are
    scaled by ``1 / sqrt(H)``; the softmax is float32.

    Args:
        q: queries, float32 or bfloat16; M divides N.
        k: keys, of the same dtype.
        v: values, of the same dtype.
        subtree_end: index one past the last descendant, above the token's own index; a token
            that sees nothing, which no forest has, gets finite nonsense.
        implementation: None (by platform) or a name; today only "xla".
        interpret: run a Pallas kernel in the interpreter.

    Returns:
        One weighted mean of values per query, in the dtype of `q`.

    Raises:
        ValueError: unknown implementation, or shapes that do not fit together.
    """
    run = _choose(implementation, interpret=interpret)[1]
    rows, num_tokens, num_heads, head_dim = q.shape
    fits = k.shape == v.shape == (rows, num_tokens, k.shape[2], head_dim)
    if not fits or num_heads % k.shape[2] or subtree_end.shape != (rows, num_tokens):
        raise ValueError(
            "forest_attention takes q [B T N H], k and v [B T M H] with M dividing N, and "
            f"subtree_end [B T]; got {q.shape}, {k.shape}, {v.shape} and {subtree_end.shape}."
        )
    return run(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(subtree_end, jnp.int32))


def _choose(
    implementation: str | None, *, interpret: bool
) -> tuple[Callable[..., tuple[Array, Array]], Callable[..., Array]]:
    """The functions of an implementation; None is "xla" on every platform today."""
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {name!r} is not available; this version has "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}."
        )
    if interpret and name == "xla":
        raise ValueError(
            "interpret=True applies to Pallas kernels only; leave it out for implementation 'xla'."
        )
    return IMPLEMENTATIONS[name]

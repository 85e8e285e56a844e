"""Operations of a micro-batch, counted from the model itself.

XLA's own count takes the body of a loop once and a Pallas kernel for nothing. Here the matrix
products of the layers are those of the traced model, whatever its family, with the lengths of
its scans multiplied out; attention and the loss head, which are kernels, are counted by formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from codjax import models

# Matrix products over the pairs of queries and keys: forward scores and values; backward, for each
# of the two its two gradients. The kernels make the scores again, in each of two passes.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS, _KERNEL_BACKWARD_PRODUCTS = 2, 4, 7


class Work(NamedTuple):
    """What a micro-batch holds; full rows, every scored entry used."""

    rows: int
    row_length: int  # T
    scored_per_row: int  # K
    sample_length: int  # a row is taken to hold samples of this length, or one of T if shorter
    head_in_forward: bool  # gradients of the loss head are made in the forward pass


def operations(model: models.Decoder, work: Work) -> dict[str, float]:
    """Floating-point operations of a micro-batch on all devices together.

    Returns:
        "model": forward and backward without anything computed twice, which MFU is about;
        "hardware": with what is rematerialised and what the kernels compute again;
        "layers", "attention", "head": shares of "model".
    """
    config = model.config
    forward, step = _layer_operations(model, work)
    pairs = work.rows * work.row_length * (min(work.sample_length, work.row_length) + 1) / 2
    product = 2.0 * pairs * config.num_heads * config.head_dim * config.num_layers
    attention = (_FORWARD_PRODUCTS + _BACKWARD_PRODUCTS) * product
    forwards = 1 if config.remat == "none" else 2
    kernels = (forwards * _FORWARD_PRODUCTS + _KERNEL_BACKWARD_PRODUCTS) * product
    projection = 2.0 * work.rows * work.scored_per_row * config.hidden_size * config.vocab_size
    head_products = 3 if work.head_in_forward else 4
    return {
        "model": 3 * forward + attention + 3 * projection,
        "hardware": step + kernels + head_products * projection,
        "layers": 3 * forward,
        "attention": attention,
        "head": 3 * projection,
    }


def num_parameters(model: models.Decoder) -> int:
    """Parameters of the model."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))


def matrix_operations(jaxpr: Any) -> float:
    """Operations of the matrix products of a traced program; scans multiplied out.

    Loops without a static length count as one turn, and kernels not at all.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
        elif equation.primitive.name.startswith("ragged_dot"):
            total += _ragged_product(equation)
        elif equation.primitive.name != "pallas_call":
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += times * sum(matrix_operations(x) for x in _inner(equation.params))
    return total


def _layer_operations(model: models.Decoder, work: Work) -> tuple[float, float]:
    """Of the forward pass, and of forward, backward and what is rematerialised between them."""
    graphdef, variables = nnx.split(model)
    params = nnx.to_pure_dict(variables)
    tokens = jax.ShapeDtypeStruct((work.rows, work.row_length), jnp.int32)

    def total(params: Any, tokens: jax.Array) -> jax.Array:
        merged = nnx.merge(graphdef, params)
        hidden = merged(tokens, tokens, tokens, attend=_no_attention)
        return hidden.astype(jnp.float32).sum()

    forward = jax.make_jaxpr(total)(params, tokens)
    step = jax.make_jaxpr(jax.grad(total))(params, tokens)
    return matrix_operations(forward.jaxpr), matrix_operations(step.jaxpr)


def _no_attention(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
    """In place of attention: needs all of its operands, and has no matrix product."""
    return q + (k.sum() + v.sum()) + ends[..., None, None].astype(q.dtype)


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * size * math.prod(shape[axis] for axis in contracted)


def _ragged_product(equation: Any) -> float:
    """Of a product in groups: each row with the matrix of its group, or the gradient of those.

    Rows, whose groups are ragged, are multiplied once each, whether they are contracted or not.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, right = (x.aval.shape for x in equation.invars[:2])
    (ragged,) = numbers.lhs_ragged_dimensions
    if ragged in contracted:  # [rows, A] and [rows, B] → [groups, A, B]
        return 2.0 * math.prod(left) * math.prod(right) / left[ragged]
    size = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * size * math.prod(left[axis] for axis in contracted)


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """Programs among the parameters of an equation."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found

"""Experts: who is asked about a token, and all of them computed in grouped matrix products.

    chosen = route(y, router, num_chosen=8, normalise=True)
    out = run(y, chosen, tables)                   # one device
    out = on_mesh(mesh, cut)(y, chosen, tables)    # experts cut; made by sharding.run_experts

The (token, expert) pairs are sorted by expert, so that every expert's tokens are neighbours, and
`jax.lax.ragged_dot` multiplies each run of rows with its own matrix. It is exact: no token is
dropped, however uneven the choice. On TPUs it is a grouped kernel; on CPUs and GPUs JAX multiplies
every pair with every expert and masks, which is right but as dear as using all the experts.

`E` counts experts, `K` those of a token, `S` tokens, `F` the width of an expert.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from codjax.models.config import DecoderConfig
from codjax.models.family import Chosen, ParamSpec, RunExperts, Tables


class Cut(NamedTuple):
    """Mesh axes that cut each dimension; an axis named nowhere holds copies."""

    rows: tuple[str, ...] = ()  # B, the axes of `experts` among them
    tokens: tuple[str, ...] = ()  # T
    experts: tuple[str, ...] = ()  # E
    mlp: tuple[str, ...] = ()  # F


def specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """The norm before the MLP, the router, and the three matrices of every expert."""
    width, mlp, std = config.hidden_size, config.moe_intermediate_size, config.init_std
    num = config.num_experts
    into = ParamSpec((num, width, mlp), ("experts", "embed", "mlp"), std)
    return {
        "mlp_norm": ParamSpec((width,), ("norm",), None),
        "router": ParamSpec((width, num), ("embed", "experts"), std),
        "gate": into,
        "up": into,
        "down": ParamSpec((num, mlp, width), ("experts", "mlp", "embed"), std),
    }


def route(
    y: Float[Array, "B T D"], router: Float[Array, "D E"], *, num_chosen: int, normalise: bool
) -> Chosen:
    """The experts of every token, and their weights in the dtype of `y`.

    Args:
        y: normalised activations.
        router: one column an expert.
        num_chosen: K.
        normalise: whether the weights of a token sum to 1; else they are its probabilities.
    """
    logits = jnp.einsum("btd,de->bte", y, router, preferred_element_type=jnp.float32)
    weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), num_chosen)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Chosen(weights.astype(y.dtype), expert_ids)


def run(x: Float[Array, "B T D"], chosen: Chosen, tables: Tables) -> Float[Array, "B T D"]:
    """Weighted sum of the SwiGLU of each token's experts.

    Ids outside of ``[0, E)`` are experts of another device, and add nothing.
    """
    num_experts, num_chosen = len(tables.gate), chosen.expert_ids.shape[-1]
    tokens, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    ids = chosen.expert_ids.reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)  # the others come last
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.bincount(ids, length=num_experts + 1)[:-1].astype(jnp.int32)
    # What a grouped product leaves in rows of no group is not defined, forward or backward: they
    # are cut off on the way in, for the gradient, and on the way out.
    is_here = (ids[order] < num_experts)[:, None]
    rows = jnp.where(is_here, tokens[order // num_chosen], 0)
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, tables.gate, sizes))
    inner = inner * jax.lax.ragged_dot(rows, tables.up, sizes)
    out = jnp.where(is_here, jax.lax.ragged_dot(inner, tables.down, sizes), 0)
    # Back in the order of the pairs, a token's experts are neighbours.
    out = out[jnp.argsort(order)].reshape(-1, num_chosen, width)
    out = jnp.einsum("skd,sk->sd", out, chosen.weights.reshape(-1, num_chosen))
    return out.reshape(x.shape)


def on_mesh(mesh: Mesh, cut: Cut) -> RunExperts:
    """`run` where experts, their width and the rows are cut over a mesh.

    Every device gathers the tokens of the devices that hold other experts and the same place on
    the other axes, runs its own experts on them, and gives each its share back: an all-gather and
    a reduce-scatter of the activations over the axes of the experts, one sum over those of `mlp`.
    """
    num_parts = math.prod(mesh.shape[axis] for axis in cut.experts)
    activation = PartitionSpec(cut.rows or None, cut.tokens or None)
    into = PartitionSpec(cut.experts or None, None, cut.mlp or None)
    out_of = PartitionSpec(cut.experts or None, cut.mlp or None, None)
    tables_specs = Tables._make((into, into, out_of))

    def here(x: Array, chosen: Chosen, tables: Tables) -> Array:
        if num_parts > 1:
            x, chosen = jax.lax.all_gather((x, chosen), cut.experts, axis=0, tiled=True)
            first = jax.lax.axis_index(cut.experts) * len(tables.gate)
            chosen = chosen._replace(expert_ids=chosen.expert_ids - first)
        out = run(x, chosen, tables)
        if cut.mlp:
            out = jax.lax.psum(out, cut.mlp)
        if num_parts > 1:
            out = jax.lax.psum_scatter(out, cut.experts, scatter_dimension=0, tiled=True)
        return out

    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(activation, activation, tables_specs),
        out_specs=activation,
    )

"""One attention kernel without the program around it, for `cycles.simulate` and for tuning.

    function, shapes = problem("forward", subtree_end, num_heads=8, num_kv_heads=2, head_dim=128,
                               blocks=Blocks(512, 512), vmem_bytes=64 * 2**20)
    cycles.simulate(function, *shapes, topology="v5e").cycles

The simulator has no model of kernels whose operands lie in vector memory, where the compiler puts
small results of other operations; so everything, the list of pairs too, comes as an argument. But
it reads zeros from scalar memory: the list says nothing to it, and every step looks like an
unmasked tile of blocks that are there already. `codjax.bench.kernel_attention.kernel_cycles`
compiles the list into the program, so that the flags, the masks and the transfers count.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from codjax_kernels import pairs
from codjax_kernels.tpu import attention_backward as backward
from codjax_kernels.tpu import attention_tiles as tiles
from codjax_kernels.tpu.attention_blocks import Blocks
from codjax_kernels.tpu.attention_forward import forward

KERNELS = ("forward", "query_gradient", "key_value_gradient")
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_value_gradient": 4}  # of a tile


def problem(
    kernel: str,
    subtree_end: Int[np.ndarray, "B T"],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    blocks: Blocks,
    vmem_bytes: int,
    dtype: Any = jnp.bfloat16,
) -> tuple[functools.partial[Any], tuple[Any, ...]]:
    """A function of a kernel's operands, on a grid of known length, and their shapes.

    Args:
        kernel: one of `KERNELS`.
        subtree_end: the forests, in the rows' order.
        num_heads: N.
        num_kv_heads: M.
        head_dim: H.
        blocks: of the kernel.
        vmem_bytes: vector memory that it may take.
        dtype: of the operands.
    """
    layout = tiles.layout(
        subtree_end,
        0,
        num_queries=subtree_end.shape[1],
        group=num_heads // num_kv_heads,
        blocks=blocks,
        key_major=kernel == "key_value_gradient",
    )
    num_queries, num_keys = layout.query_start.size * layout.block_q, layout.subtree_size.size
    numbers = jax.ShapeDtypeStruct((num_kv_heads, 1, num_queries * layout.group), jnp.float32)
    q = jax.ShapeDtypeStruct((num_kv_heads, numbers.shape[2], head_dim), dtype)
    k = jax.ShapeDtypeStruct((num_kv_heads, num_keys, head_dim), dtype)
    operands = (q, k, k) if kernel == "forward" else (q, k, k, q, numbers, numbers)
    lists = layout.pairs.words, layout.query_start, layout.subtree_size
    sizes = layout._replace(pairs=None, query_start=None, subtree_size=None)  # type: ignore[arg-type]
    function = functools.partial(
        _run,
        kernel=kernel,
        num_pairs=layout.pairs.num_pairs,
        visited=np.asarray(layout.pairs.visited),
        sizes=sizes,
        vmem_bytes=vmem_bytes,
    )
    return function, (*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in lists), *operands)


def _run(
    words: Any,
    query_start: Any,
    subtree_size: Any,
    *operands: Any,
    kernel: str,
    num_pairs: Any,
    visited: np.ndarray,
    sizes: tiles.Layout,
    vmem_bytes: int,
) -> Any:
    listed = pairs.Pairs(words, num_pairs, visited)
    layout = sizes._replace(pairs=listed, query_start=query_start, subtree_size=subtree_size)
    if kernel == "forward":
        q, k, v = operands
        return forward(q, k, v, layout, vmem_bytes=vmem_bytes, interpret=False)
    given = backward.Operands(*operands)
    return getattr(backward, kernel)(given, layout, vmem_bytes=vmem_bytes, interpret=False)

"""TPU attention kernels in the hands of the TPU compiler: they compile, and packing pays.

Runs where libtpu is installed; no TPU is needed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import pairs, topologies
from codjax_kernels.tpu import attention, attention_alone, attention_blocks

from codjax.bench import kernel_attention

pytest.importorskip("libtpu")

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


def forward_and_backward(q, k, v, ends, out_bar):
    out, pull = jax.vjp(lambda q, k, v: attention.forest_attention(q, k, v, ends), q, k, v)
    return out, *pull(out_bar)


def compiled(topology, *, num_tokens, num_heads, num_kv_heads, head_dim=128):
    q = jax.ShapeDtypeStruct((1, num_tokens, num_heads, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, num_tokens, num_kv_heads, head_dim), jnp.bfloat16)
    ends = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    return topologies.compile(forward_and_backward, q, k, k, ends, q, topology=topology)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 72, 192, 256])
def test_head_sizes_compile(head_dim):
    program = compiled("v5e", num_tokens=640, num_heads=7, num_kv_heads=1, head_dim=head_dim)
    assert "forest_attention_key_value_gradient" in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_qwen3_8b_at_32k_tokens_compiles(chip):
    compiled(chip, num_tokens=32_768, num_heads=32, num_kv_heads=8)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_128k_tokens_compile(chip):
    compiled(chip, num_tokens=131_072, num_heads=8, num_kv_heads=2)


@pytest.mark.slow
def test_128k_tokens_compile_with_16_heads_a_key_value_head():
    # Blocks of 128 queries and 512 keys would be more pairs than the list holds.
    compiled("v5e", num_tokens=131_072, num_heads=32, num_kv_heads=2)


def simulated(kernel, segment):
    """Cycles and pairs of one kernel on v5e for a row of 2,048 tokens in segments."""
    ends = (np.arange(2048) // segment * segment + segment)[None].astype(np.int32)
    shapes = getattr(attention_blocks.TABLE["v5e"], kernel)
    found = kernel_attention.kernel_cycles(kernel, ends, shapes, "v5e", num_heads=8, group=4)
    return found, pairs.minimal_pairs(ends, shapes.queries, shapes.keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "busy", "share"),
    # Measured: 1.19 and 1.02, 1.08 and 1.23, 0.96 and 1.28; 0.9 is what was asked for.
    [
        ("forward", 1.25, 0.97),
        ("query_gradient", 1.15, 1.15),
        ("key_value_gradient", 1.0, 1.2),
    ],
)
def test_cycles_follow_the_pairs(kernel, busy, share):
    plain, plain_pairs = simulated(kernel, 2048)
    packed, packed_pairs = simulated(kernel, 512)
    assert (plain_pairs, packed_pairs) == (10, 4)
    flops = 2 * attention_alone.PRODUCTS[kernel] * plain_pairs * 512 * 512 * 8 * 128
    assert plain < busy * topologies.CHIPS["v5e"].matrix_cycles(flops)
    assert plain / packed > share * plain_pairs / packed_pairs

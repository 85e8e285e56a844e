"""The learner's own program, sharded, with the Pallas kernels, through the real TPU compiler."""

import importlib.util

import pytest

from codjax import shapes
from codjax.bench import train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler"
    ),
]
SIZES = {**shapes.QWEN3_8B, "num_layers": 2, "hidden_size": 1024, "intermediate_size": 3072}


@pytest.mark.parametrize("context", [1, 2])
def test_a_sharded_step_compiles_with_its_kernels(context):
    row = train_step.compile_step(
        "v5e:2x4",
        axes={"data": 1, "fsdp": 4 // context, "context": context, "tensor": 2},
        sizes=SIZES,
        row_length=4096,
        scored_per_row=1024,
    )
    # Attention forward (again in the rematerialised backward pass), and its two gradients;
    # statistics and gradients of the loss head.
    assert row["kernels"] == 6
    # Logits of 1,024 entries over half of the vocabulary are 0.29 GiB in float32, of all tokens
    # and half of the vocabulary four times as much.
    assert row["peak_gib"] < 4

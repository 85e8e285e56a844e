"""A sharded train step with the Pallas kernels, compiled for a TPU topology that is not there.

    row = compile_step("v5e:4x4", axes={"data": 1, "fsdp": 4, "context": 2, "tensor": 2}, …)

What is compiled is the learner's own program of a micro-batch: forward, gradients made on the way,
accumulation. Shapes alone go in.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import optax
from codjax_kernels import topologies
from flax import nnx

from codjax import learner, losses, models, sharding
from codjax.bench.material import Row
from codjax.shapes import QWEN3_8B

__all__ = ["QWEN3_8B", "compile_step"]

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_GIB = 2**30


def compile_step(
    topology: str,
    *,
    axes: Mapping[str, int],
    sizes: Mapping[str, Any],
    row_length: int,
    scored_per_row: int,
    implementation: str = "pallas_tpu",
) -> Row:
    """Seconds, memory per device and kernels of a compiled micro-batch step.

    Args:
        topology: as for `topologies.devices`.
        axes: devices along `sharding.MESH_AXES`; one along those that are not there.
        sizes: of the model, as `DecoderConfig` takes them.
        row_length: T; a micro-batch has a row for every device that rows are cut over.
        scored_per_row: K.
        implementation: of the kernels.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        jax.errors.JaxRuntimeError: the step does not fit, or a kernel does not compile.
    """
    mesh = topologies.mesh(topology, {axis: axes.get(axis, 1) for axis in sharding.MESH_AXES})
    rows = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    made = _learner(mesh, sizes, rows=rows, implementation=implementation)
    begin = time.perf_counter()
    traced = made.trace(row_length=row_length, scored_per_row=scored_per_row)["accumulate"]
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - begin
    memory, program = topologies.memory(compiled), compiled.as_text() or ""
    kinds = Counter(re.findall(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", program))
    return {
        "step": f"{topology}, " + ", ".join(f"{axis} {axes[axis]}" for axis in axes),
        "row_length": row_length,
        "compile_s": seconds,
        "kernels": program.count('custom_call_target="tpu_custom_call"'),
        "arguments_gib": memory.arguments / _GIB,
        "temporaries_gib": memory.temporaries / _GIB,
        "peak_gib": memory.peak / _GIB,
        **{kind: kinds[kind] for kind in _COLLECTIVES},
    }


def _learner(
    mesh: jax.sharding.Mesh, sizes: Mapping[str, Any], *, rows: int, implementation: str
) -> learner.Learner:
    config = models.DecoderConfig(
        **sizes,
        dtype="bfloat16",
        param_dtype="float32",
        remat="full",
        init_std=0.02,
        embedding_std=0.02,
    )
    policy_loss = functools.partial(losses.rec_loss, clip_mode="one_side", weight_mode="none")
    return learner.Learner(
        nnx.eval_shape(lambda: models.init(config, seed=0)),
        optimizer=optax.adamw(1e-6),
        schedule=optax.constant_schedule(1e-6),
        objective=learner.Objective(policy_loss=policy_loss, is_per_token=True, temperature=1.0),
        mesh=mesh,
        rows_per_microbatch=rows,
        implementation=implementation,
    )

"""What the public operations check before anything is traced: shapes, dtypes, temperatures.

Each function raises a ValueError that says what was given, what is wanted and what to do.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from codjax_kernels.records import LogprobPasses

AnyArray = Array | np.ndarray
Temperature = float | int | Float[AnyArray, "..."]


def check_operands(name: str, shape: str, hidden: Array, unembedding: Array) -> None:
    """Hidden states of a shape, "[K D]" or "[B T D]", and a table of their width and dtype."""
    fits = (
        hidden.ndim == len(shape.split())
        and unembedding.ndim == 2
        and hidden.shape[-1] == unembedding.shape[1]
    )
    if not fits or hidden.dtype != unembedding.dtype:
        raise ValueError(
            f"{name} takes hidden {shape} and unembedding [V D] of one dtype; got "
            f"{hidden.dtype}{list(hidden.shape)} and {unembedding.dtype}{list(unembedding.shape)}."
        )


def check_temperature(name: str, temperature: Temperature, shape: tuple[int, ...]) -> None:
    """A number, or one for each of the entries; above 0 where that can be seen."""
    if np.shape(temperature) not in {(), shape}:
        raise ValueError(
            f"{name} takes a temperature, or one an entry {list(shape)}; got an array of shape "
            f"{list(np.shape(temperature))}."
        )
    if not isinstance(temperature, jax.Array) and np.any(np.asarray(temperature) <= 0):
        raise ValueError(
            f"temperature must be above 0, since logits are divided by it; got {temperature}. "
            "Greedy choice is no distribution: score with temperature 1."
        )


def check_entries(  # noqa: PLR0917 - the arguments of the callers, in their order
    name: str,
    hidden: Array,
    unembedding: Array,
    source: AnyArray,
    target: AnyArray,
    is_valid: AnyArray | None,
    temperature: Temperature,
) -> None:
    """Operands of entries of rows."""
    check_operands(name, "[B T D]", hidden, unembedding)
    others = {"source": source, "target": target, "is_valid": is_valid}
    shapes = {key: np.shape(x) for key, x in others.items() if x is not None}
    fits = len(set(shapes.values())) == 1 and len(shapes["target"]) == 2
    if not fits or shapes["target"][0] != hidden.shape[0]:
        raise ValueError(
            f"{name} takes source, target and is_valid [B K] for hidden [B T D]; got {shapes} and "
            f"{hidden.shape}."
        )
    check_temperature(name, temperature, shapes["target"])


def check_loss_operands(name: str, operands: Any, shape: tuple[int, ...]) -> None:
    """What a loss looks at beside the results: numbers, and arrays of a shape."""
    wrong = [x.shape for x in jax.tree.leaves(operands) if x.shape not in {(), shape}]
    if wrong:
        raise ValueError(
            f"the operands of {name} are numbers and arrays of the entries' shape, {shape}; got an "
            f"array of shape {wrong[0]}."
        )


def check_in_forward(passes: LogprobPasses, implementation: str | None, *, instead: str) -> None:
    """An implementation that makes gradients in the forward pass."""
    if passes.stored_statistics is None:
        raise ValueError(
            f"implementation {implementation!r} does not make gradients in the forward pass; use "
            f"{instead} and automatic differentiation, or implementation 'xla'."
        )

"""Parameters and tensors: which tensors of a Hugging Face folder hold which parameter, and how.

transformers stores a matrix as `[out in]`, with heads and channels merged, every layer and every
expert apart; we store `[in out]` with heads apart, layers and experts stacked. `_TOP`, `_LAYER` and
`_EXPERTS` are the whole correspondence: a new parameter takes a line.

    for name, counterpart in counterparts(config).items():
        part = counterpart.read(index, read_tensor, dtype)     # of the parameter, from its tensors
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codjax.models.config import DecoderConfig
from codjax.models.decoder import param_specs
from codjax.models.family import ParamSpec

Index = tuple[slice, ...]
ReadTensor = Callable[[str, Index], np.ndarray]  # name of a tensor, part of it


class _Rule(NamedTuple):
    """How a parameter, or its part for one layer (and expert), is stored."""

    tensor: str  # its name; of layers, what follows "model.layers.3."
    num_inputs: int | None  # axes it begins with that are a matrix's inputs; None: stored as it is


_TOP = {
    "embedding": _Rule("model.embed_tokens.weight", None),
    "final_norm": _Rule("model.norm.weight", 0),
    "output": _Rule("lm_head.weight", None),
}
_LAYER = {
    "attention_norm": _Rule("input_layernorm.weight", 0),
    "query": _Rule("self_attn.q_proj.weight", 1),
    "query_bias": _Rule("self_attn.q_proj.bias", 0),
    "key": _Rule("self_attn.k_proj.weight", 1),
    "key_bias": _Rule("self_attn.k_proj.bias", 0),
    "value": _Rule("self_attn.v_proj.weight", 1),
    "value_bias": _Rule("self_attn.v_proj.bias", 0),
    "query_norm": _Rule("self_attn.q_norm.weight", 0),
    "key_norm": _Rule("self_attn.k_norm.weight", 0),
    "attention_output": _Rule("self_attn.o_proj.weight", 2),
    "attention_output_bias": _Rule("self_attn.o_proj.bias", 0),
    "mlp_norm": _Rule("post_attention_layernorm.weight", 0),
    "router": _Rule("mlp.gate.weight", 1),
    "gate": _Rule("mlp.gate_proj.weight", 1),
    "gate_bias": _Rule("mlp.gate_proj.bias", 0),
    "up": _Rule("mlp.up_proj.weight", 1),
    "up_bias": _Rule("mlp.up_proj.bias", 0),
    "down": _Rule("mlp.down_proj.weight", 1),
    "down_bias": _Rule("mlp.down_proj.bias", 0),
}
_EXPERTS = {  # the same of a mixture; {} stands for the number of the expert
    "gate": _Rule("mlp.experts.{}.gate_proj.weight", 1),
    "up": _Rule("mlp.experts.{}.up_proj.weight", 1),
    "down": _Rule("mlp.experts.{}.down_proj.weight", 1),
}
_STACKED = ("layers", "experts")  # axes along which every index is a tensor of its own
TABLE, OUTPUT = _TOP["embedding"].tensor, _TOP["output"].tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counterpart:
    """The tensors of one parameter.

    Attributes:
        shape: of the parameter.
        template: name of its tensors; a {} for every stacked axis.
        num_stacked: axes that the parameter begins with along which every index is a tensor.
        num_inputs: of the axes that follow, how many are a matrix's inputs, which the tensor has
            behind its outputs; 0 for a vector; None where the tensor is stored as it is.
    """

    shape: tuple[int, ...]
    template: str
    num_stacked: int
    num_inputs: int | None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of the tensors."""
        inner = self.shape[self.num_stacked :]
        if self.num_inputs is None:
            return inner
        inputs, outputs = inner[: self.num_inputs], inner[self.num_inputs :]
        return (math.prod(outputs), math.prod(inputs))[: 2 if inputs else 1]

    @property
    def is_reshaped(self) -> bool:
        """Whether a tensor has other axes than the parameter's part that it holds."""
        is_matrix = self.num_inputs not in (None, 0)
        return is_matrix or len(self.shape) > self.num_stacked + len(self.tensor_shape)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor, with its index along the stacked axes."""
        for index in itertools.product(*map(range, self.shape[: self.num_stacked])):
            yield self.template.format(*index), index

    def read(self, index: Index, read_tensor: ReadTensor, dtype: np.dtype | str) -> np.ndarray:
        """A part of the parameter, from the parts of the tensors that hold it and no more.

        Args:
            index: a slice, without a step, for every axis of the parameter.
            read_tensor: reads a part of a tensor.
            dtype: of the result.
        """
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        stacked, inner = ranges[: self.num_stacked], ranges[self.num_stacked :]
        out = np.empty([len(indices) for indices in ranges], dtype)
        for place in np.ndindex(*(len(indices) for indices in stacked)):
            numbers = (indices[i] for indices, i in zip(stacked, place, strict=True))
            name = self.template.format(*numbers)
            out[place] = self._from_tensor(name, inner, read_tensor)
        return out

    def to_tensor(self, part: np.ndarray) -> np.ndarray:
        """The tensor that holds one index of the stacked axes, given as the parameter has it."""
        if self.num_inputs is None:
            return np.ascontiguousarray(part)
        if self.num_inputs == 0:
            return np.ascontiguousarray(part.reshape(-1))
        num_in = math.prod(part.shape[: self.num_inputs])
        return np.ascontiguousarray(part.reshape(num_in, -1).T)

    def _from_tensor(
        self, name: str, inner: Sequence[range], read_tensor: ReadTensor
    ) -> np.ndarray:
        """These indices of the axes that are not stacked, read from the tensor."""
        if self.num_inputs is None:
            return read_tensor(name, tuple(slice(part.start, part.stop) for part in inner))
        sizes = self.shape[self.num_stacked :]
        groups = [  # inputs and outputs: indices wanted, sizes
            (inner[: self.num_inputs], sizes[: self.num_inputs]),
            (inner[self.num_inputs :], sizes[self.num_inputs :]),
        ]
        groups = [group for group in groups if group[0]]
        read = read_tensor(name, tuple(_merged(*group) for group in reversed(groups)))
        whole, crop = [], []
        for indices, shape in groups:
            whole += [len(indices[0]), *shape[1:]]
            crop += [slice(None), *(slice(part.start, part.stop) for part in indices[1:])]
        return read.T.reshape(whole)[tuple(crop)]


def counterparts(config: DecoderConfig) -> dict[str, Counterpart]:
    """The tensors of every parameter of a decoder, by the parameter's name."""
    return {name: counterpart(name, spec) for name, spec in param_specs(config).items()}


def counterpart(name: str, spec: ParamSpec) -> Counterpart:
    """The tensors of one parameter.

    Args:
        name: as `param_specs` has it; those of layers begin with "layers.".
        spec: its shape and axes, "layers" and "experts" leading where they are stacked.
    """
    stacked = tuple(itertools.takewhile(lambda axis: axis in _STACKED, spec.axes))
    short = name.removeprefix("layers.")
    table = {0: _TOP, 1: _LAYER, 2: _EXPERTS}[len(stacked)]
    prefix = "model.layers.{}." if stacked else ""
    return Counterpart(
        shape=spec.shape,
        template=prefix + table[short].tensor,
        num_stacked=len(stacked),
        num_inputs=table[short].num_inputs,
    )


def _merged(indices: Sequence[range], sizes: Sequence[int]) -> slice:
    """Where axes are merged into one, the part that covers these indices of them.

    >>> _merged([range(1, 3), range(0, 4)], [8, 4])
    slice(4, 12, None)
    """
    rest = math.prod(sizes[1:])
    return slice(indices[0].start * rest, indices[0].stop * rest)


def mismatches(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> list[str]:
    """What is missing, unexpected or of another shape: a sentence with the numbers, then all names.

    Args:
        found: name → shape of what is there.
        wanted: name → shape of what must be there.

    >>> mismatches({"x.0.w": [2], "x.3.w": [2], "y": [3]}, {"x.0.w": [2], "x.1.w": [2], "y": [4]})
    ['1 missing, 1 unexpected, 1 of another shape', 'missing x.1.w', 'unexpected x.3.w', \
'y has shape (3,), not (4,)']
    """
    missing, unexpected = set(wanted) - set(found), set(found) - set(wanted)
    other: dict[str, list[str]] = {}
    for name in set(wanted) & set(found):
        if tuple(found[name]) != tuple(wanted[name]):
            message = f"has shape {tuple(found[name])}, not {tuple(wanted[name])}"
            other.setdefault(message, []).append(name)
    if not (missing or unexpected or other):
        return []
    num_other = sum(map(len, other.values()))
    return [
        f"{len(missing)} missing, {len(unexpected)} unexpected, {num_other} of another shape",
        *(f"missing {name}" for name in collapsed(missing)),
        *(f"unexpected {name}" for name in collapsed(unexpected)),
        *(f"{name} {text}" for text, names in sorted(other.items()) for name in collapsed(names)),
    ]


def collapsed(names: Iterable[str]) -> list[str]:
    """Names that differ in a number of layer or expert only, as one each; sorted.

    >>> collapsed(["x.0.w", "x.1.w", "x.2.w", "x.5.w", "y"])
    ['x.{0-2,5}.w', 'y']
    """
    # Experts, the last number, first: most often equal in all layers, which then are equal names.
    for pattern in (r"^(.*\.)(\d+)(\..*)$", r"^(.*?\.)(\d+)(\..*)$"):
        groups: dict[tuple[str, str], list[int]] = {}
        others = []
        for name in names:
            match = re.match(pattern, name)
            if match:
                groups.setdefault((match[1], match[3]), []).append(int(match[2]))
            else:
                others.append(name)
        names = others + [a + _ranges(numbers) + b for (a, b), numbers in groups.items()]
    return sorted(names)


def _ranges(numbers: list[int]) -> str:
    """Numbers as they stand, or in braces with runs written as first-last."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"

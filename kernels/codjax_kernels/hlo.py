"""The text of a compiled program: its loops, its collectives, the bytes it moves.

    program = hlo.parse(compiled.as_text())
    for collective in hlo.collectives(program): …
    hlo.memory_bytes(program)

Everything is multiplied out: what stands in the body of a loop counts as often as the loop turns,
which XLA's own `cost_analysis` does not do. Shapes in the text are those of one device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
# Which move nothing, or whose parts are counted where they are.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-update",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
}
_SLICES = {"dynamic-slice", "slice", "gather"}


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # its type, as it is written
    operands: tuple[str, ...]
    line: str
    is_root: bool


class Program(NamedTuple):
    """A parsed program."""

    computations: Mapping[str, Sequence[str]]  # lines by name
    entry: str  # the name of the first to run
    num_devices: int = 1  # that run it together


class Collective(NamedTuple):
    """One transfer between devices.

    Attributes:
        kind: of `KINDS`; what the compiler fused to "all-reduce-scatter" is a reduce-scatter.
        operand_bytes: that each device puts in.
        groups: devices that exchange, one group a row; empty where the text could not be read.
        times: how often it runs.
        name: what was written in the source, as the program's metadata tells.
    """

    kind: str
    operand_bytes: int
    groups: np.ndarray
    times: int
    name: str

    @property
    def received_bytes(self) -> int:
        """That each device must at least receive in one run, on any network.

        A sum of all takes twice what one part takes: every device needs the others' shares of its
        part, and then the other parts.
        """
        size = self.groups.shape[1] if self.groups.size else 2
        share = self.operand_bytes * (size - 1) // size
        return {
            "all-gather": self.operand_bytes * (size - 1),
            "all-reduce": 2 * share,
            "reduce-scatter": share,
            "all-to-all": share,
            "collective-permute": self.operand_bytes,
        }[self.kind]


def parse(text: str) -> Program:
    """The computations in `compiled.as_text()`."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            lines = computations[opened[2]] = []
            entry = opened[2] if opened[1] else entry
        else:
            lines.append(line)
    partitions = re.match(r"HloModule .*\bnum_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def trips(program: Program, loop: str) -> int | None:
    """How often a loop turns; None if only the run can tell.

    Args:
        program: where it stands.
        loop: the line of the `while`, whose condition compares a count with a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop)
    lines = program.computations[condition[1]] if condition else ()
    constants = [int(x) for line in lines for x in re.findall(r" constant\((\d+)\)", line)]
    return max(constants, default=None)


def collectives(program: Program, *, unknown_trips: int = 1) -> list[Collective]:
    """Every collective of a program, in the order of the text.

    Args:
        program: of one device, as XLA partitioned it.
        unknown_trips: how often loops turn of which only the run can tell; loops in them, once.
    """
    found = []
    for computation, times in _executed(program, program.entry, 1, unknown_trips):
        chains: set[str] = set()  # pieces of one transfer that runs beside other work
        for operation, inside in _with_fused(program, computation):
            kind = operation.opcode.removesuffix("-start")
            chain = re.search(r'chain_id="(\d+)"', operation.line)
            if kind not in KINDS or (chain and chain[1] in chains):
                continue
            chains |= {chain[1]} if chain else set()
            if inside.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            source = re.search(r'op_name="([^"]*)"', operation.line)
            found.append(
                Collective(
                    kind=kind,
                    operand_bytes=sum(num_bytes(inside.types[x]) for x in operation.operands),
                    groups=_groups(operation.line, program.num_devices),
                    times=times,
                    name=source[1] if source else operation.name,
                )
            )
    return found


def memory_bytes(program: Program, *, unknown_trips: int = 1) -> int:
    """Bytes that a device reads from and writes to its main memory.

    Each operation reads its operands and writes its result once, where they are not in vector
    memory; of an operand that is only sliced, the slices count; of a result that is an operand
    with a part replaced, the part. What a Pallas kernel reads again is not known and not counted.

    Args:
        program: of one device.
        unknown_trips: as for `collectives`.
    """
    total = 0
    for name, times in _executed(program, program.entry, 1, unknown_trips):
        scope = _scope(program, name)
        total += times * sum(_operation_bytes(program, scope, x) for x in scope.operations)
    return total


def num_bytes(type_: str, *, main_memory_only: bool = False) -> int:
    """Bytes of a type as it is written, a tuple's parts together.

    >>> num_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, s32[4]{0:T(128)S(1)})")
    28
    >>> num_bytes("s32[4]{0:T(128)S(1)}", main_memory_only=True)
    0
    """
    total = 0
    for dtype, dims, layout in _ARRAY.findall(type_):
        if main_memory_only and re.search(r"S\(\d+\)", layout):
            continue
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


class _Scope(NamedTuple):
    """The operations of a computation."""

    name: str
    operations: tuple[Operation, ...]
    types: Mapping[str, str]


def _scope(program: Program, name: str) -> _Scope:
    operations = tuple(x for x in map(_operation, program.computations[name]) if x)
    return _Scope(name, operations, {x.name: x.result for x in operations})


def _operation(line: str) -> Operation | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    call = re.match(r" ?([\w\-]+)\(", rest[end:])
    if not call:
        return None
    arguments = rest[end + call.end() - 1 :]
    operands = tuple(_NAMES.findall(arguments[: _closing(arguments)]))
    return Operation(head[2], call[1], rest[:end], operands, line, bool(head[1]))


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first character."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    return len(text)


def _executed(
    program: Program, name: str, times: int, unknown_trips: int
) -> Iterator[tuple[str, int]]:
    """Computations that run one after the other, and how often; not those that are fused.

    Of a conditional, every branch counts.
    """
    yield name, times
    for line in program.computations[name]:
        if loop := re.search(r" while\(.*condition=%[\w.\-]+, body=%([\w.\-]+)", line):
            turns, inner = trips(program, line), unknown_trips
            if turns is None:
                turns, inner = unknown_trips, 1
            yield from _executed(program, loop[1], times * turns, inner)
        elif " conditional(" in line:
            named = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", line)
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            for branch in named + (_NAMES.findall(listed[1]) if listed else []):
                yield from _executed(program, branch, times, unknown_trips)
        elif called := re.search(r" call\(.*to_apply=%([\w.\-]+)", line):
            yield from _executed(program, called[1], times, unknown_trips)


def _with_fused(program: Program, name: str) -> Iterator[tuple[Operation, _Scope]]:
    """Operations of a computation and of the fusions in it, each with the scope it is in."""
    scope = _scope(program, name)
    for operation in scope.operations:
        yield operation, scope
        if operation.opcode in ("fusion", "async-start"):
            yield from _with_fused(program, _called(operation))


def _groups(line: str, num_devices: int) -> np.ndarray:
    """Devices that exchange, as numbers along the mesh: `[groups, devices of a group]`."""
    if "replica_groups={}" in line:
        return np.arange(num_devices)[None]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = _integers(iota[1]), _integers(iota[2])
        order = _integers(iota[3]) if iota[3] else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        cut = re.findall(r"'(\w+)'", named[2])
        if set(cut) <= set(sizes) and ":" not in named[2]:
            dims = [int(size) for size in sizes.values()]
            order = [i for i, axis in enumerate(sizes) if axis not in cut]
            order += [list(sizes).index(axis) for axis in cut]
            size = math.prod(int(sizes[axis]) for axis in cut)
            return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, size)
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", line)
    groups = [
        _integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1] if listed else "")
    ]
    if "source_target_pairs" in line:
        groups = [pair for pair in groups if pair[0] != pair[1]]
    return np.array(groups, int) if groups else np.zeros((0, 0), int)


def _integers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _operation_bytes(program: Program, scope: _Scope, operation: Operation) -> int:
    opcode = operation.opcode
    if opcode in _FREE or opcode.endswith("-done") or '"AllocateBuffer"' in operation.line:
        return 0
    if opcode == "fusion":
        return _fusion_bytes(program, scope, operation, _scope(program, _called(operation)))

    def size(name: str) -> int:
        return num_bytes(scope.types.get(name, ""), main_memory_only=True)

    result = num_bytes(operation.result, main_memory_only=True)
    if opcode.endswith("-start"):  # its result holds its operands too
        return result
    if opcode in _SLICES:
        return result * (1 + bool(size(operation.operands[0])))
    if opcode == "dynamic-update-slice":
        return 2 * size(operation.operands[1])
    return result + sum(map(size, operation.operands))


def _fusion_bytes(program: Program, outer: _Scope, operation: Operation, inner: _Scope) -> int:
    """Operands and results of a fusion; of pieces of a transfer, what the work beside it takes."""
    total = 0
    for number, operand in enumerate(operation.operands):
        whole = num_bytes(outer.types.get(operand, ""), main_memory_only=True)
        total += _read_bytes(program, inner, _parameter(inner, number), whole) if whole else 0
    roots = [x for x in inner.operations if x.is_root]
    if roots and roots[0].opcode == "tuple":
        roots = [x for x in inner.operations if x.name in roots[0].operands]
    for made in roots:
        kind = made.opcode.removesuffix("-start")
        if made.opcode == "dynamic-update-slice":
            total += num_bytes(inner.types[made.operands[1]])
        elif kind not in ("parameter", "custom-call", *KINDS):
            total += num_bytes(made.result, main_memory_only=True)
    return total


def _read_bytes(program: Program, scope: _Scope, name: str, whole: int) -> int:
    """What a fusion reads of one of its operands: all of it, or slices of it."""
    total = 0
    for user in scope.operations:
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read_bytes(program, scope, user.name, whole)
        elif user.opcode == "fusion":
            inner = _scope(program, _called(user))
            parameter = _parameter(inner, user.operands.index(name))
            total += _read_bytes(program, inner, parameter, whole)
        elif user.opcode in _SLICES and user.operands[0] == name:
            total += num_bytes(user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode not in ("tuple", "custom-call", *KINDS):
            return whole
    return min(total, whole)


def _called(fusion: Operation) -> str:
    found = re.search(r" calls=%([\w.\-]+)", fusion.line)
    assert found is not None
    return found[1]


def _parameter(scope: _Scope, number: int) -> str:
    return next(x.name for x in scope.operations if f" parameter({number})" in x.line)

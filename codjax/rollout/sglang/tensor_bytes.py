"""NumPy arrays as the bytes that SGLang's `/update_weights_from_tensor` takes, without torch.

The route unpickles `[(name, torch tensor), …]` with a short list of allowed functions, among them
those that rebuild an ordinary CPU tensor. A pickle of calls to these is written here by hand, one
opcode after the other:

    _rebuild_tensor_v2(_load_from_bytes(FILE), 0, shape, strides, False, OrderedDict())

FILE is what `torch.save` wrote before its zip files: five pickles, then the values. Tried with
SGLang 0.5.23; `tests/rollout/sglang/test_tensor_bytes.py` reads it with torch.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence

import numpy as np

STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}

_MAGIC, _PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's old format
_INT32 = 2**31
_NONE, _FALSE, _TRUE = b"N", b"\x89", b"\x88"
_REDUCE, _PERSISTENT_ID, _END = b"R", b"Q", b"."


def payload(named: Sequence[tuple[str, np.ndarray]]) -> str:
    """Tensors for one rank, as base64.

    Takes about four times the size of the values for a moment; the result is 4/3 of it.

    Args:
        named: name and values; of a dtype in `STORAGES`.
    """
    chunks: list[bytes | memoryview] = [_begin(protocol=4), b"]("]
    for name, array in named:
        chunks += [b"(", _text(name), *_tensor(array), b"t"]
    chunks += [b"e", _END]
    return base64.b64encode(b"".join(chunks)).decode()


def _tensor(array: np.ndarray) -> list[bytes | memoryview]:
    """The calls that make a tensor, in pieces, so that the values are copied once."""
    head = _head(array)
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    before = (
        _global("torch._utils", "_rebuild_tensor_v2"),
        b"(",
        _global("torch.storage", "_load_from_bytes"),
        b"(",
        b"\x8e" + struct.pack("<Q", len(head) + len(values)),
        head,
    )
    after = (
        b"t" + _REDUCE,
        _integer(0),  # offset
        _tuple(*map(_integer, array.shape)),
        _tuple(*map(_integer, strides)),
        _FALSE,  # needs no gradient
        _global("collections", "OrderedDict") + b")" + _REDUCE,  # backward hooks
        b"t" + _REDUCE,
    )
    return [b"".join(before), values, b"".join(after)]


def _head(array: np.ndarray) -> bytes:
    """What stands before the values of a storage in torch.save's old format."""
    sizes = _dict({"short": _integer(2), "int": _integer(4), "long": _integer(4)})
    system = {
        "protocol_version": _integer(_PROTOCOL_VERSION),
        "little_endian": _TRUE,
        "type_sizes": sizes,
    }
    key = _text("0")
    storage = _tuple(
        _text("storage"),
        _global("torch", STORAGES[array.dtype.name]),
        key,
        _text("cpu"),
        _integer(array.size),
        _NONE,  # not a view of another
    )
    pickles = (
        _integer(_MAGIC),
        _integer(_PROTOCOL_VERSION),
        _dict(system),
        storage + _PERSISTENT_ID,
        b"](" + key + b"e",
    )
    pickled = (_begin(protocol=2) + value + _END for value in pickles)
    return b"".join(pickled) + struct.pack("<q", array.size)


# The opcodes of pickle that are needed.


def _begin(*, protocol: int) -> bytes:
    return b"\x80" + bytes([protocol])


def _integer(value: int) -> bytes:
    if -_INT32 <= value < _INT32:
        return b"J" + struct.pack("<i", value)
    num_bytes = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([num_bytes]) + value.to_bytes(num_bytes, "little", signed=True)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _tuple(*items: bytes) -> bytes:
    return b"".join((b"(", *items, b"t"))


def _dict(items: dict[str, bytes]) -> bytes:
    return b"".join((b"}(", *(_text(key) + value for key, value in items.items()), b"u"))


def _global(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()

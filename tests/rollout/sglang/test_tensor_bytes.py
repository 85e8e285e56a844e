"""Payloads of the bytes route, read by torch and by the scripted server."""

import base64
import io
import pickle
import pickletools

import ml_dtypes
import numpy as np
import pytest

from codjax.rollout.sglang import tensor_bytes
from tests.rollout.sglang import push_server

ARRAYS = [
    ("a.weight", np.arange(6, dtype=np.float32).reshape(2, 3)),
    ("b.weight", np.asarray([1.5, -2.0], ml_dtypes.bfloat16)),
    ("c.weight", np.ones((2, 1, 2), np.float16)),
    ("ä.scalar", np.asarray(7.0, np.float32)),
]


def test_torch_reads_the_tensors():
    torch = pytest.importorskip("torch")
    pickled = base64.b64decode(tensor_bytes.payload(ARRAYS))
    read = pickle.loads(pickled)
    assert [name for name, _ in read] == [name for name, _ in ARRAYS]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    assert [tensor.dtype for _, tensor in read] == dtypes
    for (_, tensor), (_, array) in zip(read, ARRAYS, strict=True):
        assert tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_torch_reads_each_storage_with_weights_only():
    """As SGLang does, whose unpickler gives torch.load the bytes with this argument."""
    torch = pytest.importorskip("torch")
    pickled = base64.b64decode(tensor_bytes.payload(ARRAYS[:1]))
    [file] = [arg for op, arg, _ in pickletools.genops(pickled) if op.name == "BINBYTES8"]
    storage = torch.load(io.BytesIO(file), weights_only=True)
    np.testing.assert_array_equal(
        np.frombuffer(bytes(storage.untyped()), np.float32), ARRAYS[0][1].reshape(-1)
    )


def test_the_scripted_server_reads_them_too():
    for (name, array), (found, values) in zip(
        ARRAYS, push_server.read_payload(tensor_bytes.payload(ARRAYS)), strict=True
    ):
        assert (found, values.dtype, values.shape) == (name, array.dtype, array.shape)
        np.testing.assert_array_equal(values, array)


def test_a_transposed_array_is_sent_as_it_is_read():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    [(_, values)] = push_server.read_payload(tensor_bytes.payload([("t", array)]))
    np.testing.assert_array_equal(values, array)


@pytest.mark.parametrize("value", [0, -5, 2**31 - 1, 2**31, 2**40])
def test_sizes_above_32_bits_are_written_as_long(value):
    pickled = tensor_bytes._begin(protocol=2) + tensor_bytes._integer(value) + b"."
    assert pickle.loads(pickled) == value

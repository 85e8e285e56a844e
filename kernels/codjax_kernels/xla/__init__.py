"""Both operations in plain JAX: what runs on CPUs, and everywhere until a kernel is faster."""

from codjax_kernels.xla import attention, logprobs

__all__ = ["attention", "logprobs"]

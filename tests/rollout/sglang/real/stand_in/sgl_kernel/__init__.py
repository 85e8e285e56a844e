"""Takes the place of SGLang's native kernels on a CPU.

SGLang imports names from `sgl_kernel` when it starts, and PyPI has that package for GPUs only. On
a CPU without AMX it then computes with torch alone and calls none of them. So every name is there,
and to call one is an error that names it. Goes on the server's PYTHONPATH, with `sitecustomize`.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is a native kernel; the stand-in has none.")

    return kernel

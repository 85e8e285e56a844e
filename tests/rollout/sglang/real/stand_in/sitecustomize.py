"""Lets SGLang import PyPI's torchvision beside a torch that was built for CPUs.

Python runs this file first of all. That torchvision cannot load its native library there, and then
fails to describe operators which the library would have brought. They are declared here, at the
moment when torchvision is imported; a server of texts never calls them. Saves 3 GB, the CUDA torch.
"""

import importlib.abc
import importlib.metadata
import sys

_libraries = []  # what is declared lasts as long as its library


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing: it only hears that torchvision is looked for."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        builds = [importlib.metadata.version(name) for name in ("torch", "torchvision")]
        if builds[0].endswith("+cpu") and "+" not in builds[1]:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
            _libraries.append(library)


sys.meta_path.insert(0, _DeclareOperators())

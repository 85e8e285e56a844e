"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import codjax_kernels
import pytest

import codjax

MODULES = [
    module.name
    for package in (codjax, codjax_kernels)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0

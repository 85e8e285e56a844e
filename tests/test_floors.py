"""The module map of the house, held by the imports themselves.

A module imports from its own floor and lower ones, the rollout side knows no Flax, the kernels
know only JAX, and nothing of ours knows torch or SGLang: that server is another process.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Module, or package with all that is in it -> floor, counted from the ground.
FLOORS = {
    "codjax": 0,
    "codjax.types": 0,
    "codjax.seeds": 0,
    "codjax.config": 0,
    "codjax.shapes": 0,
    "codjax.checks": 0,
    "codjax.config_files": 0,
    "codjax.validation": 0,
    "codjax.waits": 0,
    "codjax.workdirs": 0,
    "codjax.masked": 0,
    "codjax_kernels": 0,
    "codjax.packs": 1,
    "codjax.credit": 1,
    "codjax.scoring": 1,
    "codjax.batching": 1,
    "codjax.pipeline": 1,
    "codjax.replay": 1,
    "codjax.logprobs": 1,
    "codjax.losses": 1,
    "codjax.models": 2,
    "codjax.sharding": 2,
    "codjax.distributed": 2,
    "codjax.optim": 2,
    "codjax.learner": 2,
    "codjax.checkpoints": 2,
    "codjax.serialization": 2,
    "codjax.chat": 3,
    "codjax.envs": 3,
    "codjax.rollout": 3,
    "codjax.metrics": 3,
    "codjax.progress": 3,
    "codjax.plots": 3,
    "codjax.build": 4,
    "codjax.memory": 4,
    "codjax.interrupts": 0,
    "codjax.rollouts": 4,
    "codjax.serve": 4,
    "codjax.data": 4,
    "codjax.serving": 4,
    "codjax.warmup": 4,
    "codjax.policies": 4,
    "codjax.parameters": 4,
    "codjax.evaluate": 4,
    "codjax.train": 4,
    "codjax.plan": 4,
    "codjax.bench": 4,
    "codjax.convert": 4,
    "codjax.output_folder": 4,
    "codjax.weight_sources": 4,
    "codjax.cli": 4,
    "codjax.__main__": 4,
}
# Imports that may go up, inside functions only: the config names environments, and to check a
# name and its settings one must ask them.
ALLOWED_UPWARDS = {("codjax.validation.tasks", "codjax.envs")}
JAX_IN_ROLLOUT = {"codjax.rollout.engine", "codjax.rollout.decoding"}
KERNEL_IMPORTS = {"jax", "jaxlib", "jaxtyping", "numpy", "codjax_kernels"} | sys.stdlib_module_names


def module_name(path):
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in ("codjax", "kernels/codjax_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(text, *, name, is_package):
    """(module, whether at the top level) of every import of one of our modules or another's."""
    tree = ast.parse(text)
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".") if is_package else name.split(".")[:-1]
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            # `from codjax import credit` is an import of codjax.credit, not of codjax.
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [full if full in FILES else base for full in names]
        else:
            continue
        for target in targets:
            yield target, id(node) in top_level


def floor_of(module):
    """Floor of a module: its own entry, or that of the package it is in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        found = FLOORS.get(".".join(parts[:length]))
        if found is not None and (length > 1 or parts[0] != "codjax" or len(parts) == 1):
            return found
    raise AssertionError(f"{module} has no floor: add it to FLOORS, and to the table in the docs.")


def violations(name, text, *, is_package=False):
    """What a module of ours imports and must not."""
    found = []
    for target, is_top_level in imports_of(text, name=name, is_package=is_package):
        root = target.split(".")[0]
        if root in ("codjax", "codjax_kernels") and target != name:
            lazily = (name, target) in ALLOWED_UPWARDS and not is_top_level
            if floor_of(target) > floor_of(name) and not lazily:
                found.append(f"{name} imports {target}, which is on a higher floor")
        if root in ("torch", "sglang"):
            found.append(f"{name} imports {root}")
        if name.startswith("codjax_kernels") and root not in KERNEL_IMPORTS:
            found.append(f"{name} imports {root}; kernels know only JAX")
        if name.startswith("codjax.rollout"):
            if root in ("flax", "optax"):
                found.append(f"{name} imports {root}, of the learner's side")
            if root == "jax" and name not in JAX_IN_ROLLOUT:
                found.append(f"{name} imports jax, which only the engine may")
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_what_it_may(name):
    path = FILES[name]
    text = path.read_text(encoding="utf-8")
    assert violations(name, text, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("codjax.credit", "from codjax import types", None),
        ("codjax.credit", "from codjax.train import main", "codjax.train, which is on a higher"),
        ("codjax.types", "import codjax.credit", "codjax.credit, which is on a higher floor"),
        ("codjax.rollout.runner", "from codjax import metrics", None),
        ("codjax.rollout.runner", "from . import sampler", None),
        ("codjax.rollout.runner", "from .. import cli", "codjax.cli, which is on a higher floor"),
        ("codjax.rollout.runner", "import jax.numpy", "imports jax, which only the engine may"),
        ("codjax.rollout.engine", "import jax", None),
        ("codjax.rollout.engine", "from flax import nnx", "imports flax, of the learner's side"),
        ("codjax.models.qwen3", "def f():\n    import torch", "imports torch"),
        ("codjax.validation.tasks", "def f():\n    from codjax import envs", None),
        (
            "codjax.validation.tasks",
            "from codjax import envs",
            "codjax.envs, which is on a higher floor",
        ),
        ("codjax_kernels.logprobs", "import jax, numpy, functools", None),
        ("codjax_kernels.logprobs", "import flax", "imports flax; kernels know only JAX"),
        ("codjax_kernels.logprobs", "from codjax import masked", "imports codjax; kernels know"),
    ],
)
def test_the_check_itself(name, text, problem):
    found = violations(name, text)
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


def test_importing_has_no_heavy_price():
    """The modules that the command line loads first stay free of JAX at the top level."""
    for name in ("codjax", "codjax.config", "codjax.checks", "codjax.config_files"):
        text = FILES[name].read_text(encoding="utf-8")
        roots = {
            target.split(".")[0] for target, _ in imports_of(text, name=name, is_package=False)
        }
        assert not roots & {"jax", "flax", "optax", "transformers", "matplotlib"}

"""A small config through the real TPU compiler: what is read off, and advice that holds."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import hlo, topologies

from codjax import cli, config_files, plan
from codjax.checks import ConfigError
from codjax.plan import compiled, text

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler"
)
CONFIG = """
from codjax.config import default_config, taskset

def get_config():
    config = default_config()
    config.tokenizer.source = "builtin:bytes"
    config.model.vocab_size = 512
    config.model.num_layers = 3
    config.model.head_dim = 64
    config.tasksets.lake = taskset(env="frozen_lake_obscure", split="train")
    config.rollout.tasksets = ("lake",)
    config.rollout.max_prompt_tokens = 192
    config.rollout.max_response_tokens = 64
    config.batching.row_length = 256
    config.batching.scored_per_row = 64
    config.batching.rows_per_microbatch = 2
    config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor = 1, 2, 2, 2
    config.kernels.implementation = "xla"
    return config
"""
D, F, LAYERS, VOCABULARY = 64, 256, 3, 512
LAYER = D * (4 + 2 + 2) * 64 + 4 * 64 * D + 3 * D * F  # without the norms


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


@needs_libtpu
def test_a_small_plan(config_path, tmp_path, capsys):
    output = tmp_path / "plans" / "plan.json"
    args = ["plan", f"--config={config_path}", "--topology=v5e:2x4", f"--output={output}"]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "It fits: " in printed
    made = json.loads(output.read_text())
    assert made["fits"]
    assert made["num_devices"] == 8
    assert made["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2, "expert": 1}
    norms = LAYERS * (2 * D + 2 * 64) + D
    assert made["model"]["num_parameters"] == VOCABULARY * D + LAYERS * LAYER + norms
    # Matrices are cut over fsdp and tensor, norms are whole; two moments and two counts.
    params = 4 * ((VOCABULARY * D + LAYERS * LAYER) // 4 + norms)
    assert made["state_bytes"] == {
        "params": params,
        "gradients": params,
        "optimizer": 2 * params + 8,
        "reference": 0,
    }
    step = made["programs"]["accumulate"]
    assert step["total_bytes"] == step["memory"]["peak"] + 2 * params + 8
    assert step["memory"]["arguments"] >= 2 * params
    assert made["advice"] is None
    sampler = made["sampler"]
    assert sampler["num_processes"] == 2  # hosts of four chips: each samples with a whole copy
    assert sampler["weights_bytes"] == 4 * made["model"]["num_parameters"]
    assert sampler["fits"]
    assert "Sampling in process fits beside it: " in printed

    rows = {(row["kind"], *row["axes"]): row for row in step["collectives"]}
    # Each layer gathers its matrices over fsdp, forward and again backward, in bfloat16; most of
    # the rest is the table, for the loss head.
    halves = 2 * LAYERS * LAYER // 2 // 2 * 2
    gathered = rows["all-gather", "fsdp"]["received_bytes"]
    assert halves * 0.9 < gathered < halves + 2 * (VOCABULARY * D)
    # Sums of bfloat16 activations over tensor: two forward, one again, two backward; a lookup.
    activations = 128 * D * 2
    summed = rows["all-reduce", "tensor"]["received_bytes"]
    assert summed == pytest.approx((5 * LAYERS + 1) * activations, rel=0.1)
    assert "?" not in {axis for row in step["collectives"] for axis in row["axes"]}

    floor, bounds = step["floor"], made["throughput"]
    assert floor["compute_s"] == pytest.approx(made["operations"]["hardware"] / 8 / 197e12)
    assert floor["floor_s"] == max(floor[f"{name}_s"] for name in ("compute", "memory", "links"))
    assert bounds["tokens_per_s"] == pytest.approx(2 * 256 / floor["floor_s"])
    assert 0 < bounds["mfu"] <= made["operations"]["model"] / made["operations"]["hardware"]


@needs_libtpu
def test_a_program_that_a_cache_has_is_compiled_again(tmp_path):
    mesh = topologies.mesh("v5e:1x1", {"a": 1})
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=placed)
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        jax.jit(jnp.dot).trace(shape, shape).lower(lowering_platforms=("tpu",)).compile()
        for _ in range(2):
            traced = jax.jit(jnp.dot).trace(shape, shape)
            found = compiled.compile_program(traced, mesh, unknown_trips=1)
            assert found["memory"]["outputs"] == 4 * 256**2
            assert found["memory_bytes"] > 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@needs_libtpu
@pytest.mark.slow
def test_advice_is_compiled_before_it_is_given(config_path, tmp_path, capsys):
    """1.5M tokens through 64 layers take 26 GiB of a device, half of them 13."""
    config = config_files.load(str(config_path))
    config.model.num_layers = 64
    config.mesh.update({"data": 1, "fsdp": 1, "context": 1, "tensor": 1})
    config.batching.rows_per_microbatch = 6144
    output = tmp_path / "plan.json"
    assert not plan.main(config, "v5e:1x1", str(output))
    printed = capsys.readouterr().out
    assert "It does not fit: the compiler refuses it (15.75 GiB" in printed
    assert printed.endswith("under\n    --config.batching.rows_per_microbatch=3072\n")
    advice = json.loads(output.read_text())["advice"]
    assert advice["overrides"] == {"batching.rows_per_microbatch": 3072}
    assert advice["total_bytes"] < 15.75 * 2**30


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "override", "message"),
    [
        ("v9z:2x2", None, "--topology: there is no TPU topology 'v9z:2x2'. Names are CHIP or CHIP"),
        ("v5e:2x2", None, "must be the number of devices, 4; got mesh.data = 1, mesh.fsdp = 2, "),
        (
            "v5e:2x4",
            ("model.vocab_size", 513),
            "mesh: axis 'vocab' of size 513 must divide by mesh.tensor = 2, which cuts it",
        ),
        (
            "v5e:2x4",
            ("kernels.implementation", "pallas_gpu"),
            "kernels.implementation must run on the devices found, which are tpus",
        ),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(config_path, topology, override, message):
    config = config_files.load(str(config_path))
    if override:
        section, name = override[0].split(".")
        config[section][name] = override[1]
    with pytest.raises(ConfigError) as error:
        plan.make_plan(config, topology)
    assert message in str(error.value)


def test_without_libtpu_the_message_says_what_to_install(config_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    assert cli.main(["plan", f"--config={config_path}", "--topology=v5e:2x4"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err


def test_collectives_by_kind_and_axes():
    def sums(groups, times, num_bytes):
        return hlo.Collective("all-reduce", num_bytes, np.array(groups), times, f"{num_bytes}")

    found = compiled.by_kind_and_axes(
        [
            sums([[0, 1], [2, 3]], 3, 100),
            sums([[0, 1], [2, 3]], 1, 1000),
            sums([[0, 1, 2, 3]], 1, 8),
            sums(np.zeros((0, 0), int), 1, 4),
        ],
        {"data": 2, "fsdp": 1, "tensor": 2},
    )
    assert found == [
        {
            "kind": "all-reduce",
            "axes": ["tensor"],
            "count": 4,
            "received_bytes": 3 * 100 + 1000,
            "largest": "1000",
        },
        {
            "kind": "all-reduce",
            "axes": ["data", "tensor"],
            "count": 1,
            "received_bytes": 12,
            "largest": "8",
        },
        {"kind": "all-reduce", "axes": ["?"], "count": 1, "received_bytes": 4, "largest": "4"},
    ]


def test_nothing_that_helps_is_said_too():
    said = text.advise({"overrides": None, "total_bytes": None, "tried": [{}, {}]})
    assert said.startswith("None of 2 changes makes it fit: take a larger topology")

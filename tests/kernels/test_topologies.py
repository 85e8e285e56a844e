"""The TPU compiler on a machine without TPUs: names, errors, and what is read from its output.

Tests that need the compiler run where libtpu is installed; they are slow.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import pytest
from codjax_kernels import cycles, topologies
from jax.sharding import NamedSharding, PartitionSpec

# As the compiler prints them, cut to what is read. 5 + 7 once; 3 times the body (100 + 3) and in
# it 2 times 10; of the branches the costlier, 50.
HLO = """
HloModule jit_step, is_scheduled=true

%inner_body (p: (s32[])) -> (s32[]) {
  %fusion.9 = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"flag_configs":[],"bundle_analysis_data":{"estimated_cycles":"10","flops":"0"}}
  ROOT %tuple.9 = (s32[]) tuple(%i)
}

%inner_condition (p: (s32[])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(2)
  ROOT %lt.9 = pred[] compare(%i, %constant.2), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %kernel.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"bundle_analysis_data":{"estimated_cycles":"100"}}
  %copy.1 = f32[8]{0} copy(%y), backend_config={"window_config":{"estimated_cycles":"4444"},"bundle_analysis_data":{"estimated_cycles":"3"}}
  %while.2 = (s32[]) while(%t), condition=%inner_condition, body=%inner_body, metadata={op_name="scan"}
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%i, %x)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3)
  ROOT %lt.1 = pred[] compare(%i, %constant.3), direction=LT
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %fusion.3 = f32[8]{0} fusion(%p), backend_config={"bundle_analysis_data":{"estimated_cycles":"20"}}
}

%costly (p: f32[8]) -> f32[8] {
  ROOT %fusion.4 = f32[8]{0} fusion(%p), backend_config={"bundle_analysis_data":{"estimated_cycles":"50"}}
}

%called (p: f32[8]) -> f32[8] {
  ROOT %fusion.5 = f32[8]{0} fusion(%p), backend_config={"bundle_analysis_data":{"estimated_cycles":"7"}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %fusion.1 = f32[8]{0} fusion(%x), backend_config={"bundle_analysis_data":{"estimated_cycles":"5"}}
  %custom-call = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer", backend_config={"bundle_analysis_data":{"estimated_cycles":"0"}}
  %while.1 = (s32[], f32[8], /*index=2*/f32[8]) while(%t), condition=%condition, body=%body
  %call.1 = f32[8]{0} call(%x), to_apply=%called
  ROOT %conditional.1 = f32[8]{0} conditional(%i, %x, %x), branch_computations={%cheap, %costly}
}
"""  # noqa: E501


def test_cycles_are_read_from_the_program_with_its_loops_multiplied_out():
    assert cycles.cycles_by_operation(HLO) == {
        "fusion.1": 5,
        "kernel.1": 3 * 100,
        "copy.1": 3 * 3,
        "fusion.9": 3 * 2 * 10,
        "fusion.5": 7,
        "fusion.4": 50,
    }


def test_a_loop_of_unknown_length_has_no_cycles():
    unknown = HLO.replace("constant(3)", "get-tuple-element(%p), index=1")
    with pytest.raises(ValueError, match=r"the loop %.* has no constant length"):
        cycles.cycles_by_operation(unknown)


def test_what_a_chip_can_do():
    v5e = topologies.chip_of("v5e:4x4")
    assert v5e is topologies.chip_of("V5E")
    assert v5e.clock_hz == pytest.approx(1.5e9, rel=0.01)
    # One product of K 2,048, D 1,024 and V 8,192, 65,536 multiply-adds a cycle.
    assert v5e.matrix_cycles(2 * 2048 * 1024 * 8192) == 262_144
    clocks = {name: chip.clock_hz / 1e9 for name, chip in topologies.CHIPS.items()}
    expected = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
    assert clocks == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["v9", "v5e:", "v5e:4", "v7x:2x2x1", "v5litepod-16", ""])
def test_a_name_that_means_nothing_is_answered_with_those_that_do(name):
    with pytest.raises(ValueError, match=r"no TPU topology .* one of v4, v5e, v5p, v6e, tpu7x"):
        topologies.devices(name)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    for ask in (topologies.devices, functools.partial(cycles.simulate, jnp.sin, topology="v5e")):
        with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
            ask(*(("v5e",) if ask is topologies.devices else ()))


def test_the_environment_is_as_before_once_libtpu_is_loaded(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    before = dict(os.environ)
    with topologies._environment(topologies._WITHOUT_DEVICES):
        assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert dict(os.environ) == before


# What the tests below compile; `simulate` imports this file by its name.


def product(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def product_in_parts(x, w):
    return jax.lax.map(lambda part: product(part, w), x.reshape(8, -1, x.shape[1]))


def picked(x, index):
    return jnp.take_along_axis(x, index[:, None], axis=1)


def shape(*sizes, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


X, W = shape(2048, 1024), shape(1024, 4096)


@pytest.fixture
def _compiler():
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")


@pytest.mark.slow
@pytest.mark.usefixtures("_compiler")
class TestCompiler:
    @pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
    def test_a_product_takes_little_more_than_its_matrix_operations(self, chip):
        simulated = cycles.simulate(product, X, W, topology=chip)
        least = topologies.chip_of(chip).matrix_cycles(2 * 2048 * 1024 * 4096)
        # Filling the pipelines; the wider the units, the more it weighs.
        assert least < simulated.cycles < 2 * least
        assert simulated.memory.arguments == 2 * (2048 * 1024 + 1024 * 4096)
        assert simulated.memory.outputs == 4 * 2048 * 4096

    def test_a_loop_counts_as_often_as_it_runs(self):
        whole = cycles.simulate(product, X, W)
        parts = cycles.simulate(product_in_parts, X, W)
        assert whole.cycles < parts.cycles < 2 * whole.cycles

    def test_what_the_simulator_has_no_model_of_ends_only_its_own_process(self):
        with pytest.raises(cycles.SimulatorError, match="SIGABRT ended the TPU compiler"):
            cycles.simulate(picked, shape(2048, 16384), shape(2048, dtype=jnp.int32))

    def test_a_program_that_is_wrong_is_answered_with_its_error(self):
        with pytest.raises(cycles.SimulatorError, match="TypeError: dot_general requires"):
            cycles.simulate(product, X, X)

    def test_a_simulation_that_takes_too_long_is_ended(self):
        with pytest.raises(cycles.SimulatorError, match=r"longer than timeout_s = 0\.1"):
            cycles.simulate(product, X, W, timeout_s=0.1)

    def test_a_layout_that_libtpu_refuses_is_answered_with_those_it_takes(self):
        with pytest.raises(ValueError, match=r"no TPU topology 'v5e:3x5': .* Names are CHIP"):
            topologies.devices("v5e:3x5")

    @pytest.mark.parametrize(
        ("topology", "axes"),
        [("v5e:4x4", {"fsdp": 8, "model": 2}), ("v5p:2x2x2", {"fsdp": 4, "model": 2})],
    )
    def test_a_program_over_a_mesh_is_compiled_for_one_device_of_it(self, topology, axes):
        mesh = topologies.mesh(topology, axes)
        assert mesh.shape == axes
        x, w = (
            shape(2048, 1024, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))),
            shape(1024, 4096, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "model"))),
        )
        compiled = topologies.compile(product, x, w, topology=mesh)
        num_rows, num_parts = axes["fsdp"], axes["fsdp"] * axes["model"]
        held = 2 * (2048 * 1024 // num_rows + 1024 * 4096 // num_parts)
        assert topologies.memory(compiled).arguments == held
        assert "all-gather" in compiled.as_text()

    def test_axes_must_multiply_to_the_devices(self):
        with pytest.raises(ValueError, match=r"'v5e:2x2' has 4; got fsdp 2 x model 4 = 8"):
            topologies.mesh("v5e:2x2", {"fsdp": 2, "model": 4})

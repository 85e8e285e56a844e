"""What a compiled program's text says: loops multiplied out, collectives with known bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import hlo
from jax.sharding import NamedSharding, PartitionSpec

# What the TPU compiler writes, shortened: a gather in three pieces beside other work, a sum that is
# cut at once, in a loop of four turns that reads a layer of a stack at a time.
TPU_PROGRAM = """\
HloModule jit_step

%start (param_0.1: bf16[2,8]) -> (bf16[2,8], bf16[4,8]) {
  %param_0.1 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=7, \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %custom-call.1 = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) custom-call(%param_0.1, %all-gather.1)
}

%piece (param_0.2: bf16[2,8], param_1.2: f32[16]) -> (f32[16], bf16[2,8]) {
  %param_0.2 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = f32[16]{0:T(128)} parameter(1)
  %all-gather.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=7, \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="3"}
  %exp = f32[16]{0:T(128)} exponential(%param_1.2)
  ROOT %tuple.2 = (f32[16]{0}, bf16[2,8]{1,0}) tuple(%exp, %param_0.2)
}

%all-reduce-scatter.5 (input: bf16[4,8]) -> bf16[2,8] {
  %input = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=9, \
replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %dynamic-slice.9 = bf16[2,8]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.9, %c)
}

%layer_of_stack (param_0.3: f32[4,16], param_1.3: s32[]) -> f32[16] {
  %param_0.3 = f32[4,16]{1,0:T(8,128)} parameter(0)
  %param_1.3 = s32[]{:T(128)} parameter(1)
  %dynamic-slice.3 = f32[1,16]{1,0:T(8,128)} dynamic-slice(%param_0.3, %param_1.3)
  ROOT %bitcast.3 = f32[16]{0:T(128)} bitcast(%dynamic-slice.3)
}

%condition (p: (s32[], f32[4,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %p.1 = (s32[]{:T(128)}, f32[4,16]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %stack = f32[4,16]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %x = f32[16]{0:T(128)} fusion(%stack, %i.1), kind=kLoop, calls=%layer_of_stack
  %shard = bf16[2,8]{1,0:T(8,128)(2,1)} convert(%x)
  %fusion.1 = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) fusion(%shard), kind=kCustom, calls=%start
  %fusion.2 = (f32[16]{0}, bf16[2,8]{1,0}) fusion(%shard, %x), kind=kCustom, calls=%piece
  %whole = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=1
  %sum = bf16[2,8]{1,0:T(8,128)(2,1)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.5
  ROOT %tuple = (s32[]{:T(128)}, f32[4,16]{1,0:T(8,128)}) tuple(%i.1, %stack)
}

ENTRY %main (a: f32[4,16]) -> f32[4,16] {
  %a = f32[4,16]{1,0:T(8,128)} parameter(0)
  %kept = f32[64]{0:T(128)S(1)} copy(%a)
  %while = (s32[]{:T(128)}, f32[4,16]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[4,16]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def test_pieces_of_a_transfer_are_one_and_fused_sums_are_scattered():
    gather, scatter = hlo.collectives(hlo.parse(TPU_PROGRAM))
    assert (gather.kind, gather.times, gather.operand_bytes) == ("all-gather", 4, 2 * 8 * 2)
    assert gather.groups.tolist() == [[0, 2], [1, 3]]
    assert gather.received_bytes == 32  # one of two shards of 32 bytes
    assert (scatter.kind, scatter.times, scatter.operand_bytes) == ("reduce-scatter", 4, 64)
    assert scatter.groups.tolist() == [[0, 1], [2, 3]]
    assert scatter.received_bytes == 32


def test_memory_traffic_counts_slices_turns_and_main_memory_only():
    copied = 4 * 16 * 4  # read; what it becomes is in vector memory
    layer = 4 + 16 * 4 + 16 * 4  # its number, one of four layers read, and written as it is
    converted = 16 * 4 + 2 * 8 * 2
    piece = 16 * 4 + 16 * 4  # the exponential; the gather's buffers are only handed on
    scattered = 2 * 8 * 2  # its slice is written; what it sums is the transfer's
    turn = layer + converted + piece + scattered
    assert hlo.memory_bytes(hlo.parse(TPU_PROGRAM)) == copied + 4 * turn


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,0},{1,2},{2,1}}", [[1, 2], [2, 1]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=something new", []),
    ],
)
def test_every_spelling_of_groups(written, groups):
    line = f"  %x = f32[] all-reduce(%y), {written}, channel_id=1"
    assert hlo._groups(line, 4).tolist() == groups


def sharded_program(mesh):
    """A scan of three turns with one collective of each kind, over 64 floats a device."""

    def on_device(x):
        def turn(x, _):
            x = x + jax.lax.psum(x, "a")
            parts = jax.lax.psum_scatter(x, "b", tiled=True)
            x = x + jax.lax.all_gather(parts * 2, "b", tiled=True)
            x = x + jax.lax.all_to_all(x.reshape(4, 16), "b", 0, 0, tiled=True).reshape(-1)
            return x + jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), None

        return jax.lax.scan(turn, x, length=3)[0]

    spec = PartitionSpec(("a", "b"))
    run = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    shape = jax.ShapeDtypeStruct((8 * 64,), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(run).lower(shape).compile().as_text()


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = {x.kind: x for x in hlo.collectives(hlo.parse(sharded_program(mesh)))}
    assert {kind: x.times for kind, x in found.items()} == dict.fromkeys(hlo.KINDS, 3)
    assert hlo.parse(sharded_program(mesh)).num_devices == 8
    along_a, along_b = [[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]]
    groups = {kind: x.groups.tolist() for kind, x in found.items()}
    assert groups["all-reduce"] == along_a
    both_ways = [*along_a, *[pair[::-1] for pair in along_a]]
    assert sorted(groups["collective-permute"]) == sorted(both_ways)
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert groups[kind] == along_b
    # A device has 256 bytes; of four parts it must receive three.
    received = {kind: x.received_bytes for kind, x in found.items()}
    assert received == {
        "all-reduce": 2 * 256 / 2,
        "all-gather": 3 * 64,
        "reduce-scatter": 256 * 3 / 4,
        "all-to-all": 256 * 3 / 4,
        "collective-permute": 256,
    }


def test_a_loop_that_ends_by_its_data_is_given_its_turns():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def on_device(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.psum(x, "a") / 8, x)

    spec = PartitionSpec("a")
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )
    text = jax.jit(run).lower(np.zeros(16, np.float32), np.int32(1)).compile().as_text()
    count = functools.partial(hlo.collectives, hlo.parse(text))
    assert [x.times for x in count()] == [1]
    assert [x.times for x in count(unknown_trips=5)] == [5]

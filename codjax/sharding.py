"""Where arrays lie on the devices: a mesh, one table of rules, shardings of parameters and rows.

    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    params = jax.device_put(params, param_shardings(model, mesh))
    batch = jax.device_put(batch, batch_shardings(mesh))

Parameters and activations have logical axes ("embed", "heads", …); `RULES` says which mesh axes cut
which logical axis. Rows are cut over `data`, `fsdp` and `expert` together, their tokens over
`context`, parameters over `fsdp` and `tensor`, and experts over `expert`: to a device's rows come
those of the devices with the other experts, for the experts alone (`models/experts.py`). An axis
that does not divide is an error at start, never a silent copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import codjax_kernels
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codjax import models, types
from codjax.models import experts

MESH_AXES = (
    "data",
    "fsdp",
    "context",
    "tensor",
    "expert",
)  # each has a key of its name in `config.mesh`

RULES: dict[str, tuple[str, ...]] = {  # logical axis → mesh axes that cut it
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "norm": (),  # vectors: not worth gathering
    # activations
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("context",),
    "width": (),
}


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    context: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `MESH_AXES`.

    Args:
        data: groups of devices that hold the parameters each.
        fsdp: devices over which a group cuts rows and parameters.
        tensor: devices over which it cuts heads, MLP and vocabulary.
        context: devices over which the tokens of a row are cut, for long rows.
        expert: devices over which the experts are cut, and rows.
            One of the five may be -1: the devices that are left.
        devices: to be used; None for all devices of all processes.

    Raises:
        ValueError: the product is not the number of devices.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(data, fsdp, tensor, context, expert, num_devices=len(available))
    slices = num_slices(available)
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh.data must be a multiple of {slices}, the TPU slices, since only data may go "
            f"from slice to slice; got {sizes['data']}."
        )
    try:
        laid_out = _laid_out(tuple(sizes.values()), slices, available)
    except NotImplementedError as error:
        asked = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
        raise ValueError(
            f"mesh sizes must fit the links of the devices; got {asked}: {error}"
        ) from error
    return Mesh(laid_out, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _laid_out(sizes: tuple[int, ...], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours along its axes joined by links of TPUs.

    An axis of the mesh may be a part of an axis of links. `data`, the first axis, goes across
    slices, the slow way; all others stay inside one.
    """
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]),
        (slices, *[1] * (len(sizes) - 1)),
        devices,
        allow_split_physical_axes=True,
    )


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Groups of TPUs joined by links; 1 for anything but TPUs, and for one slice compiled for."""
    return len({getattr(device, "slice_index", 0) for device in devices if _is_tpu(device)}) or 1


def _is_tpu(device: jax.Device) -> bool:
    return device.platform == "tpu"


def one_device(device: jax.Device | None = None) -> Mesh:
    """The mesh of one device alone, None for the first."""
    return make_mesh(1, 1, 1, devices=jax.devices()[:1] if device is None else [device])


def mesh_sizes(
    data: int, fsdp: int, tensor: int, context: int = 1, expert: int = 1, *, num_devices: int
) -> dict[str, int]:
    """Devices along each mesh axis, with -1 resolved; touches no device.

    >>> mesh_sizes(-1, 2, 2, num_devices=8)
    {'data': 2, 'fsdp': 2, 'context': 1, 'tensor': 2, 'expert': 1}
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, tensor, expert), strict=True))
    asked = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh sizes must be at least 1, one of them may be -1 (the devices left); got {asked}."
        )
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif free or fixed != num_devices:
        must = "divide" if free else "be"
        raise ValueError(
            f"the product of the mesh sizes must {must} the number of devices, {num_devices}; "
            f"got {asked}: set one of them to -1 to use the devices that are left."
        )
    return sizes


def check_divisible(sizes: Mapping[str, int], mesh_shape: Mapping[str, int]) -> None:
    """Raise unless every logical axis divides by the mesh axes that cut it.

    Args:
        sizes: logical axis → size, such as `DecoderConfig.axis_sizes` or ``{"batch": rows}``.
        mesh_shape: mesh axis → devices: `mesh_sizes(…)` or ``mesh.shape``.

    Raises:
        ValueError: names the logical axis, its size, the mesh axes and their keys.
    """
    for axis, size in sizes.items():
        num_parts = math.prod(mesh_shape[mesh_axis] for mesh_axis in RULES[axis])
        if size % num_parts:
            cut = " * ".join(f"mesh.{name}" for name in RULES[axis])
            raise ValueError(
                f"axis {axis!r} of size {size} must divide by {cut} = {num_parts}, which cuts it; "
                f"choose sizes of the mesh whose product divides {size}."
            )


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes, one a dimension."""
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def param_shardings(model: models.Decoder, mesh: Mesh) -> dict[str, Any]:
    """Sharding of every parameter, in the nested dict of ``nnx.to_pure_dict(nnx.state(model))``.

    Args:
        model: the model; may be abstract (`nnx.eval_shape`).
        mesh: of `make_mesh`.

    Raises:
        ValueError: an axis does not divide, as `check_divisible` says.
    """
    check_divisible(model.config.axis_sizes, mesh.shape)
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec(axes)),
        models.logical_axes(model),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def batch_shardings(mesh: Mesh) -> types.TokenBatch:
    """Sharding of every field of a batch.

    Rows are cut over `data`, `fsdp` and `expert`, their tokens over `context`. Whole over `context`
    are the subtree ends, which every query looks at, and the scored entries, of which each device
    does those whose source it has.
    """
    rows, tokens = (NamedSharding(mesh, spec(axes)) for axes in (("batch",), ("batch", "tokens")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    fields: dict[str, Any] = dict.fromkeys(types.TokenBatch._fields, rows)
    fields |= {"tokens": tokens, "token_positions": tokens}
    fields |= {"normaliser": everywhere, "num_scored": everywhere}
    return types.TokenBatch(**fields)


def layout(mesh: Mesh) -> codjax_kernels.Layout | None:
    """How the arrays of the kernels lie on the mesh; None on one device."""
    if mesh.size == 1:
        return None
    return codjax_kernels.Layout(
        mesh=mesh,
        rows=RULES["batch"],
        tokens=RULES["tokens"],
        heads=RULES["heads"],
        vocab=RULES["vocab"],
        width=RULES["embed"],
    )


def run_experts(mesh: Mesh) -> experts.RunExperts:
    """How the experts of a model are computed on the mesh."""
    if mesh.size == 1:
        return experts.run
    cut = experts.Cut(
        rows=RULES["batch"], tokens=RULES["tokens"], experts=RULES["experts"], mlp=RULES["mlp"]
    )
    return experts.on_mesh(mesh, cut)


def constrain(mesh: Mesh) -> Callable[[jax.Array, tuple[str, ...]], jax.Array]:
    """A function that pins an activation, given with its logical axes, to the mesh, in jit."""

    def pin(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))

    return pin


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Options of the compiler for programs whose parameters are cut over the mesh.

    The TPU compiler likes to multiply with a gathered matrix piece by piece, while the next piece
    arrives, and adds the products up in the dtype of the result. With rows this long that makes
    four times the memory traffic (Qwen3-8B's step on v5p:4x4x4, docs/plans.md) and 16 roundings
    in bfloat16; the threshold, in MiB, turns it off.
    """
    if not _is_tpu(mesh.devices.flat[0]):
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays on the mesh; every process holds all and sends its own devices their parts.

    Unlike `jax.device_put`, it does not ask the other processes whether they hold the same.
    """

    def put_one(array: Any, to: NamedSharding) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, to, lambda index: whole[index])

    # The one door for arrays of the host, so that all else may be under a transfer guard.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put_one, tree, shardings)


def place(mesh: Mesh) -> Callable[[tuple[int, ...], tuple[str, ...]], NamedSharding]:
    """A function that gives the sharding of a parameter, from its shape and logical axes.

    Raises, when called, ValueError: an axis does not divide, as `check_divisible` says.
    """

    def sharding(shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding:
        check_divisible(dict(zip(axes, shape, strict=True)), mesh.shape)
        return NamedSharding(mesh, spec(axes))

    return sharding

"""What a config's train step takes on a TPU topology, without a TPU and without weights.

    plan = make_plan(config, "v5e:16x16")        # compiles the programs that Learner.update runs
    text.describe(plan)                          # what `codjax plan` prints
    advice.search(config, plan)                  # what to change, where it does not fit

`compiled.py` compiles the two programs of an update and reads them, `counts.py` counts the
operations of the model, `roofline.py` holds both against the chip's published peaks,
`advice.py` looks for the smallest change that fits, `text.py` prints. docs/file_formats.md
describes `plan.json`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
from typing import Any

import codjax_kernels
import jax
from codjax_kernels import topologies
from ml_collections import ConfigDict

import codjax
from codjax import build, checks, learner, losses, memory, models, sharding
from codjax import chat as chats
from codjax.plan import advice, compiled, counts, roofline, text

_LOG = logging.getLogger(__name__)
_HEAD_BLOCK = 1024  # hidden states that the loss head takes at once (`passes.block_rows`)


def main(config: ConfigDict, topology: str, output: str | None = None) -> bool:
    """Plan, print, advise; whether the config fits the topology.

    Args:
        config: validated.
        topology: as "v5e:16x16".
        output: file to write `plan.json` to; None for none.

    Raises:
        ConfigError: there is no such topology, libtpu is missing, or sizes do not divide.
    """
    if output is not None:
        _check_writable(output)
    plan = make_plan(config, topology)
    print(text.describe(plan), flush=True)
    _write(plan, output)
    if not plan["fits"]:
        plan["advice"] = advice.search(
            config,
            plan,
            lambda changed: make_plan(changed, topology),
            lambda changed: sum(_state_bytes(changed, _learner(changed, topology)[0]).values()),
        )
        print(text.advise(plan["advice"]), flush=True)
        _write(plan, output)
    return bool(plan["fits"])


def _check_writable(output: str) -> None:
    """Before minutes of compiling."""
    path = pathlib.Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_writable = not path.is_dir() and os.access(
            path if path.exists() else path.parent, os.W_OK
        )
    except OSError:
        is_writable = False
    checks.require(
        is_writable, "--output", "name a file that can be written", "it gets the plan", output
    )


def _write(plan: dict[str, Any], output: str | None) -> None:
    if output is not None:
        pathlib.Path(output).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def make_plan(config: ConfigDict, topology: str) -> dict[str, Any]:
    """The content of `plan.json`, without advice.

    Args:
        config: validated.
        topology: as "v5e:16x16".

    Raises:
        ConfigError: as `main`.
    """
    made, model, mesh = _learner(config, topology)
    chip, work = topologies.chip_of(topology), _work(config, mesh)
    state = _state_bytes(config, made)
    operations = counts.operations(model, work)
    programs = {}
    traced = made.trace(row_length=work.row_length, scored_per_row=work.scored_per_row)
    for name, program in traced.items():
        _LOG.info("compiling %s for %s", name, topology)
        found = compiled.compile_program(program, mesh, unknown_trips=_head_turns(work, mesh))
        flops = operations["hardware"] / mesh.size if name == "accumulate" else 0.0
        # The optimizer's state is no argument of a micro-batch, and lies in memory all the same.
        beside = state["reference"] + (state["optimizer"] if name == "accumulate" else 0)
        programs[name] = found | {
            "beside_bytes": beside,
            "total_bytes": None if found["memory"] is None else found["memory"]["peak"] + beside,
            "hardware_flops": flops,
            "floor": roofline.floor(found, flops, chip),
        }
    totals = [program["total_bytes"] for program in programs.values()]
    return {
        "codjax": codjax.__version__,
        "jax": jax.__version__,
        "topology": topology,
        "num_devices": mesh.size,
        "chip": dataclasses.asdict(chip),
        "mesh": dict(mesh.shape),
        "model": {"num_parameters": counts.num_parameters(model)}
        | dataclasses.asdict(model.config),
        "batch": work._asdict(),
        "fits": all(total is not None and total <= chip.usable_bytes for total in totals),
        "state_bytes": state,
        "sampler": _sampler(config, model, mesh, state=state, totals=totals, chip=chip),
        "operations": operations,
        "programs": programs,
        "throughput": roofline.throughput(programs, operations, work, chip, mesh.size),
        "advice": None,
    }


def _sampler(
    config: ConfigDict,
    model: models.Decoder,
    mesh: jax.sharding.Mesh,
    *,
    state: dict[str, int],
    totals: list[int | None],
    chip: topologies.Chip,
) -> dict[str, Any]:
    """What sampling in process would take on a device, beside the learner."""
    processes = len({device.process_index for device in mesh.devices.flat})
    found = memory.sampler_bytes(config, model, mesh, num_processes=processes)
    if config.rollout.max_staleness:
        beside = max((total for total in totals if total is not None), default=None)
    else:
        beside = sum(state.values()) - state["gradients"]
    needed = None if beside is None else beside + sum(found.values())
    return {
        "num_processes": processes,
        "weights_bytes": found["weights"],
        "cache_bytes": found["cache"],
        "total_bytes": needed,
        "fits": needed is not None and needed <= chip.usable_bytes,
    }


def _learner(
    config: ConfigDict, topology: str
) -> tuple[learner.Learner, models.Decoder, jax.sharding.Mesh]:
    mesh, model = _mesh_and_model(config, topology)
    return build.policy_learner(config, model, mesh), model, mesh


def _work(config: ConfigDict, mesh: jax.sharding.Mesh) -> counts.Work:
    batching, rollout, loss = config.batching, config.rollout, config.loss
    name = config.kernels.implementation or codjax_kernels.implementation_of(
        mesh.devices.flat[0].platform
    )
    is_per_token = losses.is_per_token(loss.clip_mode, loss.weight_mode)
    return counts.Work(
        rows=batching.rows_per_microbatch,
        row_length=batching.row_length,
        scored_per_row=batching.scored_per_row or batching.row_length,
        sample_length=rollout.max_prompt_tokens + rollout.max_response_tokens,
        head_in_forward=is_per_token and codjax_kernels.has_gradient_in_forward(name),
    )


def _state_bytes(config: ConfigDict, made: learner.Learner) -> dict[str, int]:
    return memory.state_bytes(made, keeps_reference=config.loss.kl_coef != 0)


def _head_turns(work: counts.Work, mesh: jax.sharding.Mesh) -> int:
    """Blocks of the loss head on a device when every scored entry is used.

    Its loops end with the entries of the batch at hand, so that the program cannot tell. Where
    the tokens of a row are cut, entries are taken to be spread evenly over the parts.
    """
    rows = work.rows // _parts("batch", mesh)
    entries = math.ceil(work.scored_per_row / _parts("tokens", mesh))
    return max(1, math.ceil(rows * entries / _HEAD_BLOCK))


def _parts(axis: str, mesh: jax.sharding.Mesh) -> int:
    return math.prod(mesh.shape[name] for name in sharding.RULES[axis])


def _mesh_and_model(config: ConfigDict, topology: str) -> tuple[jax.sharding.Mesh, Any]:
    try:
        devices = topologies.devices(topology)
    except (ValueError, ModuleNotFoundError) as error:
        raise checks.ConfigError(f"--topology: {error}") from error
    model = build.make_model(config, chats.load_chat(config.tokenizer.source))
    try:
        mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
    except ValueError as error:
        raise checks.ConfigError(f"mesh, on --topology={topology}: {error}") from error
    build.check_mesh(config, model, mesh)
    return mesh, model

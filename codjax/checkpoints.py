"""Orbax checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint of step N holds the state after N optimizer steps and the loop's own position (data
cursor, rollouts that were sampled but not yet trained on). Random keys are not in it: they are
derived by name and step. A checkpoint that was being written when the process died is not seen.

Step 0 is the model before reinforcement learning; it is kept for ever, as the base of evaluation
and as the reference of the KL term.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from codjax import checks, learner

FOLDER = "checkpoints"  # in a workdir


class CheckpointError(checks.ConfigError):
    """A checkpoint that was asked for is not there."""


class Checkpoints:
    """Owns the folder `checkpoints/` of a workdir; `close` it to finish the last write."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int, read_only: bool = False):
        """Open the folder, and remove what a killed process left half written.

        Args:
            workdir: of the run.
            keep: newest checkpoints to keep, beside step 0.
            read_only: look and restore, change nothing.
        """
        self._folder = pathlib.Path(workdir).resolve() / FOLDER
        if read_only and not self._folder.is_dir():
            raise CheckpointError(
                f"{workdir} holds no checkpoints; train first: codjax train --workdir={workdir}"
            )
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=("params", "optimizer", "loop"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), checkpoint_managers.CustomSteps([0])]
                ),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def save(self, step: int, state: learner.TrainState, loop: dict[str, Any]) -> None:
        """Write in the background; the state may be used up at once.

        Args:
            step: optimizer steps so far.
            state: what `learner.update` returned.
            loop: the loop's position, as JSON values.
        """
        optimizer = {"opt_state": _as_tree(state.opt_state), "step": state.step}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params, save_args=_apart(state.params)),
                optimizer=ocp.args.StandardSave(optimizer),
                loop=ocp.args.JsonSave(loop),
            ),
        )

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step that can be restored, or None."""
        return self._manager.latest_step()

    def restore(
        self, step: int, like: learner.TrainState
    ) -> tuple[learner.TrainState, dict[str, Any]]:
        """State and loop position of a step.

        Args:
            step: one of `steps()`.
            like: shapes and shardings to restore to (`jax.ShapeDtypeStruct`s); the mesh may
                differ from the one that the checkpoint was written on.
        """
        optimizer = {"opt_state": _as_tree(like.opt_state), "step": like.step}
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                optimizer=ocp.args.StandardRestore(optimizer),
                loop=ocp.args.JsonRestore(),
            ),
        )
        opt_state = _like_tree(like.opt_state, found.optimizer["opt_state"])
        state = learner.TrainState(found.params, opt_state, found.optimizer["step"])
        return state, found.loop

    def restore_params(self, step: int, like: learner.Params) -> learner.Params:
        """The parameters of a step alone, with the shapes and shardings of `like`."""
        if step not in self.steps():
            raise CheckpointError(
                f"{self._folder} holds no step {step}; there are {self.steps() or 'none'}."
            )
        found = self._manager.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like))
        )
        return found.params

    def wait(self) -> None:
        """Until everything saved so far can be restored."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _apart(params: learner.Params) -> Any:
    """Layers stored apart, so that `codjax convert` can read them one at a time."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: ocp.SaveArgs(shard_axes=(0,) if len(path) > 1 else ()), params
    )


def _as_tree(opt_state: Any) -> dict[str, Any]:
    """An optimizer state as a flat dict, which does not depend on optax's tuple types."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _like_tree(like: Any, flat: dict[str, Any]) -> Any:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(
        structure, [flat[jax.tree_util.keystr(path)] for path, _ in paths]
    )

"""Checkpoints of a run: arrays by Orbax, written behind the steps; the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run's directory. Only complete ones count, whatever was killed.

    permanent: steps whose checkpoints stay (phase borders, the end).
    """

    def __init__(self, run_dir: str | Path, keep: int, permanent: frozenset[int]) -> None:
        policy = managers.AnyPreservationPolicy(
            [
                managers.LatestN(keep),
                managers.CustomSteps(sorted(permanent)),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=True)
        self._manager = ocp.CheckpointManager(
            Path(run_dir).resolve() / FOLDER,
            options=options,
            item_names=("state", "meta", "routes"),
        )

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any], routes: Any = None) -> None:
        """Starts writing; copies the state to the host first, so that it may be donated after."""
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave(meta),
        }
        if routes:
            items["routes"] = ocp.args.StandardSave(routes)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State, shaped and placed like `like`, and the JSON part."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), meta=ocp.args.JsonRestore()
            ),
        )
        return found["state"], found["meta"]

    def restore_routes(self, step: int, like: Any) -> Any:
        """The expert choices made ahead of their use."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(routes=ocp.args.StandardRestore(shapes))
        return self._manager.restore(step, args=args)["routes"]

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

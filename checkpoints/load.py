"""A converted checkpoint as the model runs it: layers stacked into scanned groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.store import densify, load_config, load_unit
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params, group_params
from dsv4_jax.params import unit_specs
from dsv4_jax.placement import shardings, unit_placement
from sharding.shards import Shards


def load_checkpoint(
    path: str | Path,
    *,
    scan: bool = True,
    dense_dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
    shards: Shards | None = None,
) -> tuple[ModelConfig, Params]:
    """Configuration and grouped parameters of a checkpoint that `scripts/convert_hf.py` wrote.

    scan: stack repeating layers, so that compile time does not grow with depth.
    dense_dtype: decode quantised matrices to this dtype at load; None keeps them as stored.
    progress: called with (units loaded, units in all).
    shards: a mesh to spread the parameters over; each process reads what its devices hold. Without
        one, everything goes to the first device.

    Raises:
        CheckpointError: `path` is no complete converted checkpoint, or it is damaged.
        ValueError: the parameters do not divide over the mesh.
    """
    cfg = load_config(path)
    total, done = len(unit_specs(cfg)), 0

    def load(unit: str) -> Any:
        nonlocal done
        placed = None if shards is None else shardings(unit_placement(cfg, unit, shards), shards)
        tree = load_unit(path, unit, cfg, placed)
        done += 1
        if progress:
            progress(done, total)
        return tree if dense_dtype is None else densify(tree, dense_dtype)

    params = group_params(cfg, load, scan)
    if dense_dtype is not None:
        cfg = cfg.replace(dense_format=None, expert_format=None)
    return cfg, params

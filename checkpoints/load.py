"""A converted checkpoint as the model runs it: layers stacked into scanned groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.store import densify, load_config, load_unit
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params, group_params
from dsv4_jax.params import unit_specs


def load_checkpoint(
    path: str | Path,
    *,
    scan: bool = True,
    dense_dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """Configuration and grouped parameters of a checkpoint that `scripts/convert_hf.py` wrote.

    scan: stack repeating layers, so that compile time does not grow with depth.
    dense_dtype: decode quantised matrices to this dtype at load; None keeps them as stored.
    progress: called with (units loaded, units in all).

    Raises:
        CheckpointError: `path` is no complete converted checkpoint, or it is damaged.
    """
    cfg = load_config(path)
    total, done = len(unit_specs(cfg)), 0

    def load(unit: str) -> Any:
        nonlocal done
        tree = load_unit(path, unit, cfg)
        done += 1
        if progress:
            progress(done, total)
        return tree if dense_dtype is None else densify(tree, dense_dtype)

    params = group_params(cfg, load, scan)
    if dense_dtype is not None:
        cfg = cfg.replace(dense_format=None, expert_format=None)
    return cfg, params

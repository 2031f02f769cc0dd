"""Balancing without an auxiliary loss: router biases follow the sign of the load error."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from dsv4_jax.config import ModelConfig
from dsv4_jax.training.leaves import SIDES, Place, map_places


def move_biases(cfg: ModelConfig, params: Any, loads: Any, speed: Array, learn: str = "all") -> Any:
    """Parameters with every router bias moved by `speed` · sign(mean load − load).

    loads: per group and pattern offset, and per MTP block, int32 `[…, E]`: the rows that the whole
    global batch sent to each expert. They are summed before the sign is taken, so neither
    accumulation nor sharding changes a bit. An MTP block that did not run leaves its bias alone, as
    does what does not learn (see `SIDES`).
    """

    def rule(place: Place, leaf: Array) -> Array:
        if place.spec.dims != "e" or place.side not in SIDES[learn]:
            return leaf
        if place.path[0] == "mtp":
            found = loads["mtp"]
            if not found:
                return leaf
            load = found[place.path[1]]
        else:
            load = loads["groups"][place.path[1]][place.path[2]]
        # E · load against the total: no division, so that integers stay exact
        error = load.sum(axis=-1, keepdims=True) - load.shape[-1] * load
        return leaf + speed * jnp.sign(error).astype(leaf.dtype)

    return map_places(rule, cfg, params)


def load_ratio(loads: Any) -> Array:
    """Worst ratio of the busiest expert's load to the mean, over scored and hashed layers."""
    worst = [
        (load.max(axis=-1) / jnp.maximum(load.mean(axis=-1), 1e-9)).max()
        for group in [*loads["groups"], loads["mtp"]]
        for load in group
    ]
    return jnp.stack(worst).max()

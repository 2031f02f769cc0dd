"""Initial parameters of a run: float32, grouped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params, group_params
from dsv4_jax.params import ParamSpec, is_spec, unit_specs


@dataclass(frozen=True)
class InitConfig:
    """Spread of the first values; nothing of this was published.

    std: of matrices and embeddings, truncated at three deviations; None: 0.02 · sqrt(1024 / dim).
    hyper_std: of the matrices that mix streams. gate: of the scales in front of them.
    """

    std: float | None = None
    hyper_std: float = 0.02
    gate: float = 0.01


def init_params(cfg: ModelConfig, init: InitConfig, key: Array, scan: bool = True) -> Params:
    """Random parameters in float32 (hash tables int32), as a training step takes them."""
    units = unit_specs(cfg)
    keys = dict(zip(units, jax.random.split(key, len(units)), strict=True))

    def load(unit: str) -> Any:
        leaves, treedef = jax.tree.flatten(units[unit], is_leaf=is_spec)
        each = jax.random.split(keys[unit], len(leaves))
        drawn = [_draw(k, cfg, init, s) for k, s in zip(each, leaves, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    return group_params(cfg, load, scan)


def _draw(key: Array, cfg: ModelConfig, init: InitConfig, spec: ParamSpec) -> Array:
    if spec.init == "hash":  # distinct experts in every row
        noise = jax.random.uniform(key, (spec.shape[0], cfg.num_experts))
        return lax.top_k(noise, spec.shape[1])[1].astype(jnp.int32)
    if spec.dims in ("3", "1"):
        return jnp.full(spec.shape, init.gate, jnp.float32)
    if spec.init in ("ones", "zeros"):
        return jnp.full(spec.shape, float(spec.init == "ones"), jnp.float32)
    std = 0.02 * (1024 / cfg.dim) ** 0.5 if init.std is None else init.std
    std = init.hyper_std if spec.dims in ("hm", "Mm") else std
    return std * jax.random.truncated_normal(key, -3.0, 3.0, spec.shape, jnp.float32)

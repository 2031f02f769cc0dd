"""What parameters a model has: one tree of specs that modules, checkpoints and sharding all read.

Names and nesting follow the official checkpoint; experts of a layer are stacked. Three forms of the
same parameters:

* per unit: `unit_specs(cfg)` maps "top", "layer_00", …, "mtp_0" to a tree. Checkpoints use it.
* grouped: what the model runs. `{"top": …, "groups": [[layer, …], …], "mtp": [block, …]}`, where
  layers of a repeating group are stacked along a new first dimension (`schedule.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.dims import DIMS
from dsv4_jax.quant import (
    FP4_BLOCK,
    WEIGHT_BLOCK,
    DecodedWeight,
    QuantizedArray,
    StackedWeight,
    quantize_weight,
)
from sharding.shards import SINGLE, Shards

Tree = dict[str, Any]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its dimension letters, logical shape, storage dtype, and role.

    role: "dense" and "expert" matrices take the configuration's storage format, "plain" ones never.
    init: "normal" (init_std), "ones", "zeros", or "hash" (distinct random experts per row).
    """

    dims: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    role: str = "plain"
    init: str = "normal"

    def fmt(self, cfg: ModelConfig) -> str | None:
        """Storage format of a matrix: "fp8", "fp4" or None (an array of `dtype`)."""
        return {"dense": cfg.dense_format, "expert": cfg.expert_format}.get(self.role)

    @property
    def logical(self) -> tuple[str | None, ...]:
        """Logical name of each dimension, for sharding rules."""
        return tuple(DIMS[letter].logical for letter in self.dims)

    def part(self, shards: Shards) -> ParamSpec:
        """The spec of what one device works on."""
        if shards.mesh is None:
            return self
        spec = shards.spec(self.logical, self.shape, label=self.dims, store=False)
        return replace(self, shape=shards.local_shape(spec, self.shape))

    def abstract(self, cfg: ModelConfig) -> jax.ShapeDtypeStruct | QuantizedArray:
        """Shapes and dtypes of the stored form."""
        fmt = self.fmt(cfg)
        if fmt is None:
            return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
        *lead, out_dim, in_dim = self.shape
        scale = jnp.dtype(cfg.scale_dtype)
        if fmt == "fp4":
            codes = jax.ShapeDtypeStruct((*lead, out_dim, in_dim // 2), jnp.dtype("uint8"))
            scales = jax.ShapeDtypeStruct((*lead, out_dim, in_dim // FP4_BLOCK), scale)
        else:
            codes = jax.ShapeDtypeStruct(self.shape, jnp.dtype(jnp.float8_e4m3fn))
            grid = (-(-out_dim // WEIGHT_BLOCK), -(-in_dim // WEIGHT_BLOCK))
            scales = jax.ShapeDtypeStruct((*lead, *grid), scale)
        return QuantizedArray(codes, scales, fmt)  # type: ignore[arg-type]


def _p(cfg: ModelConfig, dims: str, dtype="bfloat16", role="plain", init="normal", **sizes: int):
    shape = []
    for letter in dims:
        size = DIMS[letter].size
        shape.append(sizes[letter] if letter in sizes else size(cfg) if size else None)
    if None in shape:
        raise ValueError(f"dimension letters {dims!r} need explicit sizes")
    return ParamSpec(dims, tuple(shape), dtype, role, init)  # type: ignore[arg-type]


def hyper_specs(cfg: ModelConfig) -> Tree:
    """The mixing around one sublayer."""
    return {
        "fn": _p(cfg, "hm", "float32"),
        "base": _p(cfg, "h", "float32", init="zeros"),
        "scale": _p(cfg, "3", "float32", init="ones"),
    }


def hyper_head_specs(cfg: ModelConfig) -> Tree:
    """The mixing that collapses the streams at the end."""
    return {
        "fn": _p(cfg, "Mm", "float32"),
        "base": _p(cfg, "M", "float32", init="zeros"),
        "scale": _p(cfg, "1", "float32", init="ones"),
    }


def compressor_specs(cfg: ModelConfig, ratio: int, row_dim: int) -> Tree:
    """A compressor that pools `ratio` tokens into rows of `row_dim` channels."""
    width = row_dim * (2 if ratio == CSA else 1)
    return {
        "wkv": _p(cfg, "dD", d=width),
        "wgate": _p(cfg, "dD", d=width),
        "ape": _p(cfg, "rd", "float32", init="zeros", r=ratio, d=width),
        "norm": _p(cfg, "d", init="ones", d=row_dim),
    }


def attention_specs(cfg: ModelConfig, ratio: int) -> Tree:
    """Attention of one layer; the compress ratio decides which branches exist."""
    tree: Tree = {
        "wq_a": _p(cfg, "QD", role="dense"),
        "q_norm": _p(cfg, "Q", init="ones"),
        "wq_b": _p(cfg, "xQ", role="dense"),
        "wkv": _p(cfg, "HD", role="dense"),
        "kv_norm": _p(cfg, "H", init="ones"),
        "wo_a": _p(cfg, "zg", role="dense"),
        "wo_b": _p(cfg, "Dz", role="dense"),
        "sink": _p(cfg, "N", "float32", init="zeros"),
    }
    if ratio:
        tree["compressor"] = compressor_specs(cfg, ratio, cfg.head_dim)
    if ratio == CSA:
        tree["indexer"] = {
            "wq_b": _p(cfg, "yQ", role="dense"),
            "weights_proj": _p(cfg, "ID"),
            "compressor": compressor_specs(cfg, ratio, cfg.index_dim),
        }
    return tree


def moe_specs(cfg: ModelConfig, is_hash: bool) -> Tree:
    """Router, routed experts and the shared expert of one layer."""
    gate = {"weight": _p(cfg, "eD")}
    if is_hash:
        gate["tid2eid"] = _p(cfg, "vA", "int32", init="hash")
    else:
        gate["bias"] = _p(cfg, "e", "float32", init="zeros")
    wide, shared = {"w1": "EFD", "w3": "EFD", "w2": "EDF"}, {"w1": "fD", "w3": "fD", "w2": "Df"}
    return {
        "gate": gate,
        "experts": {k: _p(cfg, dims, role="expert") for k, dims in wide.items()},
        "shared": {k: _p(cfg, dims, role="dense") for k, dims in shared.items()},
    }


def block_specs(cfg: ModelConfig, ratio: int, is_hash: bool) -> Tree:
    """One layer: attention and MoE, each behind a norm and a hyper-connection."""
    return {
        "attn_norm": _p(cfg, "D", init="ones"),
        "ffn_norm": _p(cfg, "D", init="ones"),
        "hc_attn": hyper_specs(cfg),
        "hc_ffn": hyper_specs(cfg),
        "attn": attention_specs(cfg, ratio),
        "ffn": moe_specs(cfg, is_hash),
    }


def mtp_specs(cfg: ModelConfig) -> Tree:
    """One MTP block: a window-only layer, its input projections and its own head mixing."""
    return block_specs(cfg, 0, False) | {
        "e_proj": _p(cfg, "DD", role="dense"),
        "h_proj": _p(cfg, "DD", role="dense"),
        "enorm": _p(cfg, "D", init="ones"),
        "hnorm": _p(cfg, "D", init="ones"),
        "norm": _p(cfg, "D", init="ones"),
        "hc_head": hyper_head_specs(cfg),
    }


def top_specs(cfg: ModelConfig) -> Tree:
    """What belongs to no layer."""
    return {
        "embed": _p(cfg, "VD"),
        "head": _p(cfg, "VD"),
        "norm": _p(cfg, "D", init="ones"),
        "hc_head": hyper_head_specs(cfg),
    }


def unit_specs(cfg: ModelConfig) -> dict[str, Tree]:
    """Spec tree of every unit: "top", "layer_00" …, "mtp_0" …; names sort in layer order."""
    width = max(2, len(str(cfg.num_layers - 1)))
    units = {"top": top_specs(cfg)}
    for layer in range(cfg.num_layers):
        units[f"layer_{layer:0{width}d}"] = block_specs(cfg, cfg.ratio(layer), cfg.is_hash(layer))
    for index in range(cfg.num_mtp_layers):
        units[f"mtp_{index}"] = mtp_specs(cfg)
    return units


def is_spec(node: object) -> bool:
    return isinstance(node, ParamSpec)


def abstract(cfg: ModelConfig, specs: Any) -> Any:
    """The tree of shapes and dtypes (QuantizedArray where stored quantised) of a spec tree."""
    return jax.tree.map(lambda s: s.abstract(cfg), specs, is_leaf=is_spec)


def declare(module: nn.Module, cfg: ModelConfig, specs: Tree, shards: Shards = SINGLE) -> Tree:
    """Declares every entry of `specs` as a parameter of a Linen module and returns their values.

    An entry may be a spec or a tree of specs; Linen checks the shapes of what is passed in, but
    for weights still in their stack or decoded: there we do. Over several devices each has its
    part.
    """
    specs = jax.tree.map(lambda spec: spec.part(shards), specs, is_leaf=is_spec)

    def value(name: str, tree: Any) -> Any:
        if not _is_unknown_to_linen(module.variables.get("params", {}).get(name)):
            return module.param(name, lambda key: init_tree(key, cfg, tree))
        found = module.get_variable("params", name)
        jax.tree.map(_check_shape, tree, found, is_leaf=is_spec)
        return found

    return {name: value(name, tree) for name, tree in specs.items()}


def _is_unknown_to_linen(tree: Any) -> bool:
    """Whether some weight of `tree` is still in its stack, or decoded."""

    def is_one(node: Any) -> bool:
        return isinstance(node, StackedWeight | DecodedWeight)

    return any(map(is_one, jax.tree.leaves(tree, is_leaf=is_one)))


def _check_shape(spec: ParamSpec, value: Any) -> None:
    if value.shape != spec.shape:
        raise ValueError(f"a parameter {spec.dims} has shape {value.shape}, not {spec.shape}")


def init_tree(key: Array, cfg: ModelConfig, specs: Any) -> Any:
    """Random parameters for training from scratch, in their storage formats."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef, [_init_leaf(k, cfg, s) for k, s in zip(keys, leaves, strict=True)]
    )


def _init_leaf(key: Array, cfg: ModelConfig, spec: ParamSpec) -> Array | QuantizedArray:
    if spec.init == "hash":  # distinct experts in every row
        noise = jax.random.uniform(key, (spec.shape[0], cfg.num_experts))
        return lax.top_k(noise, spec.shape[1])[1].astype(jnp.int32)
    if spec.init in ("ones", "zeros"):
        return jnp.full(spec.shape, float(spec.init == "ones"), jnp.dtype(spec.dtype))
    values = cfg.init_std * jax.random.normal(key, spec.shape, jnp.float32)
    fmt = spec.fmt(cfg)
    if fmt is None:
        return values.astype(jnp.dtype(spec.dtype))
    return quantize_weight(values, fmt, jnp.dtype(cfg.scale_dtype))


@dataclass(frozen=True)
class ParamCount:
    """Logical parameters, without scales and hash tables. `active` counts the experts used."""

    main: int
    mtp: int
    active: int

    @property
    def total(self) -> int:
        return self.main + self.mtp


def count_params(cfg: ModelConfig) -> ParamCount:
    """Counts from the specs (architecture: §10.5 conventions of the official accounting)."""

    def count(tree: Any, only: str | None = None) -> int:
        specs = jax.tree.leaves(tree, is_leaf=is_spec)
        kept = [s for s in specs if s.dtype != "int32" and (only is None or s.role == only)]
        return sum(math.prod(s.shape) for s in kept)

    units = unit_specs(cfg)
    main = {name: tree for name, tree in units.items() if not name.startswith("mtp_")}
    routed = count(main, "expert")
    idle = routed // cfg.num_experts * (cfg.num_experts - cfg.experts_per_token)
    mtp = count({name: tree for name, tree in units.items() if name.startswith("mtp_")})
    return ParamCount(count(main), mtp, count(main) - idle)

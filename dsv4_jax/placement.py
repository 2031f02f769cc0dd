"""Names of the dimensions of every stored array, and from them its placement on a mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.cache import Cache, LayerCache
from dsv4_jax.config import ModelConfig
from dsv4_jax.dims import DIMS
from dsv4_jax.params import ParamSpec, block_specs, is_spec, mtp_specs, top_specs, unit_specs
from dsv4_jax.quant import FP4_BLOCK, WEIGHT_BLOCK, QuantizedArray
from dsv4_jax.schedule import layer_groups
from sharding.shards import Shards

Tree = Any


def logical(dims: str) -> tuple[str | None, ...]:
    """Names that sharding rules know, of dimension letters."""
    return tuple(DIMS[letter].logical for letter in dims)


def weight_specs(
    spec: ParamSpec, cfg: ModelConfig, shards: Shards, label: str, stacked: int = 0
) -> PartitionSpec | QuantizedArray:
    """Placement of one parameter; of a quantised one, of its codes and scales.

    stacked: layers along a new first dimension; 0 for none.
    """
    names, lead = spec.logical, (stacked,) if stacked else ()
    if stacked:
        names = ("layers", *names)
    stored = spec.abstract(cfg)
    if not isinstance(stored, QuantizedArray):
        return shards.spec(names, (*lead, *stored.shape), label=label)
    still = [1] * (len(names) - 2)
    whole = [*still, WEIGHT_BLOCK, WEIGHT_BLOCK]
    blocks = whole if stored.fmt == "fp8" else [*still, 1, FP4_BLOCK // 2]
    codes = shards.spec(names, (*lead, *stored.codes.shape), blocks, f"{label} codes")
    scales = shards.spec(names, (*lead, *stored.scales.shape), label=f"{label} scales")
    return QuantizedArray(codes, scales, stored.fmt)  # type: ignore[arg-type]


def _placed(specs: Tree, cfg: ModelConfig, shards: Shards, path: str, stacked: int = 0) -> Tree:
    def one(keys: Any, spec: ParamSpec) -> Any:
        label = "/".join([path, *(key.key for key in keys)])
        return weight_specs(spec, cfg, shards, label, stacked)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def param_specs(cfg: ModelConfig, shards: Shards, scan: bool = True) -> Tree:
    """PartitionSpecs of grouped parameters, tree for tree.

    Raises:
        ValueError: a dimension does not divide, or its name has no rule.
    """
    groups = []
    for group in layer_groups(cfg, scan):
        stacked = group.repeats if group.repeats > 1 else 0
        layers = []
        for offset, kind in enumerate(group.kinds):
            path = f"layer_{group.start + offset:02d}"
            layers.append(_placed(block_specs(cfg, *kind), cfg, shards, path, stacked))
        groups.append(layers)
    mtp = [_placed(mtp_specs(cfg), cfg, shards, f"mtp_{n}") for n in range(cfg.num_mtp_layers)]
    return {"top": _placed(top_specs(cfg), cfg, shards, "top"), "groups": groups, "mtp": mtp}


def unit_placement(cfg: ModelConfig, unit: str, shards: Shards) -> Tree:
    """PartitionSpecs of one unit ("top", "layer_00", …) as checkpoints store it.

    Raises:
        ValueError: a dimension does not divide.
    """
    return _placed(unit_specs(cfg)[unit], cfg, shards, unit)


def gather_stored(cfg: ModelConfig, specs: Tree, values: Tree, shards: Shards) -> Tree:
    """A layer's weights as they are worked on: joined along axes that only store them."""
    if not any(shards.size(axis) > 1 for axis in shards.rules.gathered):
        return values

    def one(keys: Any, spec: ParamSpec, value: Array | QuantizedArray) -> Any:
        placed = weight_specs(spec, cfg, shards, jax.tree_util.keystr(keys))
        return jax.tree.map(shards.gather_stored, value, placed)

    return jax.tree_util.tree_map_with_path(one, specs, values, is_leaf=is_spec)


def stays_whole(shards: Shards) -> bool:
    """Whether weights are worked on as they are stored."""
    return all(shards.size(axis) == 1 for axis in shards.rules.gathered)


# Dimensions of the arrays of a layer's cache; those of packed rows differ in the last one only.
_CACHE_DIMS = {"window": "LBW", "rows": "LBC", "keys": "LBC", "ring": "LBr", "key_ring": "LBr"}
_PAGED_DIMS = {"window": "LsW", "rows": "LP1", "keys": "LP1", "ring": "Lsr", "key_ring": "Lsr"}


def cache_dims(cache: Cache) -> Cache:
    """Names of the dimensions of every array of a cache, as tuples in the same tree."""
    dims = _CACHE_DIMS if cache.table_BP is None else _PAGED_DIMS

    def layer(entry: LayerCache) -> LayerCache:
        def names(key: str) -> Any:
            return jax.tree.map(lambda _: (*logical(dims[key]), None), entry[key])

        return {key: names(key) for key in entry}

    batch = logical("B")
    table = None if cache.table_BP is None else (*batch, None)
    return Cache(
        pos_B=batch,  # type: ignore[arg-type]
        groups=[[layer(entry) for entry in group] for group in cache.groups],
        mtp_pos_B=batch,  # type: ignore[arg-type]
        mtp=[layer(entry) for entry in cache.mtp],
        slots_B=None if cache.slots_B is None else batch,  # type: ignore[arg-type]
        table_BP=table,  # type: ignore[arg-type]
    )


def cache_specs(cache: Cache, shards: Shards) -> Cache:
    """PartitionSpecs of a cache (or of its shapes), tree for tree.

    Raises:
        ValueError: a dimension does not divide.
    """
    names = cache_dims(cache)

    def one(keys: Any, array: Any, dims: Any) -> PartitionSpec:
        return shards.spec(dims, array.shape, label=f"cache{jax.tree_util.keystr(keys)}")

    return jax.tree_util.tree_map_with_path(one, cache, names)


def shardings(specs: Tree, shards: Shards) -> Tree:
    """NamedShardings of a tree of PartitionSpecs."""
    mesh = shards.mesh
    assert isinstance(mesh, Mesh)
    is_placement = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_placement)


class Row(NamedTuple):
    """One stored array of a model: where it is, its parts, bytes on each device."""

    name: str
    dims: str
    shape: tuple[int, ...]
    dtype: str
    placement: PartitionSpec
    device_bytes: int
    total_bytes: int


def explain(cfg: ModelConfig, shards: Shards) -> Iterator[Row]:
    """Every parameter of a model with its placement; repeated layers are one stack."""
    for group in layer_groups(cfg):
        stacked = group.repeats if group.repeats > 1 else 0
        for offset, kind in enumerate(group.kinds):
            name = f"layer_{group.start + offset:02d}"
            if stacked:
                name += f" and every {len(group.kinds)} up to {group.layers(offset)[-1]}"
            yield from _explain(name, block_specs(cfg, *kind), cfg, shards, stacked)
    for index in range(cfg.num_mtp_layers):
        yield from _explain(f"mtp_{index}", mtp_specs(cfg), cfg, shards, 0)
    yield from _explain("top", top_specs(cfg), cfg, shards, 0)


def _explain(
    unit: str, specs: Tree, cfg: ModelConfig, shards: Shards, stacked: int
) -> Iterator[Row]:
    for keys, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        name = "/".join(key.key for key in keys)
        placed, stored = weight_specs(spec, cfg, shards, name, stacked), spec.abstract(cfg)
        parts: dict[str, tuple[Any, Any]] = {name: (stored, placed)}
        if isinstance(stored, QuantizedArray) and isinstance(placed, QuantizedArray):
            parts = {
                f"{name}.{part}": (getattr(stored, part), getattr(placed, part))
                for part in ("codes", "scales")
            }
        for label, (array, where) in parts.items():
            shape = (stacked, *array.shape) if stacked else array.shape
            local, width = shards.local_shape(where, shape), array.dtype.itemsize
            dims = ("L" if stacked else "") + spec.dims
            sizes = (math.prod(local) * width, math.prod(shape) * width)
            yield Row(f"{unit}: {label}", dims, shape, str(array.dtype), where, *sizes)

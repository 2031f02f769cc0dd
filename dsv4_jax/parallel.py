"""The forward pass over a mesh: `model`'s functions inside one `jax.shard_map` over all its axes.

Arguments and results are whole arrays, placed as `placement` says; jit these as those of `model`.
Without a mesh they are those of `model`.
The batch is split over data, fsdp and expert, heads and vocabulary over tensor, compressed rows
over context, and so are the new tokens of a chunk that is long enough (`context.can_split`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax import model
from dsv4_jax.cache import Cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.context import can_split
from dsv4_jax.model import Output, Params, is_scanned
from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import cache_specs, logical, param_specs
from sharding.mesh import MeshSizes, nearest, shape_of
from sharding.shards import Shards


def for_length(shards: Shards, fresh: int) -> Shards:
    """How a program over `fresh` new tokens per sequence uses the mesh."""
    split = can_split(fresh, shards.count("context"))
    return dataclasses.replace(shards, split=split)


def check(cfg: ModelConfig, shards: Shards, batch: int, scan: bool = True) -> None:
    """Whether the model and a batch can be split over the mesh.

    Raises:
        ValueError: something does not divide; names it and the nearest meshes that do.
    """
    assert shards.mesh is not None

    def problem(candidate: Shards) -> str | None:
        try:
            param_specs(cfg, candidate, scan)
            candidate.spec(logical("B"), (batch,), label=f"a batch of {batch}")
        except ValueError as error:
            return str(error)
        return None

    def fits(shape: Any) -> bool:
        return problem(dataclasses.replace(shards, mesh=MeshSizes(shape))) is None

    if found := problem(shards):
        shape = shape_of(shards.mesh)
        others = "; ".join(str(other) for other in nearest(shape, fits)) or "none"
        raise ValueError(f"mesh {shape}: {found}. Meshes of as many devices that do: {others}")


def prefill(
    cfg: ModelConfig,
    num: Numerics,
    params: Params,
    tokens_BT: Array,
    cache: Cache,
    count_B: Array | None = None,
    all_logits: bool = False,
    *,
    shards: Shards,
) -> tuple[Output, Cache]:
    """`model.prefill` over a mesh.

    Raises:
        ValueError: something does not divide, or the cache is paged and the context split.
    """
    if count_B is None:
        count_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1], jnp.int32)
    if shards.mesh is None:
        return model.prefill(cfg, num, params, tokens_BT, cache, count_B, all_logits)
    shards = for_length(shards, tokens_BT.shape[1])

    def run(params: Params, cache: Cache, tokens_BT: Array, count_B: Array) -> Any:
        return model.prefill(cfg, num, params, tokens_BT, cache, count_B, all_logits, shards)

    return _over_mesh(cfg, shards, run, all_logits, params, cache, tokens_BT, count_B)


def decode_step(
    cfg: ModelConfig,
    num: Numerics,
    params: Params,
    tokens_B: Array,
    cache: Cache,
    active_B: Array | None = None,
    *,
    shards: Shards,
) -> tuple[Output, Cache]:
    """`model.decode_step` over a mesh."""
    count_B = None if active_B is None else active_B.astype(jnp.int32)
    return prefill(cfg, num, params, tokens_B[:, None], cache, count_B, shards=shards)


def draft(
    cfg: ModelConfig,
    num: Numerics,
    params: Params,
    streams_BTMD: Array,
    next_BT: Array,
    cache: Cache,
    count_B: Array | None = None,
    all_logits: bool = False,
    *,
    shards: Shards,
) -> tuple[Output, Cache]:
    """`model.draft` over a mesh; the streams are those that `prefill` here returned."""
    if count_B is None:
        count_B = jnp.full(next_BT.shape[0], next_BT.shape[1], jnp.int32)
    if shards.mesh is None:
        return model.draft(cfg, num, params, streams_BTMD, next_BT, cache, count_B, all_logits)
    shards = for_length(shards, next_BT.shape[1])

    def run(params: Params, cache: Cache, next_BT: Array, count_B: Array, streams: Array) -> Any:
        args = (streams, next_BT, cache, count_B, all_logits, shards)
        return model.draft(cfg, num, params, *args)

    args = (params, cache, next_BT, count_B, streams_BTMD)
    return _over_mesh(cfg, shards, run, all_logits, *args, last_streams=not all_logits)


def logits_of(
    cfg: ModelConfig, num: Numerics, params: Params, h_BTMD: Array, *, shards: Shards
) -> Array:
    """`model.logits_of` over a mesh; whole logits, from streams that every device has."""
    top = params["top"]
    if shards.mesh is None:
        return model.logits_of(cfg, num, params, h_BTMD)
    assert isinstance(shards.mesh, Mesh)

    def run(top: Params, h_BTMD: Array) -> Array:
        return shards.join(model.logits_of(cfg, num, {"top": top}, h_BTMD), "vocab", -1)

    placed = param_specs(cfg, shards, is_scanned(cfg, params))["top"]
    specs = (placed, PartitionSpec()), PartitionSpec()
    fn = partial(jax.shard_map, mesh=shards.mesh, check_vma=False)
    return fn(run, in_specs=specs[0], out_specs=specs[1])(top, h_BTMD)


def _over_mesh(
    cfg: ModelConfig,
    shards: Shards,
    run: Callable[..., Any],
    all_logits: bool,
    params: Params,
    cache: Cache,
    tokens_BT: Array,
    count_B: Array,
    *streams: Array,
    last_streams: bool = False,
) -> Any:
    assert isinstance(shards.mesh, Mesh), "sizes alone run nothing"
    if cache.table_BP is not None and shards.count("context") > 1:
        raise ValueError("a paged cache cannot be split over the context axis")
    scan = is_scanned(cfg, params)
    check(cfg, shards, tokens_BT.shape[0], scan)
    batch, names = shards.spec(logical("B"), count_B.shape), ("B", "T") if shards.split else ("B",)
    token_specs = PartitionSpec(*(shards.axes(logical(n)[0] or "") or None for n in names))
    vocab = shards.axes("vocab") or None
    lead = token_specs if len(names) == 2 else PartitionSpec(*token_specs, None)
    logits = PartitionSpec(*(lead if all_logits else batch), vocab)
    placed = cache_specs(cache, shards)
    fn = partial(
        jax.shard_map,
        mesh=shards.mesh,
        in_specs=(
            param_specs(cfg, shards, scan),
            placed,
            batch,
            batch,
            *[token_specs] * len(streams),
        ),
        out_specs=(Output(logits, batch if last_streams else token_specs), placed),  # type: ignore[arg-type]
        check_vma=False,
    )
    return fn(run)(params, cache, tokens_BT, count_B, *streams)

"""The forward pass: embed, layers, head. State goes in and comes out.

`prefill` runs a chunk of any length from any position; `decode_step` is the same for one token;
`draft` runs the MTP block. All are pure functions to be jitted by the caller with the configuration
static and the cache donated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.block import Block, MTPBlock
from dsv4_jax.cache import Cache, LayerCache, init_cache
from dsv4_jax.compress import Chunk
from dsv4_jax.compress import last_of as last_of
from dsv4_jax.config import ModelConfig
from dsv4_jax.context import from_end, own_part, own_tokens
from dsv4_jax.mhc import HyperHead
from dsv4_jax.norm import rms_norm
from dsv4_jax.numerics import Numerics, linear_f32, matmul
from dsv4_jax.params import block_specs, init_tree, mtp_specs, top_specs, unit_specs
from dsv4_jax.placement import gather_stored, stays_whole
from dsv4_jax.quant import QuantizedArray, StackedWeight
from dsv4_jax.rope import frequencies, rotation
from dsv4_jax.schedule import Group, layer_groups, stack_layers
from sharding.shards import SINGLE, Shards

Params = dict[str, Any]


class Output(NamedTuple):
    """logits: float32 `[B, T, V]`, or `[B, V]` of each sequence's last real token.
    streams_BTMD: residual streams after the last layer, which the MTP block reads."""

    logits: Array
    streams_BTMD: Array


def init_params(cfg: ModelConfig, key: Array, scan: bool = True) -> Params:
    """Random parameters in grouped form, in their storage formats."""
    units = unit_specs(cfg)
    keys = dict(zip(units, jax.random.split(key, len(units)), strict=True))
    return group_params(cfg, lambda unit: init_tree(keys[unit], cfg, units[unit]), scan)


def group_params(cfg: ModelConfig, load: Any, scan: bool = True) -> Params:
    """Grouped parameters from `load(unit)`, which gives one unit's tree (see `params`)."""
    names = list(unit_specs(cfg))
    layers = [name for name in names if name.startswith("layer_")]
    return {
        "top": load("top"),
        "groups": stack_layers(layer_groups(cfg, scan), lambda i: load(layers[i])),
        "mtp": [load(name) for name in names if name.startswith("mtp_")],
    }


def is_scanned(cfg: ModelConfig, params: Params) -> bool:
    """Whether parameters were grouped for scanning (else one group per layer)."""
    return len(params["groups"]) != cfg.num_layers or layer_groups(cfg) == layer_groups(cfg, False)


def prefill(
    cfg: ModelConfig,
    num: Numerics,
    params: Params,
    tokens_BT: Array,
    cache: Cache,
    count_B: Array | None = None,
    all_logits: bool = False,
    shards: Shards = SINGLE,
) -> tuple[Output, Cache]:
    """Runs T new tokens per sequence from where its cache stands.

    count_B: how many of the T are real (the rest is padding behind them); 0 leaves a sequence
    untouched. The caller keeps positions within the cache's capacity.
    shards: inside a `jax.shard_map` only, see `parallel`: then arrays are one device's parts.
    """
    if count_B is None:
        count_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1], jnp.int32)
    chunk = _chunk(cfg, cache, cache.pos_B, count_B, tokens_BT, shards)
    top = gather_stored(cfg, top_specs(cfg), params["top"], shards)
    x_BTD = num.cast(embed(top["embed"], chunk.tokens_BT, shards))
    h_BTMD = jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], cfg.hc_mult, cfg.dim))
    groups = layer_groups(cfg, is_scanned(cfg, params))
    new_groups = []
    for group, weights, state in zip(groups, params["groups"], cache.groups, strict=True):
        h_BTMD, state = _run_group(cfg, num, group, weights, h_BTMD, chunk, state, shards)
        new_groups.append(state)
    kept = h_BTMD if all_logits else _last(h_BTMD, chunk, shards)
    logits = logits_of(cfg, num, {"top": top}, kept)
    cache = dataclasses.replace(cache, pos_B=cache.pos_B + count_B, groups=new_groups)
    return Output(logits if all_logits else logits[:, 0], h_BTMD), cache


def decode_step(
    cfg: ModelConfig,
    num: Numerics,
    params: Params,
    tokens_B: Array,
    cache: Cache,
    active_B: Array | None = None,
) -> tuple[Output, Cache]:
    """One token per sequence. Sequences that are not active keep their state."""
    count_B = None if active_B is None else active_B.astype(jnp.int32)
    return prefill(cfg, num, params, tokens_B[:, None], cache, count_B)


def draft(
    cfg: ModelConfig,
    num: Numerics,
    params: Params,
    streams_BTMD: Array,
    next_BT: Array,
    cache: Cache,
    count_B: Array | None = None,
    all_logits: bool = False,
    shards: Shards = SINGLE,
) -> tuple[Output, Cache]:
    """The MTP block: streams of token i and the id of token i+1 give logits of token i+2.

    Row i takes position i. Without `all_logits` streams too are those of the last real token,
    `[B, 1, M, D]`: for the others the block only fills its cache.

    Raises:
        ValueError: the model has no MTP block.
    """
    if not params["mtp"]:
        raise ValueError("this checkpoint has no MTP block (num_nextn_predict_layers is 0)")
    if count_B is None:
        count_B = jnp.full(next_BT.shape[0], next_BT.shape[1], jnp.int32)
    chunk = _chunk(cfg, cache, cache.mtp_pos_B, count_B, next_BT, shards)
    top = gather_stored(cfg, top_specs(cfg), params["top"], shards)
    embedded_BTD = num.cast(embed(top["embed"], chunk.tokens_BT, shards))
    weights = {"params": gather_stored(cfg, mtp_specs(cfg), params["mtp"][0], shards)}
    newest = not all_logits and next_BT.shape[1] > 1 and not shards.split
    out: Any = MTPBlock(cfg, num, shards).apply(
        weights, streams_BTMD, embedded_BTD, chunk, cache.mtp[0], jnp.int32(0), newest
    )
    y_BTD, h_BTMD, state = out
    if not all_logits and not newest:
        y_BTD, h_BTMD = (_last(a, chunk, shards) for a in (y_BTD, h_BTMD))
    logits = output_head(y_BTD, top["head"])
    mtp_pos_B = cache.mtp_pos_B + count_B
    cache = dataclasses.replace(cache, mtp_pos_B=mtp_pos_B, mtp=[state, *cache.mtp[1:]])
    return Output(logits if all_logits else logits[:, 0], h_BTMD), cache


def forward(cfg: ModelConfig, num: Numerics, params: Params, tokens_BT: Array) -> Array:
    """Logits float32 `[B, T, V]` of whole sequences, without keeping any state."""
    batch, length = tokens_BT.shape
    cache = init_cache(cfg, batch, length, num, is_scanned(cfg, params))
    return prefill(cfg, num, params, tokens_BT, cache, all_logits=True)[0].logits


def logits_of(cfg: ModelConfig, num: Numerics, params: Params, h_BTMD: Array) -> Array:
    """Logits float32 `[B, T, V]` from the residual streams after the last layer."""
    top = params["top"]
    y: Any = HyperHead(cfg, num).apply({"params": top["hc_head"]}, h_BTMD)
    return output_head(rms_norm(y, top["norm"], cfg.norm_eps, num), top["head"])


def output_head(y: Array, head_VD: Array) -> Array:
    """Float32 logits; bfloat16 operands have exact products, so they need no wider copy."""
    if y.dtype == head_VD.dtype == jnp.bfloat16:
        return matmul(y, head_VD)
    return linear_f32(y, head_VD)


def embed(table_VD: Array, tokens_BT: Array, shards: Shards = SINGLE) -> Array:
    """Rows of the table, whose vocabulary may be split over devices."""
    if shards.count("vocab") == 1:
        return table_VD[tokens_BT]
    size = table_VD.shape[0]
    local_BT = tokens_BT - shards.rank("vocab") * size
    is_mine = (local_BT >= 0) & (local_BT < size)
    return shards.one_of(table_VD[local_BT.clip(0, size - 1)], "vocab", is_mine[..., None])


def _last(x: Array, chunk: Chunk, shards: Shards) -> Array:
    return from_end(last_of(x, chunk.count_B), chunk, x.shape[1], shards)


def _chunk(
    cfg: ModelConfig,
    cache: Cache,
    pos_B: Array,
    count_B: Array,
    tokens_BT: Array,
    shards: Shards = SINGLE,
) -> Chunk:
    """Where this device's tokens stand."""
    tokens_BT, total_B = own_tokens(tokens_BT, shards), count_B
    pos_B, count_B = own_part(pos_B, count_B, tokens_BT.shape[1], shards)
    positions_BT = pos_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
    turns = tuple(rotation(frequencies(cfg, kind), positions_BT) for kind in (False, True))
    # kept apart: fused into their uses, sines would be computed for every head again
    window, rows = lax.optimization_barrier(turns)
    return Chunk(pos_B, count_B, tokens_BT, window, rows, total_B, cache.slots_B, cache.table_BP)


def _run_group(
    cfg: ModelConfig,
    num: Numerics,
    group: Group,
    weights: list[Params],
    h_BTMD: Array,
    chunk: Chunk,
    state: list[LayerCache],
    shards: Shards,
) -> tuple[Array, list[LayerCache]]:
    """All layers of a group; a repeated pattern is one scan with the caches in its carry."""

    def pattern(h: Array, state: list[LayerCache], weights: list[Params], index: Array):
        new_state = []
        for kind, params, cache in zip(group.kinds, weights, state, strict=True):
            params = gather_stored(cfg, block_specs(cfg, *kind), params, shards)
            block = Block(cfg, num, kind, shards)
            h, cache = block.apply({"params": params}, h, chunk, cache, index)
            new_state.append(cache)
        return h, new_state

    if group.repeats == 1:
        return pattern(h_BTMD, state, weights, jnp.int32(0))
    cut, pick = _split_stacks(weights, bool(num.matrix_kernels) and stays_whole(shards))

    def body(carry: tuple[Array, list[LayerCache]], xs: tuple[list[Array], Array]):
        h_BTm, state = carry
        h_BTMD, state = pattern(h_BTm.reshape(h_BTMD_shape), state, pick(*xs), xs[1])
        return (h_BTMD.reshape(h_BTm.shape), state), None

    # side by side: that is how kernels read streams
    h_BTMD_shape, h_BTm = h_BTMD.shape, h_BTMD.reshape(*h_BTMD.shape[:2], -1)
    (h_BTm, state), _ = lax.scan(body, (h_BTm, state), (cut, jnp.arange(group.repeats)))
    return h_BTm.reshape(h_BTMD_shape), state


def _split_stacks(
    weights: list[Params], in_place: bool
) -> tuple[list[Any], Callable[[list[Any], Array], list[Params]]]:
    """What a scan cuts into layers, and how to get a layer's weights from that and its index.

    in_place: kernels read quantised weights where they lie in their stack; the rest is cut.
    """

    def is_weight(node: Any) -> bool:
        return isinstance(node, QuantizedArray)

    leaves, treedef = jax.tree.flatten(weights, is_leaf=is_weight)
    stays = [in_place and is_weight(leaf) for leaf in leaves]

    def pick(cut: list[Any], index: Array) -> list[Params]:
        rest = iter(cut)
        layer = [
            StackedWeight(leaf, index) if stay else next(rest)
            for leaf, stay in zip(leaves, stays, strict=True)
        ]
        return jax.tree.unflatten(treedef, layer)

    return [leaf for leaf, stay in zip(leaves, stays, strict=True) if not stay], pick

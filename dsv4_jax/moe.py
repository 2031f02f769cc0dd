"""Mixture of experts: hash or scored routing, dropless experts, one shared expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from dsv4_jax.config import ModelConfig
from dsv4_jax.exchange import Tokens, exchange
from dsv4_jax.numerics import Numerics, Weight, linear, linear_f32, matmul_each
from dsv4_jax.params import declare, moe_specs
from dsv4_jax.quant import (
    ACT_BLOCK,
    DecodedWeight,
    QuantizedArray,
    StackedWeight,
    fake_fp8,
    index_expert,
)
from pallas_kernels.grouped_matmul.api import routed_experts
from sharding.shards import SINGLE, Shards

MIN_EXPERT_TILE, MAX_EXPERT_TILE = 8, 64  # rows of one expert that are multiplied together
FEW_ROWS = 6  # with so many, sorting them costs more than reading an expert twice
FEW_TOKENS, SMALL_EXPERTS = 64, 1 << 17  # tokens, and entries of a matrix of all experts, on CPU
MAX_BRANCHES = 64  # experts for which a product each is compiled, on CPU


class Routing(NamedTuple):
    """Experts of each token in ascending order (int32) and their float32 weights."""

    experts_UA: Array
    weights_UA: Array


def route(gate: dict[str, Array], x_UD: Array, tokens_U: Array, cfg: ModelConfig) -> Routing:
    """Chooses experts by token id (hash layers) or by biased score; all in float32.

    The bias only selects. Weights are the chosen unbiased scores, normalised and scaled.
    """
    scores_UE = jnp.sqrt(jax.nn.softplus(linear_f32(x_UD, gate["weight"])))
    if "tid2eid" in gate:
        experts_UA = _hashed(gate["tid2eid"], tokens_U)
    else:
        experts_UA = lax.top_k(scores_UE + gate["bias"][None], cfg.experts_per_token)[1]
    experts_UA = jnp.sort(experts_UA, axis=-1)  # experts add up in index order, as officially
    weights_UA = jnp.take_along_axis(scores_UE, experts_UA, axis=-1)
    weights_UA = weights_UA / weights_UA.sum(axis=-1, keepdims=True) * cfg.routed_scale
    return Routing(experts_UA, weights_UA)


def _hashed(table_VA: Array, tokens_U: Array) -> Array:
    """Rows of the hash table; one column at a time where rows would have to be padded first."""

    def by_column(table_VA: Array, tokens_U: Array) -> Array:
        return jnp.stack([table_VA[:, a][tokens_U] for a in range(table_VA.shape[1])], axis=1)

    def by_row(table_VA: Array, tokens_U: Array) -> Array:
        return table_VA[tokens_U]

    return lax.platform_dependent(table_VA, tokens_U, tpu=by_column, default=by_row)


def expert_linear(
    x: Array, weight: Weight, which: Array | None, num: Numerics, wide: bool = False
) -> Array:
    """`linear` with entry `which` of a stack of weights (None: `weight` is no stack).

    XLA on CPU copies a matrix that it picks at run time twice as slowly as a fixed one, so there a
    branch per expert picks it. Quantised weights are decoded into a copy anyway.
    """

    def picked(x: Array, weight: Array | QuantizedArray | DecodedWeight, which: Array) -> Array:
        return linear(x, index_expert(weight, which), num)

    def branches(x: Array, weight: Array | DecodedWeight, which: Array) -> Array:
        def fixed(e: int) -> Callable[[Array, Any], Array]:
            return lambda x, w: linear(x, jax.tree.map(lambda a: a[e], w), num)

        return lax.switch(which, [fixed(e) for e in range(weight.shape[0])], x, weight)

    if which is None:
        return linear(x, weight, num, wide=wide)
    if isinstance(weight, StackedWeight):
        weight = weight.cut()
    if isinstance(weight, QuantizedArray) or weight.shape[0] > MAX_BRANCHES:
        return picked(x, weight, which)
    return lax.platform_dependent(x, weight, which, cpu=branches, default=picked)


def expert(
    weights: dict[str, Any],
    x_YD: Array,
    scale_Y: Array | None,
    cfg: ModelConfig,
    num: Numerics,
    which: Array | None = None,
    wide: bool = False,
) -> Array:
    """silu(clamped gate) · clamped up · routing weight, then down; `[Y, D]`.

    The routing weight comes before the down projection (inside the rounding of its input).
    `which`: the expert to use, where weights are stacks. `wide`: float32 sums, for one expert only.
    """
    gate_YF = expert_linear(x_YD, weights["w1"], which, num)
    up_YF = expert_linear(x_YD, weights["w3"], which, num)
    hidden_YF = swiglu(gate_YF, up_YF, cfg)
    if scale_Y is not None:
        hidden_YF = hidden_YF * scale_Y[:, None]
    return expert_linear(num.cast(hidden_YF), weights["w2"], which, num, wide)


def swiglu(gate: Array, up: Array, cfg: ModelConfig) -> Array:
    """silu(clamped gate) · clamped up in float32, of any shape."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if cfg.swiglu_limit:
        gate = jnp.minimum(gate, cfg.swiglu_limit)
        up = jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
    return jax.nn.silu(gate) * up


def routed_sum(
    weights: dict[str, Any],
    x_UD: Array,
    routing: Routing,
    real_U: Array,
    cfg: ModelConfig,
    num: Numerics,
) -> Array:
    """Σ over each token's experts, float32 `[U, D]`. Dropless; padding tokens cost nothing.

    Experts may be those of one device, out of more; numbers from their count on cost nothing.

    A few tokens ask their experts one by one. Otherwise rows are sorted by expert and each
    expert's rows padded to tiles; a loop over the tiles in use picks the tile's expert, so weights
    are read (and decoded) one expert at a time.
    """
    if num.matrix_kernels and not isinstance(weights["w1"], Array):
        return _kernel_sum(weights, x_UD, routing, real_U, cfg, num)
    tokens, per_token = routing.experts_UA.shape
    num_experts = weights["w1"].shape[0]  # of this device
    if _is_small(weights, tokens):
        return _dense_sum(weights, x_UD, routing, cfg, num)
    if tokens * per_token <= FEW_ROWS and num_experts == cfg.num_experts:

        def add(row: Array, total_UD: Array) -> Array:
            token, which = row // per_token, routing.experts_UA.reshape(-1)[row]
            weight = routing.weights_UA.reshape(-1)[row]
            x = lax.dynamic_slice_in_dim(x_UD, token, 1)
            part = expert(weights, x, weight[None], cfg, num, which).astype(jnp.float32)
            return total_UD.at[token].add(part[0])

        return lax.fori_loop(0, tokens * per_token, add, jnp.zeros(x_UD.shape, jnp.float32))
    rows = tokens * per_token
    tile = expert_tile(tokens, rows, num_experts)
    capacity = min(rows, -(-rows // tile) + num_experts) * tile
    owner_Y = jnp.where(real_U[:, None], routing.experts_UA, num_experts).reshape(-1)
    order_Y = jnp.argsort(owner_Y, stable=True)
    count_E = jnp.bincount(owner_Y, length=num_experts + 1)[:num_experts]
    tiles_E = -(-count_E // tile)
    first_tile_E = jnp.cumsum(tiles_E) - tiles_E
    first_row_E = jnp.cumsum(count_E) - count_E
    rank_Y = jnp.zeros(rows, jnp.int32).at[order_Y].set(jnp.arange(rows, dtype=jnp.int32))
    safe_Y = jnp.minimum(owner_Y, num_experts - 1)
    slot_Y = first_tile_E[safe_Y] * tile + rank_Y - first_row_E[safe_Y]
    slot_Y = jnp.where(owner_Y < num_experts, slot_Y, capacity)  # padding goes nowhere
    entry_Y = jnp.arange(rows, dtype=jnp.int32)
    token_slot = jnp.zeros(capacity, jnp.int32).at[slot_Y].set(entry_Y // per_token, mode="drop")
    weight_slot = jnp.zeros(capacity).at[slot_Y].set(routing.weights_UA.reshape(-1), mode="drop")
    last_tile_E = jnp.cumsum(tiles_E)

    def body(step: Array, slots: Array) -> Array:
        """A tile's outputs take the place of its inputs."""
        which = jnp.searchsorted(last_tile_E, step, side="right")
        x, weight = (lax.dynamic_slice_in_dim(a, step * tile, tile) for a in (slots, weight_slot))
        part = expert(weights, x, weight, cfg, num, which)
        return lax.dynamic_update_slice_in_dim(slots, part, step * tile, axis=0)

    out = lax.fori_loop(0, last_tile_E[-1], body, x_UD[token_slot])
    picked = out.at[slot_Y].get(mode="fill", fill_value=0)
    return _in_order(picked.reshape(tokens, per_token, -1))


def _is_small(weights: dict[str, Any], tokens: int) -> bool:
    """Whether picking experts takes longer than computing them all."""
    if not isinstance(weights["w1"], DecodedWeight):
        return False
    return tokens <= FEW_TOKENS and math.prod(weights["w1"].shape) <= SMALL_EXPERTS


def _dense_sum(
    weights: dict[str, Any], x_UD: Array, routing: Routing, cfg: ModelConfig, num: Numerics
) -> Array:
    """`routed_sum`, float32 `[U, D]`, by all experts on all tokens; those not chosen are left out.

    Weights are `DecodedWeight`s of all the model's experts.
    """
    num_experts, expert_dim, dim = weights["w1"].shape
    chosen_UAE = routing.experts_UA[..., None] == jnp.arange(num_experts)[None, None]
    scale_UE = jnp.where(chosen_UAE, routing.weights_UA[..., None], 0).sum(axis=1)

    def together(name: str) -> Array:
        all_of_them = DecodedWeight(weights[name].values.reshape(-1, dim))
        return linear(x_UD, all_of_them, num).reshape(-1, num_experts, expert_dim)

    hidden_UEF = num.cast(swiglu(together("w1"), together("w3"), cfg) * scale_UE[..., None])
    if num.rounds:
        hidden_UEF = fake_fp8(hidden_UEF, ACT_BLOCK)
    out_UED = num.cast(matmul_each(hidden_UEF.astype(jnp.float32), weights["w2"].values))
    return _in_order(jnp.take_along_axis(out_UED, routing.experts_UA[..., None], axis=1))


def _in_order(part_UAD: Array) -> Array:
    """Σ over a token's experts, from left to right: float32 `[U, D]`."""
    total_UD = part_UAD[:, 0].astype(jnp.float32)
    for a in range(1, part_UAD.shape[1]):
        total_UD = total_UD + part_UAD[:, a].astype(jnp.float32)
    return total_UD


def _kernel_sum(
    weights: dict[str, Any],
    x_UD: Array,
    routing: Routing,
    real_U: Array,
    cfg: ModelConfig,
    num: Numerics,
) -> Array:
    """`routed_sum` by its kernels; weights are quantised."""
    stacked = isinstance(weights["w1"], StackedWeight)
    stored = {name: w.stack if stacked else w for name, w in weights.items()}
    return routed_experts(
        x_UD,
        jnp.where(real_U[:, None], routing.experts_UA, weights["w1"].shape[0]),
        routing.weights_UA,
        stored["w1"],
        stored["w3"],
        stored["w2"],
        layer=weights["w1"].layer if stacked else None,
        limit=cfg.swiglu_limit,
        round_activations=num.rounds,
        implementation=num.matrix_kernels,
    )


def expert_tile(tokens: int, rows: int, num_experts: int) -> int:
    """Tile height: about the mean number of rows per expert, within bounds, as a power of two."""
    mean = max(rows // num_experts, min(tokens, MIN_EXPERT_TILE))
    return min(1 << (mean - 1).bit_length(), MAX_EXPERT_TILE)


class MoE(nn.Module):
    """Router, routed experts and shared expert of one layer."""

    cfg: ModelConfig
    num: Numerics
    is_hash: bool
    shards: Shards = SINGLE

    def setup(self) -> None:
        specs = moe_specs(self.cfg, self.is_hash)
        self.weights: dict[str, Any] = declare(self, self.cfg, specs, self.shards)

    def __call__(self, x_BTD: Array, tokens_BT: Array, real_BT: Array) -> Array:
        cfg, num, w = self.cfg, self.num, self.weights
        x_UD = x_BTD.reshape(-1, cfg.dim)
        routing = route(w["gate"], x_UD, tokens_BT.reshape(-1), cfg)

        def run(x_UD: Array, experts_UA: Array, weights_UA: Array, real_U: Array) -> Array:
            return routed_sum(w["experts"], x_UD, Routing(experts_UA, weights_UA), real_U, cfg, num)

        tokens = Tokens(x_UD, *routing, real_BT.reshape(-1))
        routed_UD = exchange(tokens, w["experts"]["w1"].shape[0], run, num, self.shards)
        shared_UD = self._shared(x_UD)
        out_UD = num.cast(routed_UD + shared_UD.astype(jnp.float32))
        return out_UD.reshape(x_BTD.shape)

    def _shared(self, x_UD: Array) -> Array:
        """The shared expert; its width may be split over devices."""
        cfg, num, shards = self.cfg, self.num, self.shards
        if shards.count("mlp") == 1:
            return expert(self.weights["shared"], x_UD, None, cfg, num)
        part_UD = expert(self.weights["shared"], x_UD, None, cfg, num, wide=True)
        return num.cast(shards.total(part_UD, "mlp"))

"""Products of rows with the matrix of their expert, differentiable, without dropped tokens.

Rows are sorted by expert and every expert's rows padded to whole tiles. On CPU a loop over the
tiles in use does the work, forwards and backwards; elsewhere it is XLA's ragged product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv4_jax.gather import invert, places, ranks, take

MIN_TILE, MAX_TILE = 8, 128


class Plan(NamedTuple):
    """Where routed rows go. S slots hold Y = U·A rows; a tile of slots has one expert.

    entry_S: row in a slot (Y: none). slot_Y: slot of a row (S: none, for padding tokens).
    expert_t: expert of every tile. tiles: how many are in use. rows_E: slots of every expert,
    padding included.
    """

    entry_S: Array
    slot_Y: Array
    expert_t: Array
    tiles: Array
    rows_E: Array


def plan_rows(experts_UA: Array, real_U: Array, num_experts: int) -> Plan:
    """Sorts routed rows by expert, stably; rows of padding tokens go nowhere.

    Nor do those of `num_experts`, which stands for experts of other devices.
    """
    rows = experts_UA.size
    tile = tile_size(rows, num_experts)
    tiles = min(rows, -(-rows // tile) + num_experts)
    owner_Y = jnp.where(real_U[:, None], experts_UA, num_experts).reshape(-1)
    rank_Y, count_E, is_own_EY = ranks(owner_Y, num_experts)
    tiles_E = -(-count_E // tile)
    last_tile_E = jnp.cumsum(tiles_E)
    expert_t = (jnp.arange(tiles)[:, None] >= last_tile_E[None]).sum(axis=1, dtype=jnp.int32)
    expert_t = jnp.minimum(expert_t, num_experts - 1)
    first_slot_E = (last_tile_E - tiles_E) * tile
    place_Y = places(rank_Y, first_slot_E, is_own_EY, tiles * tile)
    entry_S = invert(place_Y, tiles * tile)
    slot_Y = jnp.minimum(place_Y, tiles * tile)
    return Plan(entry_S, slot_Y, expert_t, last_tile_E[-1], tiles_E * tile)


def tile_size(rows: int, num_experts: int) -> int:
    """A power of two near half the mean number of rows per expert, within bounds."""
    mean = max(rows // (2 * num_experts), 1)
    return int(np.clip(1 << (mean.bit_length() - 1), MIN_TILE, MAX_TILE))


def to_slots(x_Y: Array, plan: Plan) -> Array:
    """Routed rows `[Y, …]` in slot order; zeros in empty slots."""
    return take(x_Y, plan.entry_S, plan.slot_Y)


def from_slots(x_S: Array, plan: Plan) -> Array:
    """The inverse of `to_slots`; zeros for rows of padding tokens."""
    return take(x_S, plan.slot_Y, plan.entry_S)


def grouped_linear(x_Sd: Array, weight: Array, plan: Plan) -> Array:
    """`x · Wᵀ` with each tile's matrix of `weight` `[E, out, in]`: `[S, out]` in x's dtype.

    The matrices are cast to x's dtype; sums and the gradient of `weight` are float32.
    """
    tiles = (plan.expert_t, plan.tiles)
    return lax.platform_dependent(x_Sd, weight, tiles, plan.rows_E, cpu=_by_tile, default=_ragged)


def _ragged(x_Sd: Array, weight: Array, tiles: Any, rows_E: Array) -> Array:
    del tiles
    w_Edo = jnp.swapaxes(weight, 1, 2).astype(x_Sd.dtype)
    precision = lax.Precision.HIGHEST if x_Sd.dtype == jnp.float32 else None
    out = lax.ragged_dot(
        x_Sd, w_Edo, rows_E, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(x_Sd.dtype)


def _by_tile(x_Sd: Array, weight: Array, tiles: Any, rows_E: Array) -> Array:
    del rows_E
    return _tile_product(x_Sd, weight, *tiles)


@jax.custom_vjp
def _tile_product(x_Sd: Array, weight: Array, expert_t: Array, tiles: Array) -> Array:
    return _loop(x_Sd, weight, expert_t, tiles, transposed=False)


def _loop(x_Sd: Array, weight: Array, expert_t: Array, tiles: Array, transposed: bool) -> Array:
    """x · Wᵀ or, transposed, x · W, tile by tile; unused slots stay zero."""
    tile = len(x_Sd) // len(expert_t)
    axis = 1 if transposed else 2
    width = weight.shape[3 - axis]

    def body(i: Array, out_So: Array) -> Array:
        x = lax.dynamic_slice_in_dim(x_Sd, i * tile, tile)
        w = lax.dynamic_index_in_dim(weight, expert_t[i], keepdims=False).astype(x.dtype)
        part = _dot(x, w, 1, axis - 1).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(out_So, part, i * tile, axis=0)

    return lax.fori_loop(0, tiles, body, jnp.zeros((len(x_Sd), width), x_Sd.dtype))


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _product_forward(x_Sd: Array, weight: Array, expert_t: Array, tiles: Array):
    return _tile_product(x_Sd, weight, expert_t, tiles), (x_Sd, weight, expert_t, tiles)


def _product_backward(saved: tuple[Array, ...], g_So: Array):
    x_Sd, weight, expert_t, tiles = saved
    tile = len(x_Sd) // len(expert_t)

    def body(i: Array, total: Array) -> Array:
        x, g = (lax.dynamic_slice_in_dim(a, i * tile, tile) for a in (x_Sd, g_So))
        old = lax.dynamic_index_in_dim(total, expert_t[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, old + _dot(g, x, 0, 0), expert_t[i], 0)

    g_weight = lax.fori_loop(0, tiles, body, jnp.zeros(weight.shape, jnp.float32))
    g_x = _loop(g_So, weight, expert_t, tiles, transposed=True)
    none = (np.zeros(a.shape, jax.dtypes.float0) for a in (expert_t, tiles))
    return (g_x, g_weight.astype(weight.dtype), *none)


_tile_product.defvjp(_product_forward, _product_backward)

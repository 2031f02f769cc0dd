"""Places routed rows so that each expert's rows fill whole tiles."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_TILE, MAX_TILE = 16, 128  # rows: one bfloat16 register tile; one pass of the matrix unit


class RowPlan(NamedTuple):
    """Slots Z are tiles of equal height, one expert after the other; empty experts have none."""

    source_Z: jax.Array  # row in this slot; -1 where the slot is unused
    slot_Y: jax.Array  # slot of each row; Z for rows that belong to no expert
    expert_T: jax.Array  # expert of each tile, ascending
    start_T: jax.Array  # number of its first row among all rows, sorted by expert
    num_tiles: jax.Array  # tiles in use, int32 []

    @property
    def tile(self) -> int:
        return self.source_Z.shape[0] // self.expert_T.shape[0]


def row_tile(rows: int, num_experts: int) -> int:
    """About the mean number of rows per expert, as a power of two."""
    mean = max(rows // num_experts, 1)
    return min(max(1 << (mean - 1).bit_length(), MIN_TILE), MAX_TILE)


def plan_rows(owner_Y: jax.Array, num_experts: int, tile: int) -> RowPlan:
    """Plan of rows with experts `owner_Y` in any order; ids outside [0, E) belong to no expert."""
    rows = owner_Y.shape[0]
    num_tiles = min(rows, -(-rows // tile) + num_experts)
    slots = num_tiles * tile
    is_here_Y = (owner_Y >= 0) & (owner_Y < num_experts)
    owner_Y = jnp.where(is_here_Y, owner_Y, num_experts)
    order_Y = jnp.argsort(owner_Y, stable=True)
    ids_E = jnp.arange(num_experts, dtype=jnp.int32)
    count_E = (owner_Y[:, None] == ids_E[None]).sum(0, dtype=jnp.int32)
    tiles_E = -(-count_E // tile)
    end_E = jnp.cumsum(tiles_E)  # first tile behind each expert
    first_E = jnp.cumsum(count_E) - count_E
    shift_E = (end_E - tiles_E) * tile - first_E
    row_Y = jnp.arange(rows, dtype=jnp.int32)
    rank_Y = jnp.zeros(rows, jnp.int32).at[order_Y].set(row_Y)
    slot_Y = rank_Y + shift_E[jnp.minimum(owner_Y, num_experts - 1)]
    slot_Y = jnp.where(is_here_Y, slot_Y, slots)
    source_Z = jnp.full(slots, -1, jnp.int32).at[slot_Y].set(row_Y, mode="drop")
    tile_T = jnp.arange(num_tiles, dtype=jnp.int32)
    expert_T = (tile_T[:, None] >= end_E[None]).sum(1, dtype=jnp.int32)
    expert_T = jnp.minimum(expert_T, num_experts - 1)
    start_T = jnp.clip(tile_T * tile - shift_E[expert_T], 0, rows - 1)
    return RowPlan(source_Z, slot_Y, expert_T, start_T, end_E[-1].astype(jnp.int32))

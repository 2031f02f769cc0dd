"""Expert matmuls of few tokens: their rows lie in VMEM, only weights stream.

    tokens [U, D] ──once──► VMEM ─┐ one-hot product: the rows of tile t
                                  ▼
    w1, w3 tiles ───────────► SwiGLU ──► hidden rows in VMEM ──once──► HBM ──once──► VMEM
                                                                                      ▼
    w2 tiles ──────────────────────────────────────────────────────────────────► w2 · hidden
                                  one-hot product: token of each row ──► += total [U, D] in VMEM

Neither rows per expert nor their outputs are laid out in HBM; hidden rows are, sorted by expert and
without padding. A token has an expert once, and tiles come in ascending order of experts, so that
is the order in which its experts add up.

A one-hot product copies bfloat16 exactly but spreads what is not finite: callers keep that out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import kernel
from pallas_kernels.grouped_matmul.plan import RowPlan

MAX_TOKENS = 256  # 3.7 MB of rows, 7168 wide


def hidden_rows(rows: int, tile: int) -> int:
    """Rows of the hidden array: room for a window behind the last row."""
    return (rows - 1) // kernel.ROWS * kernel.ROWS + tile + kernel.ROWS


def _one_hot(is_one: jax.Array) -> jax.Array:
    return is_one.astype(jnp.float32).astype(jnp.bfloat16)


def _copy(picks: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows picked by a one-hot matrix, float32."""
    return lax.dot_general(
        picks, rows, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _window(start_ref, tile: int) -> tuple[Any, jax.Array]:
    """Aligned rows around those of this tile, and how many come before them."""
    start = start_ref[pl.program_id(1)]
    base = pl.multiple_of(start // kernel.ROWS * kernel.ROWS, kernel.ROWS)
    return pl.ds(base, tile + kernel.ROWS), start - base


def _swiglu_body(expert_ref, layer_ref, start_ref, token_ref, x_ref, *refs, **facts) -> None:
    """`kernel.swiglu_body` between two copies: rows to the tile, results to their place."""
    *operands, hidden_ref, w1_scr, acc1_scr, w3_scr, acc3_scr, rows_scr, tile_scr = refs
    tile = tile_scr.shape[1]
    tokens = lax.broadcasted_iota(jnp.int32, (tile, x_ref.shape[1]), 1)
    picks = _one_hot(token_ref[0].T == tokens)
    for part in range(x_ref.shape[0]):
        rows_scr[part] = _copy(picks, x_ref[part]).astype(rows_scr.dtype)
    inner = rows_scr, *operands, tile_scr, w1_scr, acc1_scr, w3_scr, acc3_scr
    kernel.swiglu_body(expert_ref, layer_ref, start_ref, *inner, **facts)  # type: ignore[call-arg]

    @pl.when(pl.program_id(1) == 0)
    def _():
        hidden_ref[...] = jnp.zeros_like(hidden_ref)

    window, shift = _window(start_ref, tile)
    shape = (tile + kernel.ROWS, tile)
    puts = _one_hot(
        lax.broadcasted_iota(jnp.int32, shape, 0)
        == lax.broadcasted_iota(jnp.int32, shape, 1) + shift
    )
    for part in range(hidden_ref.shape[0]):  # rows of other tiles, and unused slots, add zeros
        hidden_ref[part, window] += _copy(puts, tile_scr[part]).astype(hidden_ref.dtype)


def _combine_body(
    expert_ref,
    layer_ref,
    start_ref,
    token_ref,
    hidden_ref,
    codes_ref,
    scales_ref,
    total_ref,
    w_scr,
    acc_scr,
    rows_scr,
    *,
    fmt,
):
    del layer_ref  # only the block specs need it
    t, token = pl.program_id(1), token_ref[0]
    tile = token.shape[1]

    @pl.when(kernel.is_new_expert(expert_ref))
    def _():
        kernel.decode(fmt, codes_ref, scales_ref, w_scr)

    window, shift = _window(start_ref, tile)
    shape = (tile, tile + kernel.ROWS)
    picks = _one_hot(
        lax.broadcasted_iota(jnp.int32, shape, 1)
        == lax.broadcasted_iota(jnp.int32, shape, 0) + shift
    )
    for part in range(hidden_ref.shape[0]):
        rows_scr[part] = _copy(picks, hidden_ref[part, window]).astype(rows_scr.dtype)
    y = kernel.multiply(fmt, rows_scr, w_scr, scales_ref, acc_scr)
    puts = _one_hot(token == lax.broadcasted_iota(jnp.int32, (total_ref.shape[0], tile), 0))
    part = _copy(puts, y.astype(jnp.bfloat16))  # exact: one row each

    @pl.when(t == 0)
    def _():
        total_ref[...] = part

    @pl.when(t > 0)
    def _():
        total_ref[...] += part


def swiglu(
    x_PUK: jax.Array,
    token_Z: jax.Array,
    scale_Z: jax.Array,
    up: kernel.SwiGLU,
    plan: RowPlan,
    layer_1: jax.Array,
    interpret=False,
) -> jax.Array:
    """As `kernel.swiglu` of the rows `token_Z` (negative: none) of `x_PUK`; U a multiple of 16.

    Rows of the result are those of the plan, sorted by expert, without unused slots.
    """
    (parts, _, lanes), tile = x_PUK.shape, plan.tile
    fmt1, width, facts = up.sizes(tile)
    rows = hidden_rows(plan.slot_Y.shape[0], tile)
    shape = jax.ShapeDtypeStruct((up.parts, rows, width * fmt1.out_tiles), jnp.bfloat16)
    hidden = kernel.call(
        functools.partial(_swiglu_body, **facts),
        _one_tile_at_least(plan),
        layer_1,
        [
            kernel.per_slot(token_Z, tile),
            (x_PUK, _resident(x_PUK)),
            kernel.per_slot(scale_Z, tile),
        ],
        2 * (x_PUK.size + shape.size),
        [up.w1, up.w3],
        shape,
        pl.BlockSpec((up.parts, rows, width), lambda n, t, *_: (0, 0, n)),
        [
            pltpu.VMEM((parts, tile, lanes), jnp.bfloat16),
            pltpu.VMEM((up.parts, tile, width), jnp.bfloat16),
        ],
        "grouped_swiglu",
        interpret,
    )
    return hidden[:, :, : fmt1.out_dim // up.parts]


def combine(
    hidden_PYF: jax.Array,
    token_Z: jax.Array,
    tokens: int,
    weight: Any,
    plan: RowPlan,
    layer_1: jax.Array,
    interpret=False,
) -> jax.Array:
    """Σ of `hidden · W[expert]ᵀ`, rounded to bfloat16, per token: float32 `[tokens, out]`."""
    fmt = kernel.describe(weight, plan.tile)
    parts, _, lanes = hidden_PYF.shape
    return kernel.call(
        functools.partial(_combine_body, fmt=fmt),
        _one_tile_at_least(plan),
        layer_1,
        [kernel.per_slot(token_Z, plan.tile), (hidden_PYF, _resident(hidden_PYF))],
        2 * hidden_PYF.size + 4 * tokens * fmt.out_dim,
        [weight],
        jax.ShapeDtypeStruct((tokens, fmt.out_dim), jnp.float32),
        pl.BlockSpec((tokens, fmt.out_tile), lambda n, t, *_: (0, n)),
        [pltpu.VMEM((parts, plan.tile, lanes), jnp.bfloat16)],
        "grouped_combine",
        interpret,
    )


def _one_tile_at_least(plan: RowPlan) -> RowPlan:
    """Where no row has an expert, a tile of unused slots still writes zeros."""
    return plan._replace(num_tiles=jnp.maximum(plan.num_tiles, 1))


def _resident(array: jax.Array) -> pl.BlockSpec:
    """All of an array, fetched once."""
    return pl.BlockSpec(array.shape, lambda n, t, *_: (0,) * array.ndim, pl.Buffered(1))

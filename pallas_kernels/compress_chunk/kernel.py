"""Pools windows of a chunk; values and scores cross HBM once and nothing else does.

    no overlap:  row = Σ softmax(scores) · values over a window, per channel
    overlap:     window w-1, first half of the channels ─┐
                 window w, second half ──────────────────┴─► row w - 1

With overlap, strided loads bring token r of all windows of a block side by side, so pooling is
elementwise. They want arrays of 128 lanes: a block is 128 channels of either half. The window in
front of a block comes as a block of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
BLOCK_BYTES = 1 << 20
f32 = jnp.float32


class Plan(NamedTuple):
    """Static sizes of a call. windows: of a sequence, with overlap one more than rows."""

    batch: int
    windows: int
    width: int
    ratio: int
    overlaps: bool

    @property
    def row_dim(self) -> int:
        return self.width // 2 if self.overlaps else self.width

    @property
    def block(self) -> int:
        """Windows of a block: whole sublanes of output rows."""
        lanes = LANES if self.overlaps else self.width
        most = BLOCK_BYTES // (4 * lanes * self.ratio) // SUBLANES * SUBLANES
        return max(min(most, -(-self.windows // SUBLANES) * SUBLANES), SUBLANES)


def check(plan: Plan) -> None:
    """Raises NotImplementedError for sizes the kernel does not cover."""
    if plan.row_dim % LANES:
        raise NotImplementedError(f"rows of {plan.row_dim} channels, in {LANES}s only")
    if plan.overlaps and plan.ratio != SUBLANES // 2:
        raise NotImplementedError(f"overlapping windows of {plan.ratio} tokens, of 4 only")
    if not plan.overlaps and plan.ratio % SUBLANES:
        raise NotImplementedError(f"windows of {plan.ratio} tokens, in {SUBLANES}s only")


def _weighted(parts: Sequence[tuple[Array, Array]], peak: Array) -> Array:
    """Σ exp(score - peak) · value / Σ exp(score - peak) of (values, scores), elementwise."""
    total, mean = jnp.zeros_like(peak), jnp.zeros_like(peak)
    for values, scores in parts:
        weights = jnp.exp(scores - peak)
        total, mean = total + weights, mean + weights * values
    return mean / total


def _plain_body(first_ref, values_ref, scores_ref, rows_ref, *, plan: Plan) -> None:
    del first_ref  # rows do not reach back
    for w in range(plan.block):
        tokens = slice(w * plan.ratio, (w + 1) * plan.ratio)
        scores = scores_ref[tokens]
        weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
        mean = (weights * values_ref[tokens]).sum(axis=0, keepdims=True)
        rows_ref[w : w + 1] = mean / weights.sum(axis=0, keepdims=True)


def _overlap_body(first_ref, *refs, plan: Plan) -> None:
    """refs: of values, then of scores: first half, second half, tokens in front; then the rows."""
    *stores, rows_ref = refs
    top = lax.broadcasted_iota(jnp.int32, (plan.block, LANES), 0)
    # row w - 1 has nothing before it where it is the sequence's first
    window = top + pl.program_id(1) * plan.block
    is_alone = window - 1 + first_ref[pl.program_id(0)] == 0

    def split(refs, r: int) -> tuple[Array, Array]:
        """Token r of the window before each window (first half), and of itself (second half)."""
        half_ref, own_ref, old_ref = refs
        tokens = pl.ds(r, plan.block, stride=plan.ratio)
        old = old_ref[plan.ratio + r : plan.ratio + r + 1]
        return jnp.where(top == 0, old, pltpu.roll(half_ref[tokens, :], 1, 0)), own_ref[tokens, :]

    parts = []
    for r in range(plan.ratio):
        values, scores = split(stores[:3], r), split(stores[3:], r)
        parts.append((values[0], jnp.where(is_alone, -jnp.inf, scores[0])))
        parts.append((values[1], scores[1]))
    peak = functools.reduce(jnp.maximum, [scores for _, scores in parts])
    rows_ref[...] = _weighted(parts, peak)


def pool_windows(
    plan: Plan, values: Array, scores: Array, first_B: Array, interpret=False
) -> Array:
    """Rows float32 `[B, windows, d]`; with overlap row w is that of window w + 1, and one less."""
    body, specs, lanes = _plain_body, [_tokens(plan, plan.width)], plan.row_dim
    if plan.overlaps:
        body, specs, lanes = _overlap_body, _halves(plan), LANES
    operands = [values] * len(specs) + [scores] * len(specs)
    grid = plan.batch, pl.cdiv(plan.windows, plan.block), plan.row_dim // lanes
    size = plan.batch * plan.windows
    rows = pl.pallas_call(
        functools.partial(body, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.batch, plan.windows, plan.row_dim), f32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs * 2,
            out_specs=pl.BlockSpec((None, plan.block, lanes), lambda b, w, c, *_: (b, w, c)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=4 * size * plan.ratio * plan.width,
            transcendentals=size * plan.ratio * plan.width,
            bytes_accessed=8 * size * plan.ratio * plan.width + 4 * size * plan.row_dim,
        ),
        interpret=interpret,
        name="compress_chunk",
    )(first_B, *operands)
    return rows[:, 1:] if plan.overlaps else rows


def _tokens(plan: Plan, lanes: int, first: int = 0) -> pl.BlockSpec:
    """Tokens of a block of windows, from channel block `first` on."""
    shape = (None, plan.block * plan.ratio, lanes)
    return pl.BlockSpec(shape, lambda b, w, c, *_: (b, w, first + c))


def _halves(plan: Plan) -> list[pl.BlockSpec]:
    """First half of the channels, second half, and the first half of the tokens in front."""
    step = plan.block * plan.ratio // SUBLANES
    before = pl.BlockSpec(
        (None, SUBLANES, LANES), lambda b, w, c, *_: (b, jnp.maximum(w * step - 1, 0), c)
    )
    return [_tokens(plan, LANES), _tokens(plan, LANES, plan.row_dim // LANES), before]

"""Query heads in one pass: rows of all heads side by side in, `[tokens, heads, channels]` out.

XLA would lay the projection out anew as float32 before it takes the norm, and once more as bfloat16
for the attention kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles

LANES = tiles.LANES
ROWS = 8  # tokens of a block: one register of float32
HEADS = (16, 8)  # of a block, where they divide all: registers of bfloat16


def _body(y_ref, cos_ref, sin_ref, out_ref, heads_scr, *, eps, rounds):
    channels = out_ref.shape[2]
    cos, sin = cos_ref[...], sin_ref[...]
    even = (lax.broadcasted_iota(jnp.int32, cos.shape, 1) & 1) == 0
    step = tiles.round_bf16 if rounds else lambda x: x
    for n in range(out_ref.shape[1]):
        x = y_ref[:, n * channels : (n + 1) * channels].astype(jnp.float32)
        mean = step(step(x * x).sum(axis=1, keepdims=True) / channels)
        x = tiles.round_bf16(x * step(lax.rsqrt(step(mean + eps))))
        last = x[:, channels - LANES :]
        other = jnp.where(even, pltpu.roll(last, LANES - 1, 1), pltpu.roll(last, 1, 1))
        heads_scr[:, n, : channels - LANES] = x[:, : channels - LANES]
        heads_scr[:, n, channels - LANES :] = tiles.round_bf16(last * cos + other * sin)
    out_ref[...] = heads_scr[...].astype(out_ref.dtype)


def query_heads(
    y_Ux: jax.Array,
    cos_UL: jax.Array,
    sin_UL: jax.Array,
    heads: int,
    eps: float,
    rounds: bool,
    interpret=False,
) -> jax.Array:
    """`[U, heads, H]`; cos and signed sin are those of the last 128 channels, one by one."""
    tokens, channels = y_Ux.shape[0], y_Ux.shape[1] // heads
    across = next((n for n in HEADS if heads % n == 0), heads)
    turn = pl.BlockSpec((ROWS, LANES), lambda u, n: (u, 0))
    return pl.pallas_call(
        functools.partial(_body, eps=eps, rounds=rounds),
        out_shape=jax.ShapeDtypeStruct((tokens, heads, channels), y_Ux.dtype),
        grid=(pl.cdiv(tokens, ROWS), heads // across),
        in_specs=[pl.BlockSpec((ROWS, across * channels), lambda u, n: (u, n)), turn, turn],
        out_specs=pl.BlockSpec((ROWS, across, channels), lambda u, n: (u, n, 0)),
        scratch_shapes=[pltpu.VMEM((ROWS, across, channels), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=4 * y_Ux.size,
            transcendentals=tokens * heads,
            bytes_accessed=4 * y_Ux.size + 8 * tokens * LANES,
        ),
        interpret=interpret,
        name="query_heads",
    )(y_Ux, cos_UL, sin_UL)

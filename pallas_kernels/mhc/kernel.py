"""Hyper-connections in two passes over the streams: `mix` reads them once, `spread` updates them.

    grid (token tile,)          streams lie side by side: h [tokens, M·D], stream m in lanes m·D …

    mix     h tile [TU, M·D] ──► norm statistic ┐
            fn [24, M·D]     ──► 24 logits      ┴─► pre, post, comb (Sinkhorn): tokens in lanes
            h tile, still in VMEM, weighted by pre ──► x [TU, D], normed if asked

    spread  a [TU, D], h tile, post and comb ──► new h tile

The logits need float32 products. h is bfloat16, so fn split into three bfloat16 terms gives them
exactly: three passes of the matrix unit instead of the six of a float32 product. The split happens
once per core, in scratch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles

MIB = 1 << 20
ROW_TILE_BYTES = 4 * MIB
MIN_ROWS = 16  # Mosaic refuses a mixed-precision product with a single row
CORES = 2  # v5p splits this dimension over its cores; elsewhere it is a loop
CHUNK = 512  # lanes handled at a time
TERMS = 3  # bfloat16 numbers that add up to a float32 one


def row_tile(tokens: int, width: int) -> int:
    """Tokens per step: lanes of the mixing numbers, so 128 of them or all."""
    if tokens <= tiles.LANES:
        return tokens
    fits = ROW_TILE_BYTES // (2 * width) // tiles.LANES * tiles.LANES
    return min(max(fits, tiles.LANES), 512)


def sinkhorn(comb: jax.Array, iters: int, eps: float) -> jax.Array:
    """Row softmax, then column and row normalisation in turn, of `[source, target, tokens]`."""
    comb = jnp.exp(comb - comb.max(1, keepdims=True))
    comb = comb / comb.sum(1, keepdims=True) + eps
    comb = comb / (comb.sum(0, keepdims=True) + eps)

    def step(_, c):
        c = c / (c.sum(1, keepdims=True) + eps)
        return c / (c.sum(0, keepdims=True) + eps)

    return lax.fori_loop(0, iters - 1, step, comb)


def _scan_lanes(width: int, body, carry):
    """`carry = body(start, lanes, carry)` over chunks; a loop where chunks are whole registers."""
    whole, rest = divmod(width, CHUNK)
    if width % tiles.LANES:
        for k in range(whole):
            carry = body(k * CHUNK, CHUNK, carry)
    elif whole:
        carry = lax.fori_loop(
            0, whole, lambda k, c: body(pl.multiple_of(k * CHUNK, CHUNK), CHUNK, c), carry
        )
    return body(whole * CHUNK, rest, carry) if rest else carry


def _stream(h_ref, m: int, dim: int, start, lanes: int) -> jax.Array:
    """Chunk of stream m, float32."""
    first = m * dim + start
    if not isinstance(start, int):
        first = pl.multiple_of(first, tiles.LANES)
    return h_ref[:, pl.ds(first, lanes)].astype(jnp.float32)


def _split_terms(fn_ref, terms_scr) -> None:
    rows = fn_ref.shape[0]

    def body(start, lanes, carry):
        here = pl.ds(start, lanes)
        rest = fn_ref[:, here]
        for i in range(TERMS):
            # cut, not rounded: 8 + 8 + 8 bits are all there are, and no compiler can undo it
            bits = lax.bitcast_convert_type(rest, jnp.int32) & -0x10000
            term = lax.bitcast_convert_type(bits, jnp.float32)
            terms_scr[i, :rows, here] = term.astype(jnp.bfloat16)
            rest = rest - term
        return carry

    _scan_lanes(fn_ref.shape[1], body, 0)


def _logits(h_ref, terms_scr, rows: int, norm_eps: float) -> jax.Array:
    """`[rows, tokens]`: fn · h over its root mean square."""
    tokens, width = h_ref.shape

    def body(start, lanes, carry):
        total, squares = carry
        here = pl.ds(start, lanes)
        h = h_ref[:, here]
        for i in reversed(range(TERMS)):  # small terms first
            total = total + tiles.dot(terms_scr[i, :, here], h)
        h32 = h.astype(jnp.float32)
        return total, squares + (h32 * h32).sum(1, keepdims=True)

    zero = jnp.zeros((terms_scr.shape[1], tokens), jnp.float32)
    total, squares = _scan_lanes(width, body, (zero, jnp.zeros((tokens, 1), jnp.float32)))
    inverse = lax.rsqrt(squares / width + norm_eps)
    return total[:rows] * _to_lanes(inverse)


def _to_lanes(column: jax.Array) -> jax.Array:
    """`[tokens, 1]` as `[1, tokens]`."""
    return jnp.broadcast_to(column, (column.shape[0], tiles.LANES)).T[:1]


def _to_rows(numbers: jax.Array) -> jax.Array:
    """`[n, tokens]` as `[tokens, n or more]`."""
    n, tokens = numbers.shape
    if short := -n % 8:
        numbers = jnp.concatenate([numbers, jnp.zeros((short, tokens), jnp.float32)], axis=0)
    return numbers.T


def _mix_body(
    scale_ref,
    h_ref,
    fn_ref,
    base_ref,
    norm_ref,
    x_ref,
    out_ref,
    terms_scr,
    *,
    m,
    iters,
    eps,
    norm_eps,
    normed,
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        terms_scr[...] = jnp.zeros_like(terms_scr)
        _split_terms(fn_ref, terms_scr)

    tokens, dim = x_ref.shape
    logits = _logits(h_ref, terms_scr, fn_ref.shape[0], norm_eps)
    base = base_ref[...]
    pre = jax.nn.sigmoid(logits[:m] * scale_ref[0] + base[:m]) + eps
    post = 2 * jax.nn.sigmoid(logits[m : 2 * m] * scale_ref[1] + base[m : 2 * m])
    comb = logits[2 * m :] * scale_ref[2] + base[2 * m :]
    comb = sinkhorn(comb.reshape(m, m, tokens), iters, eps)
    out_ref[:m] = post
    for j in range(m):
        out_ref[m + j * m : m + (j + 1) * m] = comb[j]

    weights = _to_rows(pre)

    def weigh(start, lanes, squares):
        terms = [weights[:, s : s + 1] * _stream(h_ref, s, dim, start, lanes) for s in range(m)]
        x = tiles.round_bf16(sum(terms[1:], terms[0]))
        x_ref[:, pl.ds(start, lanes)] = x.astype(x_ref.dtype)
        return squares + (x * x).sum(1, keepdims=True)

    squares = _scan_lanes(dim, weigh, jnp.zeros((tokens, 1), jnp.float32))
    if normed:
        inverse = lax.rsqrt(squares / dim + norm_eps)

        def norm(start, lanes, carry):
            here = pl.ds(start, lanes)
            x32 = x_ref[:, here].astype(jnp.float32)
            x_ref[:, here] = (norm_ref[:, here] * (x32 * inverse)).astype(x_ref.dtype)
            return carry

        _scan_lanes(dim, norm, 0)


def mix(
    h_Um: jax.Array,
    fn: jax.Array,
    scale_3: jax.Array,
    base: jax.Array,
    norm_D: jax.Array | None,
    iters: int,
    eps: float,
    norm_eps: float,
    m: int,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """Sublayer input `[U, D]` and `[M + M·M, U]`: post, then comb by source and target."""
    tokens, width = h_Um.shape
    rows, dim = fn.shape[0], width // m
    tile = max(row_tile(tokens, width), MIN_ROWS)
    steps = pl.cdiv(tokens, tile)
    cores = CORES if steps % CORES == 0 else 1
    per_core = steps // cores
    normed = norm_D is not None
    norm_1D = (norm_D if normed else jnp.zeros(dim)).astype(jnp.float32)[None]
    padded_rows = -(-rows // 16) * 16

    def whole(shape):
        return pl.BlockSpec(shape, lambda c, u: (0,) * len(shape))

    x_UD, numbers = pl.pallas_call(
        functools.partial(_mix_body, m=m, iters=iters, eps=eps, norm_eps=norm_eps, normed=normed),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, dim), h_Um.dtype),
            jax.ShapeDtypeStruct((m + m * m, max(tokens, tile)), jnp.float32),
        ),
        grid=(cores, per_core),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tile, width), lambda c, u: (c * per_core + u, 0)),
            whole((rows, width)),
            whole((rows, 1)),
            whole((1, dim)),
        ],
        out_specs=(
            pl.BlockSpec((tile, dim), lambda c, u: (c * per_core + u, 0)),
            pl.BlockSpec((m + m * m, tile), lambda c, u: (0, c * per_core + u)),
        ),
        scratch_shapes=[pltpu.VMEM((TERMS, padded_rows, width), jnp.bfloat16)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(tile, width, rows),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * width * (TERMS * rows + 3),
            transcendentals=tokens * (2 * m + m * m),
            bytes_accessed=2 * tokens * (width + dim) + 4 * rows * width + 4 * tokens * (m + m * m),
        ),
        interpret=interpret,
        name="mhc_mix",
    )(scale_3, h_Um, fn, base[:, None], norm_1D)
    return x_UD, numbers[:, :tokens]


def _spread_body(a_ref, h_ref, mix_ref, out_ref, *, m):
    dim = a_ref.shape[1]
    numbers = _to_rows(mix_ref[...])

    def body(start, lanes, carry):
        a = a_ref[:, pl.ds(start, lanes)].astype(jnp.float32)
        streams = [_stream(h_ref, s, dim, start, lanes) for s in range(m)]
        for k in range(m):
            columns = [numbers[:, m + j * m + k : m + j * m + k + 1] for j in range(m)]
            terms = [column * h for column, h in zip(columns, streams, strict=True)]
            total = numbers[:, k : k + 1] * a + sum(terms[1:], terms[0])
            first = k * dim + start
            if not isinstance(start, int):
                first = pl.multiple_of(first, tiles.LANES)
            out_ref[:, pl.ds(first, lanes)] = total.astype(out_ref.dtype)
        return carry

    _scan_lanes(dim, body, 0)


def spread(
    a_UD: jax.Array, h_Um: jax.Array, mix_nU: jax.Array, m: int, interpret=False
) -> jax.Array:
    """New streams `[U, M·D]`."""
    tokens, width = h_Um.shape
    dim, tile = width // m, row_tile(tokens, width)
    return pl.pallas_call(
        functools.partial(_spread_body, m=m),
        out_shape=jax.ShapeDtypeStruct(h_Um.shape, h_Um.dtype),
        grid=(pl.cdiv(tokens, tile),),
        in_specs=[
            pl.BlockSpec((tile, dim), lambda u: (u, 0)),
            pl.BlockSpec((tile, width), lambda u: (u, 0)),
            pl.BlockSpec((mix_nU.shape[0], tile), lambda u: (0, u)),
        ],
        out_specs=pl.BlockSpec((tile, width), lambda u: (u, 0)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes(tile, width, 0)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * width * (m + 1),
            transcendentals=0,
            bytes_accessed=2 * tokens * (2 * width + dim) + 4 * mix_nU.size,
        ),
        interpret=interpret,
        name="mhc_spread",
    )(a_UD, h_Um, mix_nU)


def vmem_bytes(tile: int, width: int, rows: int) -> int:
    """Upper bound of a step: double-buffered blocks, scratch, and the compiler's temporaries."""
    streams = 2 * 2 * max(tile, 16) * width
    outputs = streams  # spread; mix writes less
    sublayer = streams // 2  # its output in spread, its input in mix; M ≥ 2 streams
    fn = rows * width * 4 * 2 + TERMS * 32 * width * 2 if rows else 0
    return max(16 * MIB, streams + outputs + sublayer + fn + 6 * MIB)

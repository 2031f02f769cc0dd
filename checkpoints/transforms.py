"""Pure per-array functions of conversion: numpy in, numpy out, one matrix `[out, in]` at a time.

FP4 codes are bytes with two e2m1 numbers, the low nibble being the even input; 16 × 256 results per
scale exponent fit small tables, so no float arithmetic touches the bulk of a checkpoint.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_jax.quant import FP4_BLOCK, WEIGHT_BLOCK, QuantizedArray, quantize_weight

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS, E8M0_NAN = 127, 255
LOOKUP_ROWS = 64  # rows looked up at a time: their indices stay in the processor's cache
FP8_HEADROOM = 6  # an FP8 block's scale lies 2^6 below its largest FP4 scale: 6 · 64 = 384 ≤ 448


class InexactError(ValueError):
    """Values that the wanted format cannot hold exactly."""


def pow2_exponents(scales: np.ndarray) -> np.ndarray:
    """Biased exponents (uint8, value 2^(b-127)) of E8M0 or float32 scales.

    Raises:
        InexactError: a scale is NaN or no power of two in E8M0's range.
    """
    if scales.dtype == E8M0:
        exponents = scales.view(np.uint8)
        if (exponents == E8M0_NAN).any():
            raise InexactError("a scale is NaN")
        return exponents
    exponents = scales.astype(E8M0)
    if not np.array_equal(exponents.astype(np.float32), scales):
        raise InexactError("a scale is no power of two")
    return exponents.view(np.uint8)


def scales_from_exponents(exponents: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inverse of `pow2_exponents` for either scale dtype."""
    return exponents.view(E8M0).astype(dtype, copy=False)


@functools.cache
def _pair_values() -> np.ndarray:
    """float64 `[256, 2]`: the even and the odd input of every FP4 byte."""
    values = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=-1)


@functools.cache
def _fp8_table() -> tuple[np.ndarray, np.ndarray]:
    """uint16 pairs of e4m3 codes and their exactness, `[shift, byte]`: byte · 2^(6-shift)."""
    exact = _pair_values()[None] * np.exp2(FP8_HEADROOM - np.arange(256.0))[:, None, None]
    codes = exact.astype(np.float32).astype(E4M3)
    ok = (codes.astype(np.float64) == exact).all(-1)
    return np.ascontiguousarray(codes).view(np.uint16)[..., 0], ok


@functools.cache
def _bf16_table() -> tuple[np.ndarray, np.ndarray]:
    """uint32 pairs of bfloat16 values and their exactness, `[exponent, byte]`."""
    exact = _pair_values()[None] * np.exp2(np.arange(256.0) - E8M0_BIAS)[:, None, None]
    with np.errstate(over="ignore"):
        values = exact.astype(np.float32).astype(BF16)
    ok = (values.astype(np.float64) == exact).all(-1)
    return np.ascontiguousarray(values).view(np.uint32)[..., 0], ok


def _look_up(
    table: np.ndarray, ok: np.ndarray, rows: np.ndarray, codes: np.ndarray
) -> np.ndarray | None:
    """`table[row, byte]` of every FP4 byte, `rows` being one per 32 inputs; None unless all ok."""
    out_dim, groups = rows.shape
    index_rows = rows.astype(np.intp)
    must_check = not np.all(ok, axis=1)[index_rows].all()
    result = np.empty(codes.shape, table.dtype)
    for start in range(0, out_dim, LOOKUP_ROWS):
        part = slice(start, start + LOOKUP_ROWS)
        grouped = codes[part].reshape(-1, groups, FP4_BLOCK // 2)
        index = (index_rows[part] * 256)[..., None] + grouped
        if must_check and not ok.reshape(-1).take(index).all():
            return None
        index = index.reshape(-1, codes.shape[1])
        table.reshape(-1).take(index, out=result[part], mode="clip")
    return result


def fp4_to_fp8(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed FP4 with scales per 1×32 as FP8 with scales per 128×128, losing nothing.

    codes uint8 `[out, in/2]`, scales `[out, in/32]` → codes float8_e4m3fn `[out, in]`, scales
    `[⌈out/128⌉, ⌈in/128⌉]` of the same dtype. The rule of the technical report, section 5.2.1.

    Raises:
        InexactError: some value does not fit, or a scale is no power of two.
    """
    out_dim, in_dim = codes.shape[0], codes.shape[1] * 2
    old = pow2_exponents(scales)
    group = WEIGHT_BLOCK // FP4_BLOCK
    grid = (-(-out_dim // WEIGHT_BLOCK), -(-in_dim // WEIGHT_BLOCK))
    padded = np.zeros((grid[0] * WEIGHT_BLOCK, grid[1] * group), np.uint8)
    padded[:out_dim, : old.shape[1]] = old
    largest = padded.reshape(grid[0], WEIGHT_BLOCK, grid[1], group).max((1, 3))
    new = np.maximum(largest, FP8_HEADROOM) - FP8_HEADROOM
    full = np.repeat(np.repeat(new, WEIGHT_BLOCK, 0), group, 1)[:out_dim, : old.shape[1]]
    shift = FP8_HEADROOM + full.astype(np.int16) - old  # 0 … 255 by construction
    result = _look_up(*_fp8_table(), shift, codes)
    if result is None:
        raise InexactError("FP4 scales of one 128×128 block lie too far apart for FP8")
    return result.view(E4M3), scales_from_exponents(np.ascontiguousarray(new), scales.dtype)


def fp4_to_bf16(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values of packed FP4, bfloat16 `[out, in]`; exact for power-of-two scales, else rounded."""
    if scales.dtype != E8M0:
        return fp4_to_float32(codes, scales).astype(BF16)
    result = _look_up(*_bf16_table(), pow2_exponents(scales), codes)
    if result is None:
        raise InexactError("a dequantised value lies outside of bfloat16's range")
    return result.view(BF16)


def fp8_to_dense(codes: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values of 128×128-block FP8 `[out, in]`, rounded once; exact for power-of-two scales."""
    out_dim, in_dim = codes.shape
    factors = scales.astype(np.float32)
    result = np.empty(codes.shape, dtype)
    for row in range(0, out_dim, WEIGHT_BLOCK):  # one stripe of tiles at a time
        stripe = np.repeat(factors[row // WEIGHT_BLOCK], WEIGHT_BLOCK)[None, :in_dim]
        rows = slice(row, row + WEIGHT_BLOCK)
        result[rows] = (codes[rows].astype(np.float32) * stripe).astype(dtype)
    return result


def fp4_to_float32(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values of packed FP4, float32 `[out, in]`."""
    values = _pair_values().astype(np.float32)[codes].reshape(codes.shape[0], -1)
    return values * np.repeat(scales.astype(np.float32), FP4_BLOCK, axis=1)


def to_bf16(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantises either format: packed FP4 is uint8, FP8 is float8_e4m3fn."""
    if codes.dtype == np.uint8:
        return fp4_to_bf16(codes, scales)
    return fp8_to_dense(codes, scales, BF16)


def to_float32(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Like `to_bf16`, in float32."""
    if codes.dtype == np.uint8:
        return fp4_to_float32(codes, scales)
    return fp8_to_dense(codes, scales, np.dtype(np.float32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(values: jax.Array, fmt: str, scale_dtype: np.dtype) -> QuantizedArray:
    return quantize_weight(values.astype(jnp.float32), fmt, scale_dtype)


def quantize(values: np.ndarray, fmt: str, scale_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes and power-of-two scales of a matrix `[out, in]`, rounded to "fp8" or "fp4"."""
    weight = _quantize(jnp.asarray(values), fmt, jnp.dtype(scale_dtype))
    return np.asarray(weight.codes), np.asarray(weight.scales)


def hash_table_problem(table_VA: np.ndarray, num_experts: int) -> str | None:
    """What is wrong with a token → experts table, or None.

    Every row must name distinct experts: implementations disagree on repeated ones.
    """
    if table_VA.min() < 0 or table_VA.max() >= num_experts:
        return (
            f"holds expert ids from {table_VA.min()} to {table_VA.max()}; they must lie in "
            f"0 … {num_experts - 1}"
        )
    ordered = np.sort(table_VA, axis=1)
    repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))
    if repeated.size:
        row = int(repeated[0])
        return (
            f"names an expert twice in {repeated.size} rows, first in row {row}: "
            f"{table_VA[row].tolist()}; the experts of a token must be distinct"
        )
    return None

"""How compressed rows, window rows and index keys are stored.

Eight- and sixteen-bit floats are kept as unsigned integers of the same bits: every backend updates
integers in place, while some would widen a whole cache of small floats to write one row.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.quant import (
    FP4_BLOCK,
    KV_BLOCK,
    dequantize_fp8,
    pack_fp4,
    quantize_fp4,
    quantize_fp8,
    unpack_fp4,
)

E8M0_ONE = 127  # bits of the scale 1
SCALE_BYTES = 4  # whole words: XLA on TPU copies arrays of other widths before a kernel


@struct.dataclass
class PackedRows:
    """KV rows as the checkpoint's training rounded them: 448 FP8 + 7 scales + 64 bfloat16 each.

    Bytes. values: float8_e4m3fn `[..., H-R]`, then bfloat16, low byte first: `[..., H-R + 2·R]`.
    scales: float8_e8m0fnu `[..., ⌈(H-R)/64⌉]`, filled up to whole words, 8 bytes, where kernels
    read them. An array of 16-bit values apart would be copied by some TPUs: they tile it otherwise
    than kernels do.
    """

    values: Array
    scales: Array
    rope_dim: int = struct.field(pytree_node=False)

    @property
    def still(self) -> int:
        """Channels in FP8."""
        return self.values.shape[-1] - 2 * self.rope_dim


@struct.dataclass
class PackedKeys:
    """Index keys in FP4: codes `[..., J/2]`, bits of float8_e8m0fnu scales `[..., ⌈J/32⌉]`."""

    codes: Array
    scales: Array


Rows = Array | PackedRows | PackedKeys


def empty_rows(cfg: ModelConfig, lead: tuple[int, ...], num: Numerics) -> Rows:
    """Rows of nothing, `[*lead, H]`."""
    if not num.packed_cache:
        return _bits(jnp.zeros((*lead, cfg.head_dim), num.jnp_dtype))
    still = cfg.head_dim - cfg.rope_dim
    return PackedRows(
        values=jnp.zeros((*lead, still + 2 * cfg.rope_dim), jnp.uint8),
        scales=jnp.full((*lead, _scale_bytes(still, num)), E8M0_ONE, jnp.uint8),
        rope_dim=cfg.rope_dim,
    )


def _scale_bytes(channels: int, num: Numerics) -> int:
    """Bytes for the scales of this many FP8 channels; whole words where kernels read them."""
    scales = -(-channels // KV_BLOCK)
    return -(-scales // SCALE_BYTES) * SCALE_BYTES if num.kernels else scales


def empty_keys(cfg: ModelConfig, lead: tuple[int, ...], num: Numerics) -> Rows:
    """Index keys of nothing, `[*lead, J]`."""
    if not num.packed_cache:
        return _bits(jnp.zeros((*lead, cfg.index_dim), num.jnp_dtype))
    return PackedKeys(
        codes=jnp.zeros((*lead, cfg.index_dim // 2), jnp.uint8),
        scales=jnp.full((*lead, -(-cfg.index_dim // FP4_BLOCK)), E8M0_ONE, jnp.uint8),
    )


def _bits(x: Array) -> Array:
    """Small floats as unsigned integers of the same bits; other arrays unchanged."""
    width = x.dtype.itemsize
    return lax.bitcast_convert_type(x, f"uint{8 * width}") if width < 4 else x


def _floats(x: Array, dtype: str) -> Array:
    return lax.bitcast_convert_type(x, jnp.dtype(dtype))


def _to_bytes(x: Array) -> Array:
    """bfloat16 `[..., R]` as uint8 `[..., 2·R]`, low byte first."""
    both = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint8)
    return both.reshape(*x.shape[:-1], 2 * x.shape[-1])


def _from_bytes(x: Array) -> Array:
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.bfloat16)


def pack(like: Rows, x: Array) -> Rows:
    """Values `[..., H]` (already rounded) in the storage form of `like`. Exact."""
    if isinstance(like, PackedRows):
        still = like.still
        codes, scales = quantize_fp8(x[..., :still], KV_BLOCK)
        bits = _bits(scales.astype(jnp.float8_e8m0fnu))
        spare = like.scales.shape[-1] - bits.shape[-1]
        bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, spare)], constant_values=E8M0_ONE)
        values = jnp.concatenate([_bits(codes), _to_bytes(x[..., still:])], axis=-1)
        return PackedRows(values, bits, like.rope_dim)
    if isinstance(like, PackedKeys):
        values, scales = quantize_fp4(x)
        return PackedKeys(pack_fp4(values), _bits(scales.astype(jnp.float8_e8m0fnu)))
    return _bits(x)


def unpack(rows: Rows, dtype: jnp.dtype) -> Array:
    """Values of stored rows or keys `[..., H]`."""
    if isinstance(rows, PackedRows):
        scales = _floats(rows.scales[..., : -(-rows.still // KV_BLOCK)], "float8_e8m0fnu")
        codes = _floats(rows.values[..., : rows.still], "float8_e4m3fn")
        still = dequantize_fp8(codes, scales, KV_BLOCK).astype(dtype)
        rest = _from_bytes(rows.values[..., rows.still :]).astype(dtype)
        return jnp.concatenate([still, rest], axis=-1)
    if isinstance(rows, PackedKeys):
        values = unpack_fp4(rows.codes)
        scales = _floats(rows.scales, "float8_e8m0fnu").astype(jnp.float32)
        scales = jnp.repeat(scales, FP4_BLOCK, axis=-1)
        return (values * scales[..., : values.shape[-1]]).astype(dtype)
    return (_floats(rows, "bfloat16") if rows.dtype == jnp.uint16 else rows).astype(dtype)

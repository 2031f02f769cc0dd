"""FP8 block matmul: `y = x · Wᵀ`, the weight kept as FP8 codes and 128×128 block scales."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul import kernel, reference, tuning

IMPLEMENTATIONS = ("reference", "pallas", "interpret")
SCALE_DTYPES = (jnp.float8_e8m0fnu, jnp.float32)


def block_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    groups: int = 1,
    round_activations: bool = False,
    out_dtype: Any = jnp.bfloat16,
    native: bool | None = None,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> jax.Array:
    """`x · Wᵀ` over the last dimension of bfloat16 `x`; float32 accumulation, rounded once.

    `codes` float8_e4m3fn `[out, in]`; `scales` `[⌈out/128⌉, ⌈in/128⌉]`, float8_e8m0fnu or float32.
    No size has to be a multiple of 128.

    layer: both are stacks `[L, …]` of which this entry is meant; it is read where it lies.
    groups: W is block diagonal: its rows fall into this many equal parts, and part g multiplies
        the g-th part of `x`, whose last dimension is `groups · in`.
    round_activations: first round `x` to FP8 per token and 128 channels. Fused while all rows fit
        one tile (decode); otherwise one pass over `x` in front of the kernel.
    native: whether codes reach the matrix unit as they are and scales, which must be
        float8_e8m0fnu, multiply x: the same results while those products are normal bfloat16
        numbers. None: where the chip can and it pays (`tuning.py`).
    implementation: None is the kernel on TPU and the reference elsewhere.
    interpret_params: what `interpret` hands to `pallas_call`.

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
    """
    if layer is None and codes.ndim == 2 and scales.ndim == 2:
        codes, scales, layer = codes[None], scales[None], 0
    _check(x, codes, scales, groups, implementation)
    is_exact = scales.dtype == jnp.float8_e8m0fnu
    if native and not is_exact:
        raise ValueError(f"native products need float8_e8m0fnu scales, not {scales.dtype}")
    x_UK = x.reshape(-1, x.shape[-1])
    layer_1 = jnp.asarray(layer, jnp.int32).reshape(1)
    scales_nk = lax.dynamic_index_in_dim(scales, layer_1[0], keepdims=False)

    def plain(x_UK, codes_LNK, scales_nk, layer_1):
        codes_NK = lax.dynamic_index_in_dim(codes_LNK, layer_1[0], keepdims=False)
        return reference.block_matmul(
            x_UK, codes_NK, scales_nk, round_activations, groups, out_dtype
        )

    if native is None:
        native = is_exact and len(x_UK) <= tuning.of_this_chip().native_rows
    tiled = partial(
        _tiled,
        groups=groups,
        rounds=round_activations,
        out_dtype=out_dtype,
        native=bool(native),
    )
    args = (x_UK, codes, scales_nk, layer_1)
    if x_UK.shape[0] == 0 or implementation == "reference":
        y_UN = plain(*args)
    elif implementation == "interpret":
        y_UN = tiled(*args, interpret=interpret_params)
    elif implementation == "pallas":
        y_UN = tiled(*args)
    else:
        y_UN = lax.platform_dependent(*args, tpu=tiled, default=plain)
    return y_UN.reshape(*x.shape[:-1], codes.shape[1])


def _tiled(
    x_UK,
    codes_LNK,
    scales_nk,
    layer_1,
    *,
    groups: int,
    rounds: bool,
    out_dtype,
    native: bool,
    interpret=False,
) -> jax.Array:
    rows, (_, out_dim, in_dim) = x_UK.shape[0], codes_LNK.shape
    if rounds and (groups > 1 or rows > kernel.tile_sizes(rows, out_dim, in_dim)[0]):
        x_UGK = reference.round_activations(x_UK.reshape(rows, groups, in_dim))
        x_UK, rounds = x_UGK.reshape(x_UK.shape), False
    run = partial(kernel.block_matmul, out_dtype=out_dtype, native=native, interpret=interpret)
    per_group = out_dim // groups
    if per_group % reference.BLOCK == 0 and in_dim % reference.BLOCK == 0 or groups == 1:
        return run(x_UK, codes_LNK, scales_nk, layer_1, rounds, groups)
    parts = []  # groups inside a weight block: a whole product for each, of which a part is kept
    for g in range(groups):
        x_Uk = x_UK[:, g * in_dim : (g + 1) * in_dim]
        y_UN = run(x_Uk, codes_LNK, scales_nk, layer_1, rounds, 1)
        parts.append(y_UN[:, g * per_group : (g + 1) * per_group])
    return jnp.concatenate(parts, axis=1)


def _check(
    x: jax.Array, codes: jax.Array, scales: jax.Array, groups: int, implementation: str | None
) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {IMPLEMENTATIONS}"
        )
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"x is {x.dtype}, must be bfloat16")
    if codes.dtype != jnp.float8_e4m3fn or codes.ndim != 3:
        raise ValueError(
            f"codes are {codes.dtype}{list(codes.shape)}, must be float8_e4m3fn [out, in], or "
            "[L, out, in] with a layer"
        )
    layers, out_dim, in_dim = codes.shape
    if groups < 1 or out_dim % groups:
        raise ValueError(f"groups={groups} must divide the {out_dim} outputs of codes")
    if x.ndim < 1 or x.shape[-1] != groups * in_dim:
        raise ValueError(
            f"x{list(x.shape)} must end in the {in_dim} inputs of codes, times groups={groups}"
        )
    wanted = (layers, -(-out_dim // reference.BLOCK), -(-in_dim // reference.BLOCK))
    if scales.shape != wanted or scales.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"scales are {scales.dtype}{list(scales.shape)}, must be float8_e8m0fnu or "
            f"float32 {list(wanted)}: one per 128×128 block of codes{list(codes.shape)}"
        )

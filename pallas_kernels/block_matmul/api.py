"""FP8 block matmul: `y = x · Wᵀ`, the weight kept as FP8 codes and 128×128 block scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_matmul import kernel, reference

IMPLEMENTATIONS = ("reference", "pallas", "interpret")
SCALE_DTYPES = (jnp.float8_e8m0fnu, jnp.float32)


def block_matmul(
    x: jax.Array,
    codes_NK: jax.Array,
    scales_nk: jax.Array,
    *,
    round_activations: bool = False,
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> jax.Array:
    """`x · Wᵀ` over the last dimension of bfloat16 `x`; float32 accumulation, rounded once.

    `codes_NK` float8_e4m3fn `[out, in]`; `scales_nk` `[⌈out/128⌉, ⌈in/128⌉]`, float8_e8m0fnu or
    float32. No size has to be a multiple of 128.

    round_activations: first round `x` to FP8 per token and 128 channels. Fused while all rows fit
        one tile (decode); otherwise one pass over `x` in front of the kernel.
    implementation: None is the kernel on TPU and the reference elsewhere.
    interpret_params: what `interpret` hands to `pallas_call`.

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
    """
    _check(x, codes_NK, scales_nk, implementation)
    x_UK = x.reshape(-1, x.shape[-1])
    rows, in_dim = x_UK.shape

    def plain(x_UK, codes_NK, scales_nk):
        return reference.block_matmul(x_UK, codes_NK, scales_nk, round_activations, out_dtype)

    def tiled(x_UK, codes_NK, scales_nk, interpret=False):
        fused = round_activations
        if fused and rows > kernel.tile_sizes(rows, codes_NK.shape[0], in_dim)[0]:
            x_UK, fused = reference.round_activations(x_UK), False
        return kernel.block_matmul(x_UK, codes_NK, scales_nk, fused, out_dtype, interpret)

    args = (x_UK, codes_NK, scales_nk)
    if rows == 0 or implementation == "reference":
        y_UN = plain(*args)
    elif implementation == "interpret":
        y_UN = tiled(*args, interpret=interpret_params)
    elif implementation == "pallas":
        y_UN = tiled(*args)
    else:
        y_UN = lax.platform_dependent(*args, tpu=tiled, default=plain)
    return y_UN.reshape(*x.shape[:-1], codes_NK.shape[0])


def _check(
    x: jax.Array, codes_NK: jax.Array, scales_nk: jax.Array, implementation: str | None
) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {IMPLEMENTATIONS}"
        )
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"x is {x.dtype}, must be bfloat16")
    if codes_NK.dtype != jnp.float8_e4m3fn or codes_NK.ndim != 2:
        raise ValueError(
            f"codes are {codes_NK.dtype}{list(codes_NK.shape)}, must be float8_e4m3fn [out, in]"
        )
    if x.ndim < 1 or x.shape[-1] != codes_NK.shape[1]:
        raise ValueError(f"x{list(x.shape)} must end in the {codes_NK.shape[1]} inputs of codes")
    wanted = tuple(-(-n // reference.BLOCK) for n in codes_NK.shape)
    if scales_nk.shape != wanted or scales_nk.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"scales are {scales_nk.dtype}{list(scales_nk.shape)}, must be float8_e8m0fnu or "
            f"float32 {list(wanted)}: one per 128×128 block of codes{list(codes_NK.shape)}"
        )

"""Query heads between their projection and attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.query_heads import kernel, reference

IMPLEMENTATIONS = ("reference", "pallas", "interpret")


def query_heads(
    y_Ux: jax.Array,
    cos_Ur: jax.Array,
    sin_Ur: jax.Array,
    heads: int,
    *,
    eps: float,
    rounds: bool,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> jax.Array:
    """Heads `[U, heads, H]` of `y_Ux` `[U, heads·H]`, normed, then turned; both bfloat16.

    The norm has no weight. The last 2r channels, in pairs (2i, 2i+1), turn by the angles whose
    float32 cos and sin `[U, r]` are given. rounds: square, mean and rsqrt are rounded to bfloat16,
    as the official code does; results always are. `implementation`: None is the kernel on TPU and
    the reference elsewhere, also where the kernel does not cover the sizes: channels in 128s, of
    which up to 128 turn.

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
        NotImplementedError: `pallas` or `interpret` with sizes outside the kernel.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {IMPLEMENTATIONS}"
        )
    _check(y_Ux, cos_Ur, sin_Ur, heads)

    def plain(y_Ux, cos_Ur, sin_Ur):
        y_UNH = y_Ux.reshape(len(y_Ux), heads, y_Ux.shape[1] // heads)
        return reference.query_heads(y_UNH, cos_Ur, sin_Ur, eps, rounds)

    def tiled(y_Ux, cos_Ur, sin_Ur, interpret=False):
        turn = _lanes(cos_Ur, sin_Ur)
        return kernel.query_heads(y_Ux, *turn, heads, eps, rounds, interpret)

    args = (y_Ux, cos_Ur, sin_Ur)
    if implementation == "reference" or not len(y_Ux):
        return plain(*args)
    if refusal := _outside(y_Ux, cos_Ur, heads):
        if implementation is None:
            return plain(*args)
        raise NotImplementedError(refusal)
    if implementation == "interpret":
        return tiled(*args, interpret=interpret_params)
    if implementation == "pallas":
        return tiled(*args)
    return lax.platform_dependent(*args, tpu=tiled, default=plain)


def _lanes(cos_Ur: jax.Array, sin_Ur: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and signed sin of each of the last 128 channels; those before the pairs stay."""
    still = kernel.LANES - 2 * cos_Ur.shape[1]
    cos = jnp.repeat(cos_Ur, 2, axis=1)
    sin = jnp.stack([-sin_Ur, sin_Ur], axis=2).reshape(cos.shape)
    edges = ((0, 0), (still, 0))
    return jnp.pad(cos, edges, constant_values=1), jnp.pad(sin, edges)


def _check(y_Ux: jax.Array, cos_Ur: jax.Array, sin_Ur: jax.Array, heads: int) -> None:
    if y_Ux.ndim != 2 or y_Ux.dtype != jnp.bfloat16 or y_Ux.shape[1] % heads:
        raise ValueError(
            f"y is {y_Ux.dtype}{list(y_Ux.shape)}, must be bfloat16 [tokens, {heads} heads]"
        )
    width = y_Ux.shape[1] // heads
    for name, a in (("cos", cos_Ur), ("sin", sin_Ur)):
        if a.dtype != jnp.float32 or a.shape != (len(y_Ux), cos_Ur.shape[-1]):
            raise ValueError(f"{name} is {a.dtype}{list(a.shape)}, must be float32 [tokens, pairs]")
    if 2 * cos_Ur.shape[1] > width:
        raise ValueError(f"cos has {cos_Ur.shape[1]} pairs, a head {width} channels")


def _outside(y_Ux: jax.Array, cos_Ur: jax.Array, heads: int) -> str | None:
    """Why the kernel does not cover these sizes, or None."""
    channels = y_Ux.shape[1] // heads
    if channels % kernel.LANES:
        return f"{channels} channels, must come in {kernel.LANES}s"
    if 2 * cos_Ur.shape[1] > kernel.LANES:
        return f"{2 * cos_Ur.shape[1]} rotary channels, limit {kernel.LANES}"
    return None

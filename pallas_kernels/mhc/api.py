"""Hyper-connections: from M residual streams to a sublayer's input, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mhc import kernel, reference

IMPLEMENTATIONS = ("reference", "pallas", "interpret")


class Mixed(NamedTuple):
    """What `mix` found; tokens come last. `spread` wants post and comb."""

    x_UD: jax.Array
    post_MU: jax.Array
    comb_MMU: jax.Array  # [source stream, target stream]


def mix(
    h: jax.Array,
    fn: jax.Array,
    scale_3: jax.Array,
    base: jax.Array,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
    norm_D: jax.Array | None = None,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> Mixed:
    """Mixing numbers of a sublayer and its input Σ_m pre[m] · h[m], in the dtype of `h`.

    `h` bfloat16 `[U, M·D]`, or `[U, M, D]` (on TPU that costs a relayout: hold streams side by
    side); `fn` float32 `[(2 + M)·M, M·D]`; `scale_3`, `base` float32. With `norm_D` the input is
    also RMS-normed. `iters` counts column normalisations. `implementation`: None is the kernel on
    TPU and the reference elsewhere.

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
    """
    _check_implementation(implementation)
    m = _streams(fn)
    _check_mix(h, fn, scale_3, base, norm_D, m)
    tokens, dim = h.shape[0], fn.shape[1] // m

    def plain(h, fn, scale_3, base, norm_D):
        h_UMD = h.reshape(tokens, m, dim)
        return Mixed(*reference.mix(h_UMD, fn, scale_3, base, norm_D, iters, eps, norm_eps))

    def tiled(h, fn, scale_3, base, norm_D, interpret=False):
        x_UD, numbers = kernel.mix(
            h.reshape(tokens, -1), fn, scale_3, base, norm_D, iters, eps, norm_eps, m, interpret
        )
        return Mixed(x_UD, numbers[:m], numbers[m:].reshape(m, m, tokens))

    args = (h, fn, scale_3, base, norm_D)
    return _choose(plain, tiled, args, tokens, implementation, interpret_params)


def spread(
    a_UD: jax.Array,
    h: jax.Array,
    post_MU: jax.Array,
    comb_MMU: jax.Array,
    *,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> jax.Array:
    """New streams, shaped like `h`: target k gets post[k] · a + Σ_j comb[j, k] · h[j].

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
    """
    _check_implementation(implementation)
    m = post_MU.shape[0]
    tokens, dim = a_UD.shape
    if comb_MMU.shape != (m, m, tokens) or post_MU.shape != (m, tokens):
        raise ValueError(
            f"post{list(post_MU.shape)} and comb{list(comb_MMU.shape)} must be [M, {tokens}] and "
            f"[M, M, {tokens}]"
        )
    if h.shape not in ((tokens, m * dim), (tokens, m, dim)):
        raise ValueError(
            f"h{list(h.shape)} must be [{tokens}, {m * dim}] or [{tokens}, {m}, {dim}] for "
            f"a{list(a_UD.shape)} and {m} streams"
        )
    _check_dtypes(a=(a_UD, jnp.bfloat16), h=(h, jnp.bfloat16))
    _check_dtypes(post=(post_MU, jnp.float32), comb=(comb_MMU, jnp.float32))

    def plain(a_UD, h, post_MU, comb_MMU):
        h_UMD = h.reshape(tokens, m, dim)
        return reference.spread(a_UD, h_UMD, post_MU, comb_MMU).reshape(h.shape)

    def tiled(a_UD, h, post_MU, comb_MMU, interpret=False):
        numbers = jnp.concatenate([post_MU, comb_MMU.reshape(m * m, tokens)])
        new = kernel.spread(a_UD, h.reshape(tokens, -1), numbers, m, interpret)
        return new.reshape(h.shape)

    args = (a_UD, h, post_MU, comb_MMU)
    return _choose(plain, tiled, args, tokens, implementation, interpret_params)


def _choose(plain, tiled, args, tokens: int, implementation: str | None, interpret_params: Any):
    if tokens == 0 or implementation == "reference":
        return plain(*args)
    if implementation == "interpret":
        return tiled(*args, interpret=interpret_params)
    if implementation == "pallas":
        return tiled(*args)
    return lax.platform_dependent(*args, tpu=tiled, default=plain)


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {IMPLEMENTATIONS}"
        )


def _streams(fn: jax.Array) -> int:
    """M of the (2 + M)·M rows of `fn`."""
    m = 1
    while (2 + m) * m < fn.shape[0]:
        m += 1
    if fn.ndim != 2 or (2 + m) * m != fn.shape[0] or fn.shape[1] % m:
        raise ValueError(f"fn{list(fn.shape)} must be [(2 + M)·M, M·D]")
    return m


def _check_mix(h, fn, scale_3, base, norm_D, m: int) -> None:
    width = fn.shape[1]
    tokens = h.shape[0]
    if h.shape not in ((tokens, width), (tokens, m, width // m)):
        raise ValueError(
            f"h{list(h.shape)} must be [U, {width}] or [U, {m}, {width // m}] for "
            f"fn{list(fn.shape)}"
        )
    if scale_3.shape != (3,) or base.shape != fn.shape[:1]:
        raise ValueError(
            f"scale{list(scale_3.shape)} and base{list(base.shape)} must be [3] and "
            f"{list(fn.shape[:1])}"
        )
    if norm_D is not None and norm_D.shape != (width // m,):
        raise ValueError(f"norm{list(norm_D.shape)} must be [{width // m}]")
    _check_dtypes(h=(h, jnp.bfloat16), fn=(fn, jnp.float32), scale=(scale_3, jnp.float32))
    _check_dtypes(base=(base, jnp.float32))


def _check_dtypes(**arrays) -> None:
    for name, (array, dtype) in arrays.items():
        if array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}, must be {jnp.dtype(dtype).name}")

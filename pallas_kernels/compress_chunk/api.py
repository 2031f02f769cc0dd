"""Windows of a chunk, pooled into compressed rows."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.compress_chunk import kernel, reference

__all__ = ["pool_windows"]

Implementation = Literal["reference", "pallas", "interpret"]


def pool_windows(
    values: Array,
    scores: Array,
    first_B: Array,
    *,
    ratio: int,
    overlaps: bool,
    implementation: Implementation | None = None,
    interpret_params: Any = True,
) -> Array:
    """Rows float32 `[B, C, d]`: softmax over a row's tokens, per channel, times the values.

    values, scores: float32 `[B, C·ratio, d]`, whole windows. With `overlaps` `[B, (C + 1)·ratio,
        2d]`: row c pools the first half of the channels of window c and the second half of window
        c + 1, which is its own. XLA copies both where tokens do not come in eights.
    first_B: int32, number of row 0 in its sequence. Row number 0 has no window before its own.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: `pallas` or `interpret` with sizes outside the kernel.
    """
    plan = _check(values, scores, first_B, ratio, overlaps)
    args = (values, scores, first_B)
    plain = partial(reference.pool_windows, ratio=ratio, overlaps=overlaps)
    run = partial(kernel.pool_windows, plan)
    if implementation == "reference":
        return plain(*args)
    if implementation is None:
        try:
            kernel.check(plan)
        except NotImplementedError:
            return plain(*args)
        return lax.platform_dependent(*args, tpu=run, default=plain)
    if implementation not in ("pallas", "interpret"):
        raise ValueError(f"implementation={implementation!r} is unknown")
    kernel.check(plan)
    return run(*args, interpret=interpret_params if implementation == "interpret" else False)


def _check(values: Array, scores: Array, first_B: Array, ratio: int, overlaps: bool) -> kernel.Plan:
    least = 2 if overlaps else 1
    if values.ndim != 3 or values.shape[1] % ratio or values.shape[1] < least * ratio:
        raise ValueError(f"values{list(values.shape)} must be [B, whole windows of {ratio}, W]")
    if overlaps and values.shape[2] % 2:
        raise ValueError(f"values{list(values.shape)}: overlapping windows need an even W")
    wanted = [
        ("values", values, values.shape, jnp.float32),
        ("scores", scores, values.shape, jnp.float32),
        ("first_B", first_B, values.shape[:1], jnp.int32),
    ]
    for name, array, shape, dtype in wanted:
        if array.shape != shape or array.dtype != dtype:
            found = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{name} is {found}, must be {jnp.dtype(dtype)}{list(shape)}")
    batch, tokens, width = values.shape
    return kernel.Plan(batch, tokens // ratio, width, ratio, overlaps)

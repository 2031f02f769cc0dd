"""One decoding step of a compressor: new entries into its rings, finished windows into rows.

Rings stay in HBM and in place. A sequence whose row is not complete moves one tile of its ring, not
all of it; XLA would read every ring as soon as one sequence completes a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.compress_step import kernel, reference

__all__ = ["Step", "compress_step"]

Implementation = Literal["reference", "pallas", "interpret"]


class Step(NamedTuple):
    """rows_Bd: float32, zero where no row was completed. The rings with the new entries in."""

    rows_Bd: Array
    values: Array
    scores: Array


def compress_step(
    values: Array,
    scores: Array,
    new_values_BW: Array,
    new_scores_BW: Array,
    pos_B: Array,
    count_B: Array,
    *,
    ratio: int,
    layer: Array | int = 0,
    slots_B: Array | None = None,
    implementation: Implementation | None = None,
    interpret_params: Any = True,
) -> Step:
    """Puts the entry of position `pos_B` into each ring where `count_B` is not 0, and pools.

    values, scores: rings float32 `[L, S, R, W]`; position p lies at entry p mod R. Donate them.
        R = ratio: a row pools its window, all W channels. R = 2·ratio: it also pools the window
        before its own (if there is one), whose first W/2 channels speak for it; of its own window
        the last W/2 do.
    new_values_BW, new_scores_BW: float32; positional scores are already added.
    layer, slots_B: entry of the leading dimension, and the ring of each sequence (None: its own
        number). No two sequences share a ring.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        NotImplementedError: the kernel does not cover these sizes.
    """
    plan = _check(values, scores, new_values_BW, new_scores_BW, pos_B, count_B, slots_B, ratio)
    slots_B = jnp.arange(plan.batch, dtype=jnp.int32) if slots_B is None else slots_B
    where = (slots_B.astype(jnp.int32), pos_B, count_B, jnp.asarray(layer, jnp.int32))
    args = (values, scores, new_values_BW, new_scores_BW, *where)
    plain = partial(reference.compress_step, ratio=ratio)
    if implementation == "reference":
        return Step(*plain(*args))
    run = partial(_kernel, plan, interpret=False)
    if implementation == "interpret":
        return Step(*_kernel(plan, *args, interpret=interpret_params))
    if implementation == "pallas":
        return Step(*run(*args))
    if implementation is not None:
        raise ValueError(f"implementation={implementation!r} is unknown")
    try:
        kernel.check(plan)
    except NotImplementedError:
        return Step(*plain(*args))
    return Step(*lax.platform_dependent(*args, tpu=run, default=plain))


def _check(values, scores, new_values, new_scores, pos_B, count_B, slots_B, ratio) -> kernel.Plan:
    if values.ndim != 4 or values.shape[2] not in (ratio, 2 * ratio):
        raise ValueError(f"values{list(values.shape)} must be [L, S, {ratio} or {2 * ratio}, W]")
    if values.shape[2] > ratio and values.shape[3] % 2:
        raise ValueError(f"values{list(values.shape)}: overlapping windows need an even W")
    batch, width = len(pos_B), values.shape[3]
    wanted = [
        ("values", values, values.shape, jnp.float32),
        ("scores", scores, values.shape, jnp.float32),
        ("new_values_BW", new_values, (batch, width), jnp.float32),
        ("new_scores_BW", new_scores, (batch, width), jnp.float32),
        ("pos_B", pos_B, (batch,), jnp.int32),
        ("count_B", count_B, (batch,), jnp.int32),
    ]
    for name, array, shape, dtype in wanted:
        if array.shape != shape or array.dtype != dtype:
            found = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{name} is {found}, must be {jnp.dtype(dtype)}{list(shape)}")
    if slots_B is not None and slots_B.shape != (batch,):
        raise ValueError(f"slots_B{list(slots_B.shape)} must be [{batch}]")
    if slots_B is None and values.shape[1] < batch:
        raise ValueError(f"values{list(values.shape)} has fewer rings than {batch} sequences")
    return kernel.Plan(batch, values.shape[2], width, ratio)


def _kernel(
    plan, values, scores, new_values, new_scores, slots_B, pos_B, count_B, layer, interpret
):
    kernel.check(plan)
    more = ((0, plan.padded - plan.batch), (0, 0))
    new = (jnp.pad(new_values, more), jnp.pad(new_scores, more))
    where = (slots_B, pos_B, count_B, layer[None])
    return kernel.compress_step(plan, values, scores, *new, *where, interpret=interpret)

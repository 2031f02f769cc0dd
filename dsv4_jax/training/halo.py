"""Rows that are split along `context`: what a device needs of the tokens beside its own.

A device holds T consecutive tokens of each row. Numbers of all of a row's tokens are small and
every device gets them; of activations only a few rows travel, to the right neighbour. Without that
axis a device's part is the whole row, and nothing here costs anything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.training.batch import Batch, ahead, target_mask
from sharding.shards import Shards


def whole_rows(shards: Shards, batch: Batch) -> Batch:
    """The batch with all tokens of its rows."""
    return jax.tree.map(lambda x_BT: shards.join(x_BT, "context", 1), batch)


def own_part(shards: Shards, whole: Array, length: int, before: int = 0, fill: int = 0) -> Array:
    """This device's `length` tokens of a whole row `[B, …]`, and `before` tokens in front of them.

    fill: what is in front of the row.
    """
    if shards.count("context") == 1 and not before:
        return whole
    edges = [(0, 0), (before, 0)] + [(0, 0)] * (whole.ndim - 2)
    padded = jnp.pad(whole, edges, constant_values=fill)
    start = shards.rank("context") * length
    return lax.dynamic_slice_in_dim(padded, start, length + before, axis=1)


def from_left(shards: Shards, x: Array, rows: int) -> Array:
    """The last `rows` tokens of the left neighbour's `[B, T, …]`; zeros at the row's start."""
    parts = shards.count("context")
    if parts == 1 or not rows:
        return jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype)
    (axis,) = shards.axes("context")
    return lax.ppermute(x[:, x.shape[1] - rows :], axis, [(i, i + 1) for i in range(parts - 1)])


def targets(shards: Shards, batch: Batch, steps: int) -> tuple[Array, Array]:
    """Token t + steps of every own token t, and whether it is to be learnt: `[B, T]`."""
    whole, length = whole_rows(shards, batch), batch.tokens_BT.shape[1]
    found = (ahead(whole.tokens_BT, steps), target_mask(whole, steps))
    tokens_BT, learnt_BT = (own_part(shards, x_BT, length) for x_BT in found)
    return tokens_BT, learnt_BT


def next_ones(shards: Shards, x_BT: Array) -> Array:
    """`x` of token t + 1 at every own token t; zeros behind the row's end."""
    whole_BT = shards.join(x_BT, "context", 1)
    return own_part(shards, ahead(whole_BT, 1), x_BT.shape[1])


def rows_before(shards: Shards, ratio: int) -> int:
    """Tokens in front of its own that a device needs for compressed rows that end in its part."""
    if shards.count("context") == 1:
        return 0
    return 2 * ratio - 1 if ratio == CSA else ratio - 1


def check_length(cfg: ModelConfig, shards: Shards, length: int) -> None:
    """Whether rows of `length` tokens can be split along `context`.

    Raises:
        ValueError: they do not divide, or a part is shorter than what is needed of it.
    """
    parts = shards.count("context")
    if parts == 1:
        return
    if length % parts:
        raise ValueError(f"rows of {length} tokens do not divide among context={parts} devices")
    ratios = [ratio for ratio in cfg.compress_ratios if ratio]
    least = max([cfg.window - 1, *(rows_before(shards, ratio) for ratio in ratios)])
    if length // parts < least:
        raise ValueError(
            f"rows of {length} tokens among context={parts} devices: each part needs at least "
            f"{least} tokens, as many as a layer looks back"
        )


def document_sums(x_BTn: Array, segment_BT: Array, shards: Shards) -> Array:
    """For every token Σ x over its document, wherever in the row that lies; `[B, T, n]` as x.

    A part has at most two documents in common with others, its first and its last one: their sums
    are all that is exchanged. Sums of integers have no order; those of floats have.
    """
    rows, length = segment_BT.shape
    starts_BT = jnp.pad(segment_BT[:, 1:] != segment_BT[:, :-1], ((0, 0), (1, 0)))
    number_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    document_U = (jnp.arange(rows, dtype=jnp.int32)[:, None] * length + number_BT).reshape(-1)
    sums = jax.ops.segment_sum(x_BTn.reshape(rows * length, -1), document_U, rows * length, True)
    sums_BTn = sums[document_U].reshape(x_BTn.shape)
    if shards.count("context") == 1:
        return sums_BTn
    ends = jnp.array([0, length - 1])
    segment_B2, sums_B2n = segment_BT[:, ends], sums_BTn[:, ends]
    is_one_B = segment_B2[:, 0] == segment_B2[:, 1]  # a document from end to end counts once
    sent_B2n = sums_B2n.at[:, 1].multiply(~is_one_B[:, None])
    segment_BK, sent_BKn = (shards.join(a, "context", 1) for a in (segment_B2, sent_B2n))
    is_other_K = jnp.arange(segment_BK.shape[1]) // 2 != shards.rank("context")
    same_B2K = (segment_B2[:, :, None] == segment_BK[:, None]) & is_other_K[None, None]
    found_B2n = jnp.where(same_B2K[..., None], sent_BKn[:, None], 0).sum(axis=2)
    for end in (0, 1):
        of_end_BT = (segment_BT == segment_B2[:, end, None]) & ~((end == 1) & is_one_B)[:, None]
        sums_BTn = sums_BTn + jnp.where(of_end_BT[..., None], found_B2n[:, end, None], 0)
    return sums_BTn

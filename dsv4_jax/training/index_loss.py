"""What indexers learn from: the attention that their layer pays to compressed rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax import indexer


class IndexTerms(NamedTuple):
    """Sums over queries that see at least one compressed row; float32 scalars.

    kl: of the layer's attention against the indexer's softmax; uniform: against equal shares.
    queries: how many there are. hits, wanted: how many of the rows with most attention the
    indexer ranks among its best as well, of queries that see more rows than are kept.
    """

    kl: Array
    uniform: Array
    queries: Array
    hits: Array
    wanted: Array


def no_terms() -> IndexTerms:
    return IndexTerms(*(jnp.zeros((), jnp.float32) for _ in IndexTerms._fields))


def index_terms(
    scores_BTC: Array, mass_BTC: Array, seen_BTC: Array, real_BT: Array, keep: int
) -> IndexTerms:
    """KL(p‖q) summed over queries: p the attention mass over the rows seen, summed over heads and
    normalised (its denominator had window and sink), q the softmax of the indexer's scores.

    mass_BTC is a constant. The rows seen are all visible ones, or those that were selected.
    """
    count_BT = seen_BTC.sum(axis=-1)
    counted_BT = real_BT & (count_BT > 0)
    mass_BTC = jnp.where(seen_BTC, mass_BTC, 0.0)
    total_BT1 = mass_BTC.sum(axis=-1, keepdims=True)
    p_BTC = lax.stop_gradient(mass_BTC / jnp.where(total_BT1 > 0, total_BT1, 1.0))
    log_q_BTC = jax.nn.log_softmax(jnp.where(seen_BTC, scores_BTC, -1e30), axis=-1)
    log_p_BTC = jnp.log(jnp.where(p_BTC > 0, p_BTC, 1.0))
    kl_BT = (p_BTC * (log_p_BTC - jnp.where(seen_BTC, log_q_BTC, 0.0))).sum(axis=-1)
    entropy_BT = -(p_BTC * log_p_BTC).sum(axis=-1)
    uniform_BT = jnp.log(jnp.maximum(count_BT, 1).astype(jnp.float32)) - entropy_BT
    hits, wanted = _recall(scores_BTC, p_BTC, seen_BTC, counted_BT & (count_BT > keep), keep)
    return IndexTerms(
        jnp.where(counted_BT, kl_BT, 0.0).sum(),
        lax.stop_gradient(jnp.where(counted_BT, uniform_BT, 0.0).sum()),
        counted_BT.sum().astype(jnp.float32),
        hits,
        wanted,
    )


def _recall(
    scores_BTC: Array, p_BTC: Array, seen_BTC: Array, many_BT: Array, keep: int
) -> tuple[Array, Array]:
    """Rows that both the teacher and the indexer keep, and rows kept; of queries with a choice."""
    if seen_BTC.shape[-1] <= keep:
        return jnp.zeros(()), jnp.zeros(())
    ours, theirs = (
        indexer.selection_mask(lax.stop_gradient(jnp.where(seen_BTC, x, -jnp.inf)), keep)
        for x in (scores_BTC, p_BTC)
    )
    hits = (ours & theirs & many_BT[..., None]).sum().astype(jnp.float32)
    return hits, (many_BT.sum() * keep).astype(jnp.float32)

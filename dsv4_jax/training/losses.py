"""The objective of one step. Sums over a microbatch, divided by counts of the whole batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv4_jax.config import CSA
from dsv4_jax.training.batch import Batch, target_mask
from dsv4_jax.training.cross_entropy import cross_entropy
from dsv4_jax.training.forward import Hidden, LayerTerms, forward
from dsv4_jax.training.halo import targets
from dsv4_jax.training.index_loss import IndexTerms
from dsv4_jax.training.joined import join_top
from dsv4_jax.training.program import Program


class Counts(NamedTuple):
    """What sums are divided by, over the whole batch of a step; float32 scalars.

    targets, mtp_targets: tokens with a next (second next) one to learn. tokens: not padding.
    queries: tokens that see at least one compressed row of a CSA layer.
    """

    targets: Array
    mtp_targets: Array
    tokens: Array
    queries: Array


class Weights(NamedTuple):
    """Weights of the losses beside cross-entropy: λ, α and μ; scalars."""

    mtp: Array | float
    balance: Array | float
    indexer: Array | float


class Metrics(NamedTuple):
    """Losses of the whole batch, summed over microbatches: float32 scalars.

    loss: the next-token loss in nats; mtp, balance (mean of layers), indexer (mean of layers, KL).
    index_uniform: KL of equal shares in its place. hits, wanted: see `IndexTerms`.
    """

    loss: Array
    mtp: Array
    balance: Array
    indexer: Array
    index_uniform: Array
    hits: Array
    wanted: Array


class Aux(NamedTuple):
    """Metrics, int32 expert loads per router bias, and the experts chosen (for `routes`)."""

    metrics: Metrics
    loads: Any
    routes: Any


def count(batch: Batch) -> Counts:
    """Counts of a batch or microbatch; add them up over all."""
    sees_BT = (batch.segment_BT > 0) & (batch.position_BT >= CSA - 1)
    found = (target_mask(batch, 1), target_mask(batch, 2), batch.segment_BT > 0, sees_BT)
    return Counts(*(a.sum().astype(jnp.float32) for a in found))


def objective(
    program: Program,
    weights: Weights,
    counts: Counts,
    params: Any,
    batch: Batch,
    routes: Any = None,
) -> tuple[Array, Aux]:
    """The scalar to differentiate with respect to `params`, for one microbatch."""
    params = join_top(program, params)
    hidden = forward(program, params, batch, routes)
    terms = [t for group in hidden.terms for t in group]
    if hidden.mtp_terms is not None:
        terms = [*terms, hidden.mtp_terms]
    index = _index_sum(terms)
    num_index = max(sum(ratio == CSA for ratio in program.cfg.compress_ratios), 1)
    queries = jnp.maximum(counts.queries, 1.0)
    zero = jnp.zeros((), jnp.float32)
    main = mtp = balance = total = zero
    if not program.index_only:
        main, mtp = _token_losses(program, counts, params, batch, hidden)
        balance = sum((t.router.balance.sum() for t in terms), zero)
        balance = balance / jnp.maximum(counts.tokens, 1.0)
        total = main + weights.mtp * mtp + weights.balance * balance
    if program.index_loss:
        total = total + weights.indexer * index.kl / queries
    num_balanced = program.cfg.total_layers - program.cfg.num_hash_layers
    per_layer = queries * num_index
    metrics = Metrics(
        main,
        mtp,
        balance / max(num_balanced, 1),
        index.kl / per_layer,
        index.uniform / per_layer,
        index.hits,
        index.wanted,
    )
    loads = {
        "groups": [[t.router.count_E for t in group] for group in hidden.terms],
        "mtp": [hidden.mtp_terms.router.count_E] if hidden.mtp_terms is not None else [],
    }
    chosen = [[t.router.experts_BTA for t in group] for group in hidden.terms]
    return total, Aux(jax.lax.stop_gradient(metrics), loads, chosen)


def _token_losses(
    program: Program, counts: Counts, params: Any, batch: Batch, hidden: Hidden
) -> tuple[Array, Array]:
    head_VD = params["top"]["head"]

    def loss(y_BTD: Array, steps: int, total: Array) -> Array:
        target_BT, learnt_BT = targets(program.shards, batch, steps)
        weight_U = learnt_BT.reshape(-1) / jnp.maximum(total, 1.0)
        y_UD = y_BTD.reshape(-1, y_BTD.shape[-1])
        return cross_entropy(y_UD, head_VD, target_BT.reshape(-1), weight_U)

    main = loss(hidden.y_BTD, 1, counts.targets)
    if hidden.mtp_BTD is None:
        return main, jnp.zeros((), jnp.float32)
    return main, loss(hidden.mtp_BTD, 2, counts.mtp_targets)


def _index_sum(terms: list[LayerTerms]) -> IndexTerms:
    return IndexTerms(
        *(
            sum((getattr(t.indexer, name).sum() for t in terms), jnp.zeros((), jnp.float32))
            for name in IndexTerms._fields
        )
    )

"""The objective of one step. Sums over a microbatch, divided by counts of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
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
from dsv4_jax.training.policy import PolicyTerms, count_sequences, policy_loss
from dsv4_jax.training.program import Program


class Counts(NamedTuple):
    """What sums are divided by, over the whole batch of a step; float32 scalars.

    targets, mtp_targets: tokens with a next (second next) one to learn. tokens: not padding.
    queries: tokens that see at least one compressed row of a CSA layer. sequences: documents with
    a target.
    """

    targets: Array
    mtp_targets: Array
    tokens: Array
    queries: Array
    sequences: Array


class Weights(NamedTuple):
    """Weights of the losses beside cross-entropy: λ, α and μ; scalars."""

    mtp: Array | float
    balance: Array | float
    indexer: Array | float


class Metrics(NamedTuple):
    """Losses of the whole batch, summed over microbatches: float32 scalars.

    loss: of the next token in nats, or the objective of post-training; 0 where it is not computed.
    mtp (mean of drafts), balance (mean of layers), indexer (mean of layers, KL).
    index_uniform: KL of equal shares in its place. hits, wanted: see `IndexTerms`.
    kl, clipped, masked: of GRPO, see `PolicyTerms`; else 0.
    """

    loss: Array
    mtp: Array
    balance: Array
    indexer: Array
    index_uniform: Array
    hits: Array
    wanted: Array
    kl: Array
    clipped: Array
    masked: Array


class Aux(NamedTuple):
    """Metrics, int32 expert loads per router bias, and the experts chosen (for `routes`)."""

    metrics: Metrics
    loads: Any
    routes: Any


def count(batch: Batch, by_sequence: bool = False) -> Counts:
    """Counts of a batch or microbatch; add them up over all. `sequences` only if asked for."""
    sees_BT = (batch.segment_BT > 0) & (batch.position_BT >= CSA - 1)
    target_BT = target_mask(batch, 1)
    found = (target_BT, target_mask(batch, 2), batch.segment_BT > 0, sees_BT)
    sums = [a.sum().astype(jnp.float32) for a in found]
    sequences = count_sequences(batch, target_BT) if by_sequence else jnp.zeros((), jnp.float32)
    return Counts(*sums, sequences=sequences)


def objective(
    program: Program,
    weights: Weights,
    counts: Counts,
    params: Any,
    batch: Batch,
    routes: Any = None,
    others: Sequence[Any] = (),
) -> tuple[Array, Aux]:
    """The scalar to differentiate with respect to `params`, for one microbatch.

    others: parameters of the models beside the student, see `policy_loss`.
    """
    params = join_top(program, params)
    hidden = forward(program, params, batch._replace(rollout=None), routes)
    terms = [t for group in hidden.terms for t in group]
    balanced = hidden.mtp_terms if program.mtp_only else [*terms, *hidden.mtp_terms]
    index = _index_sum(terms)
    num_index = max(sum(ratio == CSA for ratio in program.cfg.compress_ratios), 1)
    queries = jnp.maximum(counts.queries, 1.0)
    zero = jnp.zeros((), jnp.float32)
    mtp = balance = total = zero
    policy = PolicyTerms(zero, zero, zero, zero)
    if not program.index_only:
        policy, mtp = _token_losses(program, counts, params, batch, hidden, others)
        balance = sum((t.router.balance.sum() for t in balanced), zero)
        balance = balance / jnp.maximum(counts.tokens, 1.0)
        total = policy.loss + weights.mtp * mtp + weights.balance * balance
    if program.index_loss:
        total = total + weights.indexer * index.kl / queries
    num_balanced = program.cfg.total_layers - program.cfg.num_hash_layers
    per_layer = queries * num_index
    metrics = Metrics(
        policy.loss,
        mtp,
        balance / max(num_balanced, 1),
        index.kl / per_layer,
        index.uniform / per_layer,
        index.hits,
        index.wanted,
        *policy[1:],
    )
    loads = {
        "groups": [[t.router.count_E for t in group] for group in hidden.terms],
        "mtp": [sum(t.router.count_E for t in hidden.mtp_terms)] if hidden.mtp_terms else [],
    }
    chosen = [[t.router.experts_BTA for t in group] for group in hidden.terms]
    return total, Aux(jax.lax.stop_gradient(metrics), loads, chosen)


def _token_losses(
    program: Program,
    counts: Counts,
    params: Any,
    batch: Batch,
    hidden: Hidden,
    others: Sequence[Any],
) -> tuple[PolicyTerms, Array]:
    """What is learnt from text, and the MTP block's cross-entropy: the mean of its drafts'."""
    head_VD, zero = params["top"]["head"], jnp.zeros((), jnp.float32)

    def loss(y_BTD: Array, head_VD: Array, steps: int, total: Array, behind: int = 0) -> Array:
        """Mean over `total` targets; of a document's first `behind` tokens nothing is learnt."""
        target_BT, learnt_BT = targets(program.shards, batch, steps)
        learnt_BT = learnt_BT & (batch.position_BT >= behind)
        weight_U = learnt_BT.reshape(-1) / jnp.maximum(total, 1.0)
        y_UD = y_BTD.reshape(-1, y_BTD.shape[-1])
        return cross_entropy(y_UD, head_VD, target_BT.reshape(-1), weight_U)

    policy = PolicyTerms(zero, zero, zero, zero)
    if program.mtp_only:
        head_VD = jax.lax.stop_gradient(head_VD)
    elif program.objective is None:
        policy = policy._replace(loss=loss(hidden.y_BTD, head_VD, 1, counts.targets))
    else:
        rows = (counts.sequences, head_VD, batch, hidden.y_BTD)
        policy = policy_loss(program, *rows, others)
        head_VD = jax.lax.stop_gradient(head_VD)
    found = [
        loss(y_BTD, head_VD, 2, counts.mtp_targets, behind)
        for behind, y_BTD in enumerate(hidden.drafts)
    ]
    return policy, sum(found, zero) / max(len(found), 1)


def _index_sum(terms: list[LayerTerms]) -> IndexTerms:
    return IndexTerms(
        *(
            sum((getattr(t.indexer, name).sum() for t in terms), jnp.zeros((), jnp.float32))
            for name in IndexTerms._fields
        )
    )

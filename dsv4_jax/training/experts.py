"""Mixture of experts of a training step: routing with all its losses' ingredients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dsv4_jax.config import ModelConfig
from dsv4_jax.exchange import Tokens, exchange
from dsv4_jax.moe import swiglu
from dsv4_jax.numerics import linear_f32
from dsv4_jax.training.batch import Batch
from dsv4_jax.training.grouped import Plan, from_slots, grouped_linear, plan_rows, to_slots
from dsv4_jax.training.halo import document_sums
from dsv4_jax.training.precision import Precision, dense, round_activations
from dsv4_jax.training.program import Program
from sharding.shards import SINGLE, Shards

TINY = 1.1754944e-38  # the square root has no usable slope below


class RouterTerms(NamedTuple):
    """count_E: rows sent to every expert, int32, padding excluded. balance: the balance loss
    summed over documents, each weighted by its number of tokens (0 in hash layers).
    experts_BTA: the choice itself, int32, ascending per token."""

    count_E: Array
    balance: Array
    experts_BTA: Array


def moe(
    w: dict[str, Any],
    x_BTD: Array,
    batch: Batch,
    program: Program,
    given_BTA: Array | None = None,
) -> tuple[Array, RouterTerms]:
    """Routed and shared experts of one layer.

    given_BTA: expert indices to use instead of this layer's choice (anticipatory routing); their
    weights still come from this layer's scores. Hash layers ignore it: their choice is fixed.
    """
    cfg, num = program.cfg, program.num
    x_UD, real_U = x_BTD.reshape(-1, cfg.dim), (batch.segment_BT > 0).reshape(-1)
    scores_UE = router_scores(x_UD, w["gate"]["weight"])
    given_UA = None if given_BTA is None else given_BTA.reshape(-1, given_BTA.shape[-1])
    experts_UA = choose(w["gate"], scores_UE, batch.tokens_BT.reshape(-1), cfg, given_UA)
    weights_UA = _picked(scores_UE, experts_UA)
    weights_UA = weights_UA / (weights_UA.sum(axis=-1, keepdims=True) + 1e-20) * cfg.routed_scale
    routed_UD = _routed(w["experts"], Tokens(x_UD, experts_UA, weights_UA, real_U), program)
    hidden_UF = swiglu(
        dense(x_UD, w["shared"]["w1"], program.precision),
        dense(x_UD, w["shared"]["w3"], program.precision),
        cfg,
    )
    shared_UD = dense(num.cast(hidden_UF), w["shared"]["w2"], program.precision)
    out_UD = num.cast(routed_UD + shared_UD.astype(jnp.float32))
    balance = jnp.zeros((), jnp.float32)
    if "bias" in w["gate"]:
        balance = balance_loss(scores_UE, batch, cfg, program.shards)
    experts_BTA = experts_UA.reshape(*batch.tokens_BT.shape, -1)
    terms = RouterTerms(_counts(experts_UA, real_U, cfg.num_experts), balance, experts_BTA)
    return out_UD.reshape(x_BTD.shape), terms


def router_scores(x_UD: Array, weight_ED: Array) -> Array:
    """sqrt(softplus(x · e)), float32; the floor keeps the gradient finite far below zero."""
    return jnp.sqrt(jnp.maximum(jax.nn.softplus(linear_f32(x_UD, weight_ED)), TINY))


def _picked(scores_UE: Array, experts_UA: Array) -> Array:
    """Scores of the chosen; one term of each sum counts. Backwards no scatter, as of an index."""
    number_11E = jnp.arange(scores_UE.shape[1], dtype=jnp.int32)[None, None]
    is_it_UAE = experts_UA[:, :, None] == number_11E
    return jnp.where(is_it_UAE, scores_UE[:, None], 0).sum(axis=-1)


def choose(
    gate: dict[str, Array],
    scores_UE: Array,
    tokens_U: Array,
    cfg: ModelConfig,
    given_UA: Array | None,
) -> Array:
    """Experts of each token, ascending: by token id, given, or the best of score and bias."""
    if "tid2eid" in gate:
        experts_UA = gate["tid2eid"][tokens_U]
    elif given_UA is not None:
        experts_UA = given_UA.astype(jnp.int32)
    else:
        biased_UE = lax.stop_gradient(scores_UE) + lax.stop_gradient(gate["bias"])[None]
        experts_UA = lax.top_k(biased_UE, cfg.experts_per_token)[1]
    return checkpoint_name(jnp.sort(experts_UA, axis=-1), "decision")


def _counts(experts_UA: Array, real_U: Array, num_experts: int) -> Array:
    """Rows that real tokens send to every expert, int32 `[E]`."""
    owner_Y = jnp.where(real_U[:, None], experts_UA, num_experts).reshape(-1)
    return (owner_Y[:, None] == jnp.arange(num_experts)[None]).sum(axis=0, dtype=jnp.int32)


def _routed(w: dict[str, Array], tokens: Tokens, program: Program) -> Array:
    """Σ over each token's experts, wherever they live: float32 `[U, D]`."""
    local_experts = w["w1"].shape[0]

    def run(x_UD: Array, experts_UA: Array, weights_UA: Array, real_U: Array) -> Array:
        plan = plan_rows(experts_UA, real_U, local_experts)
        return _local_sum(w, x_UD, weights_UA, plan, program.cfg, program.precision)

    out_UD = exchange(tokens, local_experts, run, program.num, program.shards)
    if program.shards.mesh is None:
        return out_UD
    return checkpoint_name(out_UD, "routed")  # kept: tokens do not travel once more for it


def _local_sum(
    w: dict[str, Array],
    x_UD: Array,
    weights_UA: Array,
    plan: Plan,
    cfg: ModelConfig,
    precision: Precision,
) -> Array:
    """Σ over those of each token's experts that are here, in index order, float32 `[U, D]`."""
    num = precision.num
    tokens, per_token = weights_UA.shape
    repeated = jnp.broadcast_to(x_UD[:, None], (tokens, per_token, cfg.dim))
    x_SD = to_slots(repeated.reshape(-1, cfg.dim), plan)
    weight_S1 = to_slots(weights_UA.reshape(-1, 1), plan)
    x_SD = round_activations(x_SD, precision)
    gate_SF = grouped_linear(x_SD, w["w1"], plan)
    hidden_SF = swiglu(gate_SF, grouped_linear(x_SD, w["w3"], plan), cfg) * weight_S1
    out_SD = grouped_linear(round_activations(num.cast(hidden_SF), precision), w["w2"], plan)
    return from_slots(out_SD, plan).reshape(tokens, per_token, -1).astype(jnp.float32).sum(axis=1)


def balance_loss(
    scores_UE: Array, batch: Batch, cfg: ModelConfig, shards: Shards = SINGLE
) -> Array:
    """Σ over documents of tokens · Σ_i f_i · P_i; divided by all tokens, 1 where balanced.

    f counts the best-scored experts (without bias) and is a constant; P is the mean share of the
    scores. Both are taken over a document's tokens in its row.
    """
    best_UA = lax.top_k(lax.stop_gradient(scores_UE), cfg.experts_per_token)[1]
    chosen_UE = jax.nn.one_hot(best_UA, cfg.num_experts, dtype=jnp.int32).sum(axis=1)
    chosen_UE = jnp.concatenate([chosen_UE, jnp.ones_like(chosen_UE[:, :1])], axis=1)
    sums = document_sums(chosen_UE.reshape(*batch.tokens_BT.shape, -1), batch.segment_BT, shards)
    sums = sums.reshape(chosen_UE.shape)
    f_UE = sums[:, :-1] / sums[:, -1:] * (cfg.num_experts / cfg.experts_per_token)
    share_UE = scores_UE / scores_UE.sum(axis=-1, keepdims=True)
    real_U1 = (batch.segment_BT > 0).reshape(-1, 1)
    return (lax.stop_gradient(f_UE) * share_UE * real_U1).sum()

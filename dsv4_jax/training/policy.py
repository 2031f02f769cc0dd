"""Post-training objectives of one microbatch: GRPO, and distillation from other models.

Both are means over sequences (documents with something drawn) of the mean over each one's tokens.
Other models run beside the student, for their last hidden states; they see the same rows, rounded
as the student is, and nothing of them learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.training.batch import Batch
from dsv4_jax.training.cross_entropy import log_probs, token_losses
from dsv4_jax.training.distill import Distill, reverse_kl, sampled_kl
from dsv4_jax.training.forward import forward
from dsv4_jax.training.grpo import Drawn, Grpo, sequence_mean, token_terms
from dsv4_jax.training.halo import document_sums, next_ones, targets
from dsv4_jax.training.joined import join_top
from dsv4_jax.training.program import Program
from sharding.shards import SINGLE


class PolicyTerms(NamedTuple):
    """Float32 scalars: shares of the batch's mean over sequences.

    loss: what is differentiated. kl: to the reference. clipped: tokens whose ratio left the range.
    masked: sequences that were left out.
    """

    loss: Array
    kl: Array
    clipped: Array
    masked: Array


def policy_loss(
    program: Program,
    sequences: Array,
    head_VD: Array,
    batch: Batch,
    y_BTD: Array,
    others: Sequence[Any] = (),
) -> PolicyTerms:
    """The objective of `program` from the student's last hidden states.

    sequences: how many the whole batch of the step has. others: parameters like the student's: of
    the reference (GRPO with a KL term) or of the teachers, in their order.
    """
    if isinstance(program.objective, Distill):
        loss = _distillation(program, program.objective, sequences, head_VD, batch, y_BTD, others)
        zero = jnp.zeros((), jnp.float32)
        return PolicyTerms(loss, zero, zero, zero)
    assert isinstance(program.objective, Grpo)
    return _grpo(program, program.objective, sequences, head_VD, batch, y_BTD, others)


def count_sequences(batch: Batch, is_learnt_BT: Array) -> Array:
    """Documents with something learnt, a float32 scalar; of whole rows."""
    learnt_BT = is_learnt_BT.astype(jnp.int32)
    sizes_BT1 = document_sums(learnt_BT[..., None], batch.segment_BT, SINGLE)
    return jnp.round((learnt_BT / jnp.maximum(sizes_BT1[..., 0], 1)).sum())


def _grpo(
    program: Program,
    config: Grpo,
    sequences: Array,
    head_VD: Array,
    batch: Batch,
    y_BTD: Array,
    others: Sequence[Any],
) -> PolicyTerms:
    shards, rollout = program.shards, batch.rollout
    assert rollout is not None
    target_BT, learnt_BT = targets(shards, batch, 1)
    shape, target_U = target_BT.shape, target_BT.reshape(-1)
    log_p_BT = log_probs(_flat(y_BTD), head_VD, target_U).reshape(shape)
    reference_BT = None
    if config.kl:
        (other,) = others
        z_BTD, other_VD = _states(program, other, batch)
        other_VD = other_VD.astype(z_BTD.dtype)
        reference_BT = -token_losses(_flat(z_BTD), other_VD, target_U).reshape(shape)
    drawn = Drawn(learnt_BT, next_ones(shards, rollout.old_BT), reference_BT, rollout.advantage_BT)
    terms = token_terms(
        config, log_p_BT, drawn, lambda x_BTn: document_sums(x_BTn, batch.segment_BT, shards)
    )
    values = (terms.loss, terms.kl, terms.clipped, terms.masked)
    return PolicyTerms(*(sequence_mean(terms, x_BT, sequences) for x_BT in values))


def _distillation(
    program: Program,
    config: Distill,
    sequences: Array,
    head_VD: Array,
    batch: Batch,
    y_BTD: Array,
    others: Sequence[Any],
) -> Array:
    shards = program.shards
    target_BT, learnt_BT = targets(shards, batch, 1)
    target_U, learnt_BT = target_BT.reshape(-1), learnt_BT.astype(jnp.int32)
    sizes_BT1 = document_sums(learnt_BT[..., None], batch.segment_BT, shards)
    share_BT = learnt_BT / jnp.maximum(sizes_BT1[..., 0], 1) / jnp.maximum(sequences, 1.0)
    y_UD, total = _flat(y_BTD), jnp.zeros((), jnp.float32)
    log_p_U = log_probs(y_UD, head_VD, target_U) if config.single_sample else None
    for number, (teacher, other) in enumerate(zip(config.teachers, others, strict=True)):
        weight_BT = teacher.weight * share_BT
        if batch.rollout is not None:
            is_for_BT = (batch.rollout.teacher_BT == number) | (batch.rollout.teacher_BT < 0)
            weight_BT = jnp.where(is_for_BT, weight_BT, 0.0)
        weight_U = weight_BT.reshape(-1)
        z_BTD, other_VD = _states(program, other, batch)
        z_UD = _flat(z_BTD)
        if log_p_U is None:
            total = total + reverse_kl(y_UD, head_VD, z_UD, other_VD, weight_U)
        else:
            log_q_U = -token_losses(z_UD, other_VD.astype(z_UD.dtype), target_U)
            total = total + sampled_kl(log_p_U, log_q_U, weight_U)
    return total


def _states(program: Program, params: Any, batch: Batch) -> tuple[Array, Array]:
    """Last hidden states `[B, T, D]` of a model that does not learn, and its head."""
    alone = dataclasses.replace(program, index_loss=False, mtp=False, objective=None)
    params = join_top(alone, lax.stop_gradient(params))
    found = forward(alone, params, batch._replace(rollout=None)).y_BTD
    return lax.stop_gradient(found), params["top"]["head"]


def _flat(y_BTD: Array) -> Array:
    return y_BTD.reshape(-1, y_BTD.shape[-1])

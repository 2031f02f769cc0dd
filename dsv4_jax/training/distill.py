"""Reverse KL between two models over a whole vocabulary, a tile of it at a time.

Two passes over the tiles: the first has both normalisers and the KL of every token, the second
the gradient p · (log p − log q − KL). Logits of both models exist for a slice of tokens and a tile
of the vocabulary only, rebuilt from last hidden states. Slices without a weight are skipped.

Letters of this module beside the common ones: I tokens of a slice, v ids of a tile, d the
teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.training.cross_entropy import (
    LOGIT_BUDGET,
    SLICES,
    SMALLEST,
    dot,
    learnt_first,
    slices,
)

LEAST_TILE = 128  # ids of a tile, however many tokens a slice has


@dataclass(frozen=True)
class Teacher:
    """path: a run or converted checkpoint of the same model. weight: w of the sum over teachers."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Distill:
    """Learns, on text that the student wrote, to predict as its teachers do.

    teachers: run beside the student; a rollout that names a teacher has that one alone, other text
    has all. single_sample: the cheap mode: instead of the KL over the vocabulary its estimate from
    the token that was drawn, whose gradient is right on average but varies much more.

    Raises:
        ValueError: there is no teacher, or a weight is not positive.
    """

    teachers: tuple[Teacher, ...]
    single_sample: bool = False

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError("objective.teachers is empty: distillation needs at least one")
        for teacher in self.teachers:
            if not teacher.weight > 0:
                raise ValueError(f"teacher {teacher.path}: weight={teacher.weight} must be > 0")


class _Sums(NamedTuple):
    """Of one slice of tokens, so far; float32 `[I]`.

    top, norm: largest logit, and Σ exp(logit − top); of the student and of the teacher.
    gap: Σ exp(student's logit − top) · (student's − teacher's logit).
    """

    top: Array
    norm: Array
    other_top: Array
    other_norm: Array
    gap: Array


class _Found(NamedTuple):
    """Both log-normalisers and KL(student ‖ teacher) of every token; float32 `[I]`."""

    lse: Array
    other_lse: Array
    kl: Array


@jax.custom_vjp
def reverse_kl(
    y_UD: Array, head_VD: Array, other_Ud: Array, other_head_Vd: Array, weight_U: Array
) -> Array:
    """Σ weight · KL(student ‖ teacher), float32 scalar; differentiable by y and head.

    y_UD, other_Ud: last hidden states of student and teacher, in their activation dtypes.
    head_VD, other_head_Vd: float32, cast to these. weight_U: float32, constant. Logits and sums
    are float32. The widths D and d may differ, the vocabulary must not.

    Raises:
        ValueError: the vocabularies differ.
    """
    return _reverse_kl(y_UD, head_VD, other_Ud, other_head_Vd, weight_U, learns=False)[0]


def token_kl(y_UD: Array, head_VD: Array, other_Ud: Array, other_head_Vd: Array) -> Array:
    """KL(student ‖ teacher) of every token, float32 `[U]`; not meant to be differentiated."""
    heads = _heads(y_UD, head_VD, other_Ud, other_head_Vd)
    sliced = _sliced(y_UD, other_Ud)
    found = lax.map(lambda chunk: _first_pass(chunk[0], chunk[1], *heads).kl, sliced)
    return found.reshape(-1)[: len(y_UD)]


def _heads(
    y_UD: Array, head_VD: Array, other_Ud: Array, other_head_Vd: Array
) -> tuple[Array, Array]:
    if len(head_VD) != len(other_head_Vd):
        raise ValueError(
            f"a teacher with a vocabulary of {len(other_head_Vd)} cannot teach a student with one "
            f"of {len(head_VD)}: both must have the same ids"
        )
    return head_VD.astype(y_UD.dtype), other_head_Vd.astype(other_Ud.dtype)


def _sliced(*arrays: Array) -> tuple[Array, ...]:
    return slices(min(SLICES, -(-len(arrays[0]) // SMALLEST)), *arrays)


def _tiles(tokens: int, vocab: int) -> tuple[int, int]:
    """How many tiles of how many ids."""
    size = min(vocab, max(LEAST_TILE, LOGIT_BUDGET // tokens))
    return -(-vocab // size), size


def _tile(number: Array, size: int, *heads: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    """Where a tile starts, which of its ids are new, and its rows of the heads.

    The last tile is moved back so as not to reach beyond the vocabulary.
    """
    start = jnp.minimum(number * size, len(heads[0]) - size)
    is_new_v = start + jnp.arange(size, dtype=jnp.int32) >= number * size
    return start, is_new_v, tuple(lax.dynamic_slice_in_dim(h, start, size) for h in heads)


def _first_pass(y_ID: Array, other_Id: Array, head_VD: Array, other_head_Vd: Array) -> _Found:
    count, size = _tiles(len(y_ID), len(head_VD))

    def body(number: Array, s: _Sums) -> _Sums:
        _, is_new_v, (rows_vD, other_vd) = _tile(number, size, head_VD, other_head_Vd)
        a_Iv, b_Iv = dot(y_ID, rows_vD, 1, 1), dot(other_Id, other_vd, 1, 1)
        top, p_Iv, scale = _grown(s.top, jnp.where(is_new_v, a_Iv, -jnp.inf))
        other_top, q_Iv, other_scale = _grown(s.other_top, jnp.where(is_new_v, b_Iv, -jnp.inf))
        return _Sums(
            top,
            s.norm * scale + p_Iv.sum(axis=1),
            other_top,
            s.other_norm * other_scale + q_Iv.sum(axis=1),
            s.gap * scale + (p_Iv * (a_Iv - b_Iv)).sum(axis=1),
        )

    zero_I, low_I = jnp.zeros(len(y_ID)), jnp.full(len(y_ID), -jnp.inf)
    s = lax.fori_loop(0, count, body, _Sums(low_I, zero_I, low_I, zero_I, zero_I))
    lse_I, other_I = s.top + jnp.log(s.norm), s.other_top + jnp.log(s.other_norm)
    return _Found(lse_I, other_I, s.gap / s.norm - lse_I + other_I)


def _grown(top_I: Array, logits_Iv: Array) -> tuple[Array, Array, Array]:
    """The new largest logit, exp(logits − it), and what sums so far are multiplied with."""
    new_I = jnp.maximum(top_I, logits_Iv.max(axis=1))
    return new_I, jnp.exp(logits_Iv - new_I[:, None]), jnp.exp(top_I - new_I)


def _second_pass(
    y_ID: Array,
    other_Id: Array,
    weight_I: Array,
    found: _Found,
    heads: tuple[Array, Array],
    g_head_VD: Array,
) -> tuple[Array, Array]:
    """Gradients of Σ weight · KL: of y `[I, D]`, and of the head added to `g_head_VD`."""
    count, size = _tiles(len(y_ID), len(heads[0]))

    def body(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        g_y_ID, g_head_VD = state
        start, is_new_v, (rows_vD, other_vd) = _tile(number, size, *heads)
        a_Iv = dot(y_ID, rows_vD, 1, 1) - found.lse[:, None]
        b_Iv = dot(other_Id, other_vd, 1, 1) - found.other_lse[:, None]
        g_Iv = jnp.exp(a_Iv) * (a_Iv - b_Iv - found.kl[:, None]) * weight_I[:, None]
        g_Iv = jnp.where(is_new_v, g_Iv, 0).astype(y_ID.dtype)
        g_y_ID = g_y_ID + dot(g_Iv, rows_vD, 1, 0)
        before_vD = lax.dynamic_slice_in_dim(g_head_VD, start, size)
        g_rows_vD = before_vD + dot(g_Iv, y_ID, 0, 0)
        return g_y_ID, lax.dynamic_update_slice_in_dim(g_head_VD, g_rows_vD, start, 0)

    zero_ID = jnp.zeros(y_ID.shape, jnp.float32)
    g_y_ID, g_head_VD = lax.fori_loop(0, count, body, (zero_ID, g_head_VD))
    return g_y_ID.astype(y_ID.dtype), g_head_VD


def _reverse_kl(
    y_UD: Array,
    head_VD: Array,
    other_Ud: Array,
    other_head_Vd: Array,
    weight_U: Array,
    learns: bool,
) -> tuple[Array, Array, Array]:
    """The sum, and the gradients of y and head if it `learns` (else zeros)."""
    heads = _heads(y_UD, head_VD, other_Ud, other_head_Vd)

    def run(state: tuple[Array, Array], chunk: tuple[Array, ...]):
        total, g_head_VD = state
        y_ID, other_Id, weight_I = chunk
        found = _first_pass(y_ID, other_Id, *heads)
        # a padded token's weight is 0 and its numbers are finite
        total = total + (weight_I * found.kl).sum()
        if not learns:
            return (total, g_head_VD), jnp.zeros_like(y_ID)
        g_y_ID, g_head_VD = _second_pass(y_ID, other_Id, weight_I, found, heads, g_head_VD)
        return (total, g_head_VD), g_y_ID

    def skip(state: tuple[Array, Array], chunk: tuple[Array, ...]):
        return state, jnp.zeros_like(chunk[0])

    def body(state: tuple[Array, Array], chunk: tuple[Array, ...]):
        return lax.cond((chunk[2] != 0).any(), run, skip, state, chunk)

    back_U, ordered = learnt_first(weight_U, y_UD, other_Ud, weight_U)
    empty = jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape if learns else (), jnp.float32)
    (total, g_head), g_y = lax.scan(body, empty, _sliced(*ordered))
    return total, g_y.reshape(-1, y_UD.shape[1])[back_U], g_head


def _forward(
    y_UD: Array, head_VD: Array, other_Ud: Array, other_head_Vd: Array, weight_U: Array
) -> tuple[Array, tuple[Array, Array]]:
    rest = (other_Ud, other_head_Vd, weight_U)
    total, g_y_UD, g_head_VD = _reverse_kl(y_UD, head_VD, *rest, learns=True)
    return total, (g_y_UD, g_head_VD.astype(head_VD.dtype))


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    """Only the student learns."""
    g_y_UD, g_head_VD = (a * g.astype(a.dtype) for a in saved)
    return g_y_UD, g_head_VD, None, None, None


reverse_kl.defvjp(_forward, _backward)


def sampled_kl(log_p_U: Array, log_q_U: Array, weight_U: Array) -> Array:
    """Σ weight · (log p − log q) of drawn tokens, float32 scalar; differentiable by log_p_U.

    log_q_U: of the teacher, constant. The gradient is that of the policy gradient with advantage
    log q − log p.
    """
    gap_U = lax.stop_gradient(weight_U * (log_p_U - log_q_U))
    return gap_U.sum() + (gap_U * (log_p_U - lax.stop_gradient(log_p_U))).sum()

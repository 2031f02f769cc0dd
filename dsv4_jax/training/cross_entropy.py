"""Cross-entropy over a large vocabulary, a slice of tokens at a time.

The gradient is formed in the same pass, while a slice's logits exist: no `[tokens, V]` array is
ever kept, and the head's product is not computed twice. Tokens that count are moved to the front,
and slices without any are skipped: of chats most tokens are not learnt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LOGIT_BUDGET = 1 << 24  # elements of one slice's logits
SLICES, SMALLEST = 16, 64  # at least so many slices, unless they would have fewer tokens


def token_losses(
    y_UD: Array, head_VD: Array, target_U: Array, support_UK: Array | None = None
) -> Array:
    """-log p(target) of every token, float32 `[U]`; not meant to be differentiated.

    support_UK: as of `log_probs`.
    """

    def one(chunk: tuple[Array, ...]) -> Array:
        y_ID, target_I, *support = chunk
        logits_IV = _logits(y_ID, head_VD, *support)
        return jax.nn.logsumexp(logits_IV, axis=-1) - _pick(logits_IV, target_I)

    rest = () if support_UK is None else (support_UK,)
    sliced = slices(_count(1, len(y_UD), len(head_VD)), y_UD, target_U, *rest)
    return lax.map(one, sliced).reshape(-1)[: len(y_UD)]


@jax.custom_vjp
def log_probs(
    y_UD: Array, head_VD: Array, target_U: Array, support_UK: Array | None = None
) -> Array:
    """log p(target) of every token, float32 `[U]`, differentiable by y and head.

    y_UD in the activation dtype, head_VD float32 (cast to it); targets int32. support_UK: int32 ids
    that each token was drawn from, -1 where there are fewer than K; p is normalised over them
    (a token without any has all of the vocabulary). None: over the vocabulary.
    """
    return -token_losses(y_UD, head_VD.astype(y_UD.dtype), target_U, support_UK)


@jax.custom_vjp
def cross_entropy(y_UD: Array, head_VD: Array, target_U: Array, weight_U: Array) -> Array:
    """Σ weight · -log p(target), float32 scalar.

    y_UD in the activation dtype, head_VD float32 (cast to it); targets int32; weights float32 and
    constant. Logits are float32.
    """
    head = head_VD.astype(y_UD.dtype)
    return (token_losses(y_UD, head, target_U) * weight_U).sum()


def _count(least: int, tokens: int, vocab: int) -> int:
    """Into how many slices tokens are cut, for their logits to stay within the budget."""
    return max(-(-tokens * vocab // LOGIT_BUDGET), min(least, -(-tokens // SMALLEST)))


def slices(count: int, *arrays: Array) -> tuple[Array, ...]:
    """Cuts along tokens into `count` slices, the last one padded with zeros."""
    tokens = len(arrays[0])
    size = -(-tokens // count)

    def cut(a: Array) -> Array:
        edges = [(0, count * size - tokens)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, edges).reshape(count, size, *a.shape[1:])

    return tuple(map(cut, arrays))


def learnt_first(weight_U: Array, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    """Arrays along tokens with those in front that have a weight, and how to get back."""
    order_U = jnp.argsort(weight_U == 0, stable=True)
    return jnp.argsort(order_U), tuple(a[order_U] for a in arrays)


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _logits(y_ID: Array, head_VD: Array, support_IK: Array | None = None) -> Array:
    """Float32 logits; -inf outside of the support, where there is one."""
    logits_IV = dot(y_ID, head_VD, 1, 1)
    if support_IK is None:
        return logits_IV
    # -1 would count from the end: what lies behind it is dropped
    at_IK = jnp.where(support_IK < 0, head_VD.shape[0], support_IK)
    row_I1 = jnp.arange(len(at_IK), dtype=jnp.int32)[:, None]
    kept_IV = jnp.zeros(logits_IV.shape, bool).at[row_I1, at_IK].set(True, mode="drop")
    kept_IV |= (support_IK < 0).all(axis=1, keepdims=True)
    return jnp.where(kept_IV, logits_IV, -jnp.inf)


def _pick(logits_IV: Array, target_I: Array) -> Array:
    return jnp.take_along_axis(logits_IV, target_I[:, None], axis=1)[:, 0]


def _forward(
    y_UD: Array,
    head_VD: Array,
    target_U: Array,
    weight_U: Array,
    support_UK: Array | None = None,
):
    head = head_VD.astype(y_UD.dtype)
    columns = jnp.arange(len(head), dtype=jnp.int32)[None]

    def learn(carry: tuple[Array, Array], chunk: tuple[Array, ...]):
        loss, g_head = carry
        y_ID, target_I, weight_I, *support = chunk
        logits_IV = _logits(y_ID, head, *support)
        norm_I = jax.nn.logsumexp(logits_IV, axis=-1)
        loss = loss + (weight_I * (norm_I - _pick(logits_IV, target_I))).sum()
        g_IV = jnp.exp(logits_IV - norm_I[:, None]) - (columns == target_I[:, None])
        g_IV = (g_IV * weight_I[:, None]).astype(y_ID.dtype)
        g_y_ID = dot(g_IV, head, 1, 0).astype(y_ID.dtype)
        return (loss, g_head + dot(g_IV, y_ID, 0, 0)), g_y_ID

    def skip(carry: tuple[Array, Array], chunk: tuple[Array, ...]):
        return carry, jnp.zeros_like(chunk[0])

    def body(carry: tuple[Array, Array], chunk: tuple[Array, ...]):
        return lax.cond((chunk[2] != 0).any(), learn, skip, carry, chunk)

    zero = jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32)
    more = () if support_UK is None else (support_UK,)
    back_U, ordered = learnt_first(weight_U, y_UD, target_U, weight_U, *more)
    count = _count(SLICES, len(y_UD), len(head))
    (loss, g_head), g_y = lax.scan(body, zero, slices(count, *ordered))
    g_y_UD = g_y.reshape(-1, y_UD.shape[1])[back_U]
    return loss, (g_y_UD, g_head.astype(head_VD.dtype), target_U, weight_U)


def _backward(saved: tuple[Array, ...], g: Array):
    g_y_UD, g_head_VD, target_U, weight_U = saved
    none = np.zeros(target_U.shape, jax.dtypes.float0)
    scaled = (a * g.astype(a.dtype) for a in (g_y_UD, g_head_VD))
    return (*scaled, none, jnp.zeros_like(weight_U))


cross_entropy.defvjp(_forward, _backward)


def _log_probs_forward(
    y_UD: Array, head_VD: Array, target_U: Array, support_UK: Array | None = None
):
    found_U = log_probs(y_UD, head_VD, target_U, support_UK)
    return found_U, (y_UD, head_VD, target_U, support_UK)


def _log_probs_backward(saved: tuple[Any, ...], g_U: Array):
    """Cross-entropy with weights -g: slices of tokens that get no gradient are skipped."""
    y_UD, head_VD, target_U, support_UK = saved
    _, (g_y_UD, g_head_VD, *_) = _forward(y_UD, head_VD, target_U, -g_U, support_UK)
    return g_y_UD, g_head_VD, None, None


log_probs.defvjp(_log_probs_forward, _log_probs_backward)

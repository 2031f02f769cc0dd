"""Cross-entropy over a large vocabulary, a slice of tokens at a time.

The gradient is formed in the same pass, while a slice's logits exist: no `[tokens, V]` array is
ever kept, and the head's product is not computed twice. Tokens that count are moved to the front,
and slices without any are skipped: of chats most tokens are not learnt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LOGIT_BUDGET = 1 << 24  # elements of one slice's logits
SLICES, SMALLEST = 16, 64  # at least so many slices, unless they would have fewer tokens


def token_losses(y_UD: Array, head_VD: Array, target_U: Array) -> Array:
    """-log p(target) of every token, float32 `[U]`; not meant to be differentiated."""

    def one(chunk: tuple[Array, Array]) -> Array:
        y_ID, target_I = chunk
        logits_IV = _dot(y_ID, head_VD, 1, 1)
        return jax.nn.logsumexp(logits_IV, axis=-1) - _pick(logits_IV, target_I)

    sliced = _slices(1, y_UD, head_VD.shape[0], target_U)
    return lax.map(one, sliced).reshape(-1)[: len(y_UD)]


@jax.custom_vjp
def cross_entropy(y_UD: Array, head_VD: Array, target_U: Array, weight_U: Array) -> Array:
    """Σ weight · -log p(target), float32 scalar.

    y_UD in the activation dtype, head_VD float32 (cast to it); targets int32; weights float32 and
    constant. Logits are float32.
    """
    head = head_VD.astype(y_UD.dtype)
    return (token_losses(y_UD, head, target_U) * weight_U).sum()


def _slices(least: int, y_UD: Array, vocab: int, *rest: Array) -> tuple[Array, ...]:
    """Cuts along tokens into slices within the budget, the last one padded with zeros."""
    tokens = len(y_UD)
    count = max(-(-tokens * vocab // LOGIT_BUDGET), min(least, -(-tokens // SMALLEST)))
    size = -(-tokens // count)

    def cut(a: Array) -> Array:
        edges = [(0, count * size - tokens)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, edges).reshape(count, size, *a.shape[1:])

    return tuple(cut(a) for a in (y_UD, *rest))


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _pick(logits_IV: Array, target_I: Array) -> Array:
    return jnp.take_along_axis(logits_IV, target_I[:, None], axis=1)[:, 0]


def _forward(y_UD: Array, head_VD: Array, target_U: Array, weight_U: Array):
    head = head_VD.astype(y_UD.dtype)
    columns = jnp.arange(len(head), dtype=jnp.int32)[None]

    def learn(carry: tuple[Array, Array], chunk: tuple[Array, ...]):
        loss, g_head = carry
        y_ID, target_I, weight_I = chunk
        logits_IV = _dot(y_ID, head, 1, 1)
        norm_I = jax.nn.logsumexp(logits_IV, axis=-1)
        loss = loss + (weight_I * (norm_I - _pick(logits_IV, target_I))).sum()
        g_IV = jnp.exp(logits_IV - norm_I[:, None]) - (columns == target_I[:, None])
        g_IV = (g_IV * weight_I[:, None]).astype(y_ID.dtype)
        g_y_ID = _dot(g_IV, head, 1, 0).astype(y_ID.dtype)
        return (loss, g_head + _dot(g_IV, y_ID, 0, 0)), g_y_ID

    def skip(carry: tuple[Array, Array], chunk: tuple[Array, ...]):
        return carry, jnp.zeros_like(chunk[0])

    def body(carry: tuple[Array, Array], chunk: tuple[Array, ...]):
        return lax.cond((chunk[2] != 0).any(), learn, skip, carry, chunk)

    zero = jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32)
    order_U = jnp.argsort(weight_U == 0, stable=True)
    ordered = (a[order_U] for a in (y_UD, target_U, weight_U))
    first, *rest = ordered
    (loss, g_head), g_y = lax.scan(body, zero, _slices(SLICES, first, len(head), *rest))
    g_y_UD = g_y.reshape(-1, y_UD.shape[1])[jnp.argsort(order_U)]
    return loss, (g_y_UD, g_head.astype(head_VD.dtype), target_U, weight_U)


def _backward(saved: tuple[Array, ...], g: Array):
    g_y_UD, g_head_VD, target_U, weight_U = saved
    none = np.zeros(target_U.shape, jax.dtypes.float0)
    scaled = (a * g.astype(a.dtype) for a in (g_y_UD, g_head_VD))
    return (*scaled, none, jnp.zeros_like(weight_U))


cross_entropy.defvjp(_forward, _backward)

"""Expert matmuls with packed weights: dropless, any number of rows per expert, also none.

A weight is anything with `codes` and `scales`, stacked over experts:
fp4: codes uint8 `[E, out, in/2]`, low nibble = even input; scales float8_e8m0fnu `[E, out, in/32]`.
fp8: codes float8_e4m3fn `[E, out, in]`; scales float8_e8m0fnu or float32 per 128×128 block.
With `layer`, all arrays are stacks `[L, E, …]` of which this entry is read where it lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import kernel, reference, resident
from pallas_kernels.grouped_matmul.plan import plan_rows, row_tile

IMPLEMENTATIONS = ("reference", "pallas", "interpret")


class PackedWeight(NamedTuple):
    """The two arrays of a weight, as a pytree of arrays only."""

    codes: jax.Array
    scales: jax.Array


def grouped_matmul(
    x_YK: jax.Array,
    owner_Y: jax.Array,
    weight: Any,
    *,
    layer: jax.Array | int | None = None,
    round_activations: bool = False,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> jax.Array:
    """Row r is `x[r] · W[owner[r]]ᵀ`, bfloat16 `[Y, out]`; zero where the owner is not in [0, E).

    Rows may come in any order. `implementation`: None is the kernel on TPU and the (slow, dense)
    reference elsewhere; `interpret_params` is what `interpret` hands to `pallas_call`.

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
    """
    layer_1, (weight,) = _stacks(layer, weight=weight)
    _check_implementation(implementation)
    _check_rows("x", x_YK, weight)
    if owner_Y.shape != x_YK.shape[:1] or owner_Y.dtype != jnp.int32:
        raise ValueError(
            f"owner is {owner_Y.dtype}{list(owner_Y.shape)}, must be int32 [{x_YK.shape[0]}]"
        )

    def plain(x_YK, owner_Y, layer_1, weight):
        (weight,) = _layer_of(layer_1, weight)
        return reference.grouped_matmul(x_YK, owner_Y, weight, round_activations)

    def tiled(x_YK, owner_Y, layer_1, weight, interpret=False):
        experts = weight.codes.shape[1]
        plan = plan_rows(owner_Y, experts, row_tile(x_YK.shape[0], experts))
        x_PYK = kernel.prepare(x_YK, round_activations, kernel.describe(weight).is_fp4, interpret)
        x_PZK = _take(x_PYK, jnp.maximum(plan.source_Z, 0))
        y_ZN = kernel.product(x_PZK, weight, plan, layer_1, interpret)
        return y_ZN.at[plan.slot_Y].get(mode="fill", fill_value=0)

    args = (x_YK, owner_Y, layer_1, weight)
    return _choose(plain, tiled, args, x_YK.shape[0], implementation, interpret_params)


def routed_experts(
    x_UD: jax.Array,
    experts_UA: jax.Array,
    weights_UA: jax.Array,
    w1: Any,
    w3: Any,
    w2: Any,
    *,
    layer: jax.Array | int | None = None,
    limit: float = 0.0,
    round_activations: bool = False,
    implementation: str | None = None,
    interpret_params: Any = True,
) -> jax.Array:
    """Σ over each token's experts of w2(silu(w1 x) · (w3 x) · weight), float32 `[U, D]`.

    Expert ids outside [0, E) contribute nothing: padding tokens, or experts of other devices.
    A token names an expert at most once, in ascending order, and they add up in that order.
    gate ≤ limit and |up| ≤ limit if `limit` is not zero. The three products, the hidden row and its
    product with the routing weight are rounded to bfloat16 where the official code does;
    `round_activations` also rounds both inputs to FP8 per row and 128 channels. `implementation`
    and `interpret_params` as in `grouped_matmul`.

    Raises:
        ValueError: shapes or dtypes do not fit; the message says which.
    """
    layer_1, (w1, w3, w2) = _stacks(layer, w1=w1, w3=w3, w2=w2)
    _check_implementation(implementation)
    _check_rows("x", x_UD, w1)
    _check_experts(x_UD, experts_UA, weights_UA, w1, w3, w2)
    tokens, per_token = experts_UA.shape

    def plain(x_UD, experts_UA, weights_UA, layer_1, w1, w3, w2):
        w1, w3, w2 = _layer_of(layer_1, w1, w3, w2)
        rows = jnp.repeat(x_UD, per_token, axis=0)
        scale_Y, owner_Y = weights_UA.reshape(-1), experts_UA.reshape(-1)
        y_YD = reference.expert_rows(rows, owner_Y, scale_Y, w1, w3, w2, limit, round_activations)
        return _sum_experts(y_YD, jnp.arange(tokens * per_token).reshape(tokens, per_token))

    def tiled(x_UD, experts_UA, weights_UA, layer_1, w1, w3, w2, interpret=False):
        experts, few = w1.codes.shape[1], tokens <= resident.MAX_TOKENS
        plan = plan_rows(experts_UA.reshape(-1), experts, row_tile(experts_UA.size, experts))
        is_finite_U1 = jnp.isfinite(x_UD).all(1, keepdims=True)
        if few:  # what is not finite must not reach other tokens
            x_UD = jnp.where(is_finite_U1, x_UD, 0)
            x_UD = jnp.pad(x_UD, ((0, -tokens % kernel.ROWS), (0, 0)))
        x_PUD = kernel.prepare(x_UD, round_activations, kernel.describe(w1).is_fp4, interpret)
        source_Z = jnp.maximum(plan.source_Z, 0)
        scale_Z = weights_UA.reshape(-1)[source_Z]
        token_Z = jnp.where(plan.source_Z < 0, -1, source_Z // per_token)
        up = kernel.SwiGLU(w1, w3, limit, round_activations, kernel.describe(w2).is_fp4)
        rest = plan, layer_1, interpret
        if few:
            hidden_PYF = resident.swiglu(x_PUD, token_Z, scale_Z, up, *rest)
            total_UD = resident.combine(hidden_PYF, token_Z, len(x_UD), w2, *rest)
            is_here_U1 = ((experts_UA >= 0) & (experts_UA < experts)).any(1, keepdims=True)
            return jnp.where(is_finite_U1 | ~is_here_U1, total_UD[:tokens], jnp.nan)
        hidden_PZF = kernel.swiglu(_take(x_PUD, jnp.maximum(token_Z, 0)), scale_Z, up, *rest)
        y_ZD = kernel.product(hidden_PZF, w2, *rest)
        return _sum_experts(y_ZD, plan.slot_Y.reshape(tokens, per_token))

    args = (x_UD, experts_UA, weights_UA, layer_1, w1, w3, w2)
    return _choose(plain, tiled, args, experts_UA.size, implementation, interpret_params)


def _take(x_PUK: jax.Array, source_Z: jax.Array) -> jax.Array:
    """Rows `[parts, Z, K]`, gathered from one flat list: XLA would transpose otherwise."""
    parts, rows, width = x_PUK.shape
    every = (source_Z[None] + rows * jnp.arange(parts, dtype=jnp.int32)[:, None]).reshape(-1)
    return x_PUK.reshape(parts * rows, width)[every].reshape(parts, -1, width)


def _sum_experts(y_ZD: jax.Array, slot_UA: jax.Array) -> jax.Array:
    """Σ over the experts of each token in float32; slots past the end count nothing."""

    def rows(a: int) -> jax.Array:
        return y_ZD.at[slot_UA[:, a]].get(mode="fill", fill_value=0).astype(jnp.float32)

    total = rows(0)
    for a in range(1, slot_UA.shape[1]):
        total = total + rows(a)
    return total


def _choose(plain, tiled, args, rows: int, implementation: str | None, interpret_params: Any):
    if rows == 0 or implementation == "reference":
        return plain(*args)
    if implementation == "interpret":
        return tiled(*args, interpret=interpret_params)
    if implementation == "pallas":
        return tiled(*args)
    return lax.platform_dependent(*args, tpu=tiled, default=plain)


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be None or one of {IMPLEMENTATIONS}"
        )


def _stacks(layer: jax.Array | int | None, **weights: Any) -> tuple[jax.Array, list[PackedWeight]]:
    """The layer as `[1]`, and the weights as stacks of layers."""
    checked = []
    for name, weight in weights.items():
        codes, scales = weight.codes, weight.scales
        lead = 0 if layer is None else 1
        _check_weight(name, codes, scales, lead)
        checked.append(
            PackedWeight(codes, scales) if lead else PackedWeight(codes[None], scales[None])
        )
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1), checked


def _layer_of(layer_1: jax.Array, *weights: PackedWeight) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer_1[0], keepdims=False), weights)


def _check_weight(name: str, codes: jax.Array, scales: jax.Array, lead: int) -> None:
    shapes = f"{name}: codes {codes.dtype}{list(codes.shape)}, scales {scales.dtype}"
    shapes += str(list(scales.shape))
    if codes.ndim != lead + 3:
        raise ValueError(f"{shapes}: codes must be {'[L, ' * lead or '['}experts, out, in or in/2]")
    *stack, out_dim, stored = codes.shape
    if codes.dtype == jnp.uint8:
        wanted, dtypes = (*stack, out_dim, stored // 16), (jnp.float8_e8m0fnu,)
        if stored % 16:
            raise ValueError(f"{shapes}: FP4 inputs must come in blocks of 32 (16 bytes)")
    elif codes.dtype == jnp.float8_e4m3fn:
        wanted = (*stack, -(-out_dim // 128), -(-stored // 128))
        dtypes = (jnp.float8_e8m0fnu, jnp.float32)
    else:
        raise ValueError(f"{shapes}: codes must be uint8 (FP4) or float8_e4m3fn")
    if scales.shape != wanted or scales.dtype not in dtypes:
        names = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise ValueError(f"{shapes}: scales must be {names} {list(wanted)}")


def _check_rows(name: str, x: jax.Array, weight: PackedWeight) -> None:
    in_dim = kernel.describe(weight).in_dim
    if x.dtype != jnp.bfloat16 or x.ndim != 2 or x.shape[1] != in_dim:
        raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, must be bfloat16 [rows, {in_dim}]")


def _check_experts(x_UD, experts_UA, weights_UA, w1, w3, w2) -> None:
    up, up3, down = (kernel.describe(w) for w in (w1, w3, w2))
    tokens = x_UD.shape[0]
    if (up.experts, up.out_dim, up.in_dim) != (up3.experts, up3.out_dim, up3.in_dim):
        raise ValueError(f"w1 {up[2:5]} and w3 {up3[2:5]} must have the same (E, F, D)")
    if up.is_fp4 != up3.is_fp4:
        raise ValueError("w1 and w3 must be stored alike: both FP4 or both FP8")
    if (down.experts, down.out_dim, down.in_dim) != (up.experts, up.in_dim, up.out_dim):
        raise ValueError(f"w2 {down[2:5]} must be (E, D, F) of w1 {up[2:5]}")
    if experts_UA.ndim != 2 or experts_UA.shape[0] != tokens or experts_UA.dtype != jnp.int32:
        raise ValueError(
            f"experts are {experts_UA.dtype}{list(experts_UA.shape)}, must be int32 [{tokens}, A]"
        )
    if weights_UA.shape != experts_UA.shape or weights_UA.dtype != jnp.float32:
        raise ValueError(
            f"weights are {weights_UA.dtype}{list(weights_UA.shape)}, must be float32 "
            f"{list(experts_UA.shape)}"
        )

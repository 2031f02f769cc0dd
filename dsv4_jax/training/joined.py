"""Weights as a layer works on them: joined along the mesh axes that only store them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.params import ParamSpec, is_spec, top_specs
from dsv4_jax.training.precision import fake_weight, straight_through
from dsv4_jax.training.program import Program
from sharding.rules import entry_axes


def join(program: Program, specs: Any, weights: Any) -> Any:
    """One unit's weights (a tree like its `specs`), joined and, if wanted, rounded.

    Matrices travel in the dtype they are multiplied in, but gradients are added up in float32.
    Rounding comes after joining: the elements of one scale may lie on several devices.
    """
    shards, precision = program.shards, program.precision
    if shards.mesh is None:
        return weights

    def one(spec: ParamSpec, value: Array) -> Array:
        fmt = precision.format_of(spec.role)
        is_wide = spec.role == "plain" or fmt is not None
        dtype = jnp.dtype(jnp.float32) if is_wide else program.num.jnp_dtype
        for dim, entry in enumerate(shards.spec(spec.logical, spec.shape)):
            axes = tuple(axis for axis in entry_axes(entry) if axis in shards.rules.gathered)
            if axes:
                value = _joined(value, axes, dim, dtype)
        return straight_through(partial(fake_weight, fmt), value) if fmt else value

    return jax.tree.map(one, specs, weights, is_leaf=is_spec)


def join_top(program: Program, params: Any) -> Any:
    """Parameters with embedding, head and what else belongs to no layer joined."""
    return {**params, "top": join(program, top_specs(program.cfg), params["top"])}


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _joined(x: Array, axes: tuple[str, ...], dim: int, dtype: Any) -> Array:
    return lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)


def _forward(x: Array, axes: tuple[str, ...], dim: int, dtype: Any) -> tuple[Array, None]:
    return _joined(x, axes, dim, dtype), None


def _backward(axes: tuple[str, ...], dim: int, dtype: Any, saved: None, g: Array) -> tuple[Array]:
    """Each device keeps its part of Σ over devices; master weights are float32."""
    del dtype, saved
    return (lax.psum_scatter(g.astype(jnp.float32), axes, scatter_dimension=dim, tiled=True),)


_joined.defvjp(_forward, _backward)

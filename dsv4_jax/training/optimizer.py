"""The optimizer of a phase: Muon and AdamW by partition, clipping, decay, and what is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import is_scanned
from dsv4_jax.placement import param_specs
from dsv4_jax.training.leaves import SIDES, Place, map_places
from dsv4_jax.training.muon import UPDATE_RMS, scale_by_muon
from dsv4_jax.training.owners import orthogonalise_owned
from dsv4_jax.training.partition import is_view, view, views
from sharding.shards import SINGLE, Shards

MATRICES = ("muon", "adamw", "optax_muon")


@dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters that do not change during a run; defaults are the published ones.

    matrices: "muon"; for comparisons "adamw", which moves every leaf by AdamW, or "optax_muon",
    which moves whole leaves by optax's own Muon (five steps of Newton–Schulz in float32 whatever
    `ns_dtype`, momentum as a mean).
    decay: decoupled weight decay of every learning leaf. vector_decay: the same of leaves of one
    dimension (weights of norms, sinks, biases); None: like all. Attention's logits are bounded by
    those weights, and high rates over few steps shrink them faster than they learn.
    clip: bound of the gradient's global norm, separately for indexers and everything else; 0: none.
    ns_dtype: operands of Newton–Schulz.

    Raises:
        ValueError: a value out of range.
    """

    matrices: str = "muon"
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-20
    decay: float = 0.1
    vector_decay: float | None = None
    clip: float = 1.0
    ns_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.matrices not in MATRICES:
            raise ValueError(f"optimizer.matrices={self.matrices!r} must be one of {MATRICES}")
        for name in ("momentum", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("decay", "clip", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if self.vector_decay is not None and self.vector_decay < 0:
            raise ValueError(f"optimizer.vector_decay={self.vector_decay} must not be negative")


def make_optimizer(
    opt: OptimizerConfig,
    cfg: ModelConfig,
    params: Any,
    learn: str = "all",
    shards: Shards = SINGLE,
) -> optax.GradientTransformation:
    """Directions, decay included, to be multiplied by -η.

    The state has one structure whatever learns: what is frozen keeps its slots untouched.

    learn: whose sides move, see `SIDES`. shards: the mesh that parameters lie on.

    Raises:
        ValueError: `learn` is none of these.
    """
    if learn not in SIDES:
        raise ValueError(f"learn={learn!r} must be one of {tuple(SIDES)}")
    decay = optax.add_decayed_weights(opt.decay)
    muon = _muon(opt, cfg, params, shards)
    if opt.matrices == "optax_muon":
        muon = _optax_muon(opt)
    adam = optax.scale_by_adam(opt.b1, opt.b2, opt.eps)
    rules = {"muon": optax.chain(muon, decay), "adamw": optax.chain(adam, decay)}
    if opt.vector_decay is not None:
        rules["vectors"] = optax.chain(adam, optax.add_decayed_weights(opt.vector_decay))
    transforms: dict[Any, Any] = {"none": optax.set_to_zero()}
    for name, rule in rules.items():
        trunk = {"indexer": frozen, "mtp": of_mtp}.get(learn, lambda rule: rule)(rule)
        transforms[f"trunk {name}"] = trunk
        transforms[f"indexer {name}"] = rule if "indexer" in SIDES[learn] else frozen(rule)

    def label(place: Place, _: Array) -> str:
        group = view(place, cfg).group
        if group == "none":
            return group
        side = "indexer" if place.is_index else "trunk"  # with the MTP block: stacks are fuller
        if "vectors" in rules and len(place.spec.dims) == 1:
            return f"{side} vectors"
        return f"{side} {'adamw' if opt.matrices == 'adamw' else group}"

    return optax.partition(transforms, map_places(label, cfg, params))


def _muon(
    opt: OptimizerConfig, cfg: ModelConfig, params: Any, shards: Shards
) -> optax.GradientTransformation:
    dtype, how = jnp.dtype(opt.ns_dtype), views(cfg, params)
    if shards.mesh is None:
        return scale_by_muon(how, opt.momentum, dtype=dtype)
    placed = param_specs(cfg, shards, is_scanned(cfg, params))
    both = jax.tree.map(lambda *pair: pair, how, placed, is_leaf=is_view)

    def owned(leaves: list[Array], found: list[Any]) -> list[Array]:
        which, where = ([pair[i] for pair in found] for i in (0, 1))
        return orthogonalise_owned(leaves, which, where, dtype, shards)

    return scale_by_muon(both, opt.momentum, factor=owned)


def _optax_muon(opt: OptimizerConfig) -> optax.GradientTransformation:
    """Directions of `optax.contrib.muon` with the same root mean square; all leaves are Muon's."""

    def dimensions(params: Any) -> Any:  # leaves are [..., out, in]
        return jax.tree.map(lambda p: MuonDimensionNumbers(p.ndim - 1, p.ndim - 2), params)

    return optax.contrib.muon(
        learning_rate=-1.0,  # the caller turns the sign
        beta=opt.momentum,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=UPDATE_RMS,
    )


def frozen(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule with its state, moving nothing."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(jnp.zeros_like, grads), state

    return optax.GradientTransformation(rule.init, update)  # type: ignore[arg-type]


def of_mtp(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule for MTP blocks, moving nothing else; other slots stay, but for Adam's count."""

    def parts(path: tuple[Any, ...]) -> set[Any]:
        return {getattr(key, "key", None) for key in path}

    def cut(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: optax.MaskedNode() if parts(path) & {"top", "groups"} else x, tree
        )

    def joined(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: a if isinstance(b, optax.MaskedNode) else b, old, new)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = rule.update(cut(grads), cut(state), cut(params))
        return joined(jax.tree.map(jnp.zeros_like, grads), updates), joined(state, new)

    return optax.GradientTransformation(rule.init, update)  # type: ignore[arg-type]


class Norms(NamedTuple):
    """Global norms of the gradient before clipping."""

    trunk: Array
    indexer: Array


def clip(grads: Any, cfg: ModelConfig, bound: float, learn: str) -> tuple[Any, Norms]:
    """Scales the indexers' and the other gradients down to norm `bound` each; 0: only measures."""

    def side_of(place: Place, _: Array) -> str:
        return "indexer" if place.is_index else "trunk"

    sides = jax.tree.leaves(map_places(side_of, cfg, grads))
    leaves, treedef = jax.tree.flatten(grads)
    learns = {"trunk": learn != "indexer", "indexer": "indexer" in SIDES[learn]}
    norms, scales = {}, {}
    for side in ("trunk", "indexer"):
        squares = [
            jnp.sum(jnp.square(g))
            for g, s in zip(leaves, sides, strict=True)
            if s == side and learns[side] and jnp.issubdtype(g.dtype, jnp.floating)
        ]
        norms[side] = jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
        scales[side] = jnp.minimum(1.0, bound / jnp.maximum(norms[side], 1e-30)) if bound else 1.0
    clipped = [
        g * scales[s] if jnp.issubdtype(g.dtype, jnp.floating) else g
        for g, s in zip(leaves, sides, strict=True)
    ]
    return jax.tree.unflatten(treedef, clipped), Norms(norms["trunk"], norms["indexer"])

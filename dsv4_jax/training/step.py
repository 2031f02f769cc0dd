"""One optimizer step: gradients over microbatches and devices, update, biases, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.model import is_scanned
from dsv4_jax.placement import param_specs
from dsv4_jax.training.balance import load_ratio, move_biases
from dsv4_jax.training.batch import Batch
from dsv4_jax.training.forward import forward
from dsv4_jax.training.joined import join_top
from dsv4_jax.training.losses import Aux, Counts, Weights, count, objective
from dsv4_jax.training.optimizer import OptimizerConfig, clip, make_optimizer
from dsv4_jax.training.placing import (
    manual_axes,
    manual_specs,
    route_spec,
    row_spec,
    state_shardings,
)
from dsv4_jax.training.precision import round_weights
from dsv4_jax.training.program import Program
from sharding.rules import entry_axes
from sharding.shards import SINGLE


@struct.dataclass
class TrainState:
    """Master parameters (float32, grouped) and the optimizer's slots."""

    params: Any
    opt_state: Any


class Knobs(NamedTuple):
    """What a schedule decides anew in each step: float32 scalars.

    loss_limit, norm_limit: a step beyond them (or not finite) changes nothing.
    """

    lr: Array
    mtp: Array
    balance: Array
    indexer: Array
    bias_speed: Array
    loss_limit: Array
    norm_limit: Array


class StepMetrics(NamedTuple):
    """Float32 scalars of one step; losses as in `losses.Metrics`.

    captured: 1 − KL / KL of equal shares. recall: share of the rows with most attention that the
    indexers keep too; NaN unless some query attends to more than they keep. load: busiest expert
    over mean, worst layer. bias: largest router bias. update_rms: root mean square of the Muon
    directions. kl, clipped, masked: of GRPO. applied: 1, or 0 if the step was skipped.
    """

    loss: Array
    mtp: Array
    balance: Array
    indexer: Array
    captured: Array
    recall: Array
    grad_norm: Array
    index_norm: Array
    load: Array
    bias: Array
    update_rms: Array
    kl: Array
    clipped: Array
    masked: Array
    applied: Array


def init_state(program: Program, opt: OptimizerConfig, params: Any) -> TrainState:
    """A fresh optimizer for these parameters."""
    return TrainState(params, make_optimizer(opt, program.cfg, params).init(params))


def gradients(
    program: Program,
    weights: Weights,
    params: Any,
    batch: Batch,
    routes: Any = None,
    others: Sequence[Any] = (),
) -> tuple[Any, Aux]:
    """Gradient of the objective of a whole batch `[microbatches, B, T]`, and its metrics.

    Losses are divided by counts of the whole batch, so that any cut into microbatches or devices
    gives the same sum. Routing state gets zeros. others: parameters of the models that run beside
    the one that learns, see `policy_loss`.
    """
    by_sequence = program.objective is not None
    counts = jax.vmap(partial(count, by_sequence=by_sequence))(batch)
    counts = jax.tree.map(lambda a: a.sum(), counts)
    find = _accumulate if program.shards.mesh is None else _over_mesh
    return find(program, weights, counts, params, batch, routes, list(others))


def _accumulate(
    program: Program,
    weights: Weights,
    counts: Counts,
    params: Any,
    batch: Batch,
    routes: Any,
    others: list[Any],
) -> tuple[Any, Aux]:
    """Of one device: the gradient of its rows' share, with respect to the weights it holds."""

    def rounded(tree: Any) -> Any:
        if program.shards.mesh is not None:  # there they are rounded when they have been joined
            return tree
        return round_weights(tree, program.cfg, program.precision)

    others = [rounded(tree) for tree in others]
    leaves, treedef = jax.tree.flatten(params)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def loss(floats: list[Array], micro: Batch, route: Any) -> tuple[Array, Aux]:
        rest = iter(floats)
        full = [next(rest) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        tree = jax.tree.unflatten(treedef, full)
        return objective(program, weights, counts, rounded(tree), micro, route, others)

    floats = [leaf for m, leaf in zip(moves, leaves, strict=True) if m]
    grad = jax.grad(loss, has_aux=True)

    def body(total: Any, xs: tuple[Batch, Any]):
        found, aux = grad(floats, *xs)
        kept = aux._replace(routes=None)
        return jax.tree.map(jnp.add, total, (found, kept)), aux.routes

    first = jax.tree.map(lambda a: a[0], (batch, routes))
    shapes = jax.eval_shape(grad, floats, *first)
    empty = (shapes[0], shapes[1]._replace(routes=None))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)
    total, chosen = lax.scan(body, zeros, (batch, routes))
    found, aux = total
    rest = iter(found)
    grads = [
        next(rest) if m else jnp.zeros_like(leaf) for m, leaf in zip(moves, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, grads), aux._replace(routes=chosen)


def _over_mesh(
    program: Program,
    weights: Weights,
    counts: Counts,
    params: Any,
    batch: Batch,
    routes: Any,
    others: list[Any],
) -> tuple[Any, Aux]:
    """`_accumulate` of every device's rows and weights, added up over devices."""
    shards, cfg = program.shards, program.cfg
    assert isinstance(shards.mesh, Mesh)
    placed = manual_specs(param_specs(cfg, shards, is_scanned(cfg, params)))
    rows, whole = row_spec(shards), PartitionSpec()
    tokens = shards.token_axes

    def total(grad: Array, spec: PartitionSpec) -> Array:
        """Where a weight is split, every device has all of its own part's gradient."""
        used = {axis for entry in spec for axis in entry_axes(entry)}
        rest = tuple(axis for axis in tokens if axis not in used)
        return lax.psum(grad, rest) if rest else grad

    def local(params: Any, weights: Any, counts: Any, batch: Batch, routes: Any, others: list[Any]):
        grads, aux = _accumulate(program, weights, counts, params, batch, routes, others)
        summed = lax.psum((aux.metrics, aux.loads), tokens) if tokens else (aux.metrics, aux.loads)
        return (jax.tree.map(total, grads, placed), *summed), aux.routes

    def routed(tree: Any) -> Any:
        return jax.tree.map(lambda a: route_spec(shards, a.ndim), tree)

    alone = dataclasses.replace(program, shards=SINGLE)
    shapes = jax.eval_shape(partial(gradients, alone, weights), params, batch, routes, others)
    run = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(placed, whole, whole, rows, routed(routes), [placed for _ in others]),
        out_specs=((placed, whole, whole), routed(shapes[1].routes)),
        axis_names=manual_axes(shards),
        check_vma=False,
    )
    (grads, metrics, loads), chosen = run(params, weights, counts, batch, routes, others)
    return grads, Aux(metrics, loads, chosen)


def make_step(
    program: Program, opt: OptimizerConfig, learn: str
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted step (state, batch, knobs, routes=None, others=()) → (state, metrics).

    The batch is `[microbatches, B, T]`; on a mesh B divides by its size, and the state lies and
    stays where `placing.state_specs` says. It donates the state, but not `others`, see `gradients`.
    """

    def step(
        state: TrainState,
        batch: Batch,
        knobs: Knobs,
        routes: Any = None,
        others: Sequence[Any] = (),
    ) -> tuple[TrainState, StepMetrics]:
        weights = Weights(knobs.mtp, knobs.balance, knobs.indexer)
        grads, aux = gradients(program, weights, state.params, batch, routes, others)
        return update(program, opt, learn, state, grads, aux, knobs)

    return jax.jit(step, donate_argnums=0)


def update(
    program: Program,
    opt: OptimizerConfig,
    learn: str,
    state: TrainState,
    grads: Any,
    aux: Aux,
    knobs: Knobs,
) -> tuple[TrainState, StepMetrics]:
    """The state after a step with this gradient, or the same one if the step is left out."""
    cfg, params = program.cfg, state.params
    grads, norms = clip(grads, cfg, opt.clip, learn)
    rule = make_optimizer(opt, cfg, params, learn, program.shards)
    updates, opt_state = rule.update(grads, state.opt_state, params)
    moved = jax.tree.map(lambda p, u: (p - knobs.lr * u).astype(p.dtype), params, updates)
    moved = move_biases(cfg, moved, aux.loads, knobs.bias_speed, learn)
    norm = jnp.sqrt(norms.trunk**2 + norms.indexer**2)
    m = aux.metrics
    fine = jnp.isfinite(m.loss + m.mtp + m.indexer + norm)
    fine &= (m.loss <= knobs.loss_limit) & (norm <= knobs.norm_limit)
    new = TrainState(moved, opt_state)
    new = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, state)
    return _stay(program, new), _report(aux, norms, new.params, updates, params, opt, fine)


def _stay(program: Program, state: TrainState) -> TrainState:
    if program.shards.mesh is None:
        return state
    scan = is_scanned(program.cfg, state.params)
    where = state_shardings(program.cfg, state, program.shards, scan)
    return lax.with_sharding_constraint(state, where)


def _report(
    aux: Aux, norms: Any, params: Any, updates: Any, old: Any, opt: OptimizerConfig, fine: Array
) -> StepMetrics:
    m = aux.metrics
    return StepMetrics(
        m.loss,
        m.mtp,
        m.balance,
        m.indexer,
        1 - m.indexer / jnp.maximum(m.index_uniform, 1e-9),
        jnp.where(m.wanted > 0, m.hits / m.wanted, jnp.nan),
        norms.trunk,
        norms.indexer,
        load_ratio(aux.loads),
        _largest_bias(params),
        _update_rms(updates, old, opt),
        m.kl,
        m.clipped,
        m.masked,
        fine.astype(jnp.float32),
    )


def _largest_bias(params: Any) -> Array:
    layers = [layer for group in params["groups"] for layer in group] + params["mtp"]
    found = [jnp.abs(w["ffn"]["gate"]["bias"]).max() for w in layers if "bias" in w["ffn"]["gate"]]
    return jnp.stack([jnp.zeros(()), *found]).max()


def _update_rms(updates: Any, params: Any, opt: OptimizerConfig) -> Array:
    """Of one matrix of every run, before decay: the first layer's query projection."""
    u, p = (tree["groups"][0][0]["attn"]["wq_a"] for tree in (updates, params))
    return jnp.sqrt(jnp.mean(jnp.square(u - opt.decay * p)))


def routing_pass(program: Program, params: Any, batch: Batch) -> Any:
    """The experts that today's parameters choose for a batch `[microbatches, B, T]`."""
    shards, cfg = program.shards, program.cfg

    def local(params: Any, batch: Batch) -> Any:
        top = join_top(program, params)

        def one(micro: Batch) -> Any:
            terms = forward(program, top, micro._replace(rollout=None)).terms
            return [[t.router.experts_BTA for t in group] for group in terms]

        return lax.map(one, batch)

    if shards.mesh is None:
        return local(params, batch)
    assert isinstance(shards.mesh, Mesh)
    alone = dataclasses.replace(program, shards=SINGLE)
    shapes = jax.eval_shape(partial(routing_pass, alone), params, batch)
    placed = manual_specs(param_specs(cfg, shards, is_scanned(cfg, params)))
    run = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(placed, row_spec(shards)),
        out_specs=jax.tree.map(lambda a: route_spec(shards, a.ndim), shapes),
        axis_names=manual_axes(shards),
        check_vma=False,
    )
    return run(params, batch)

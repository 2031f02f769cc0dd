"""The programs that a slice would run, with the shapes and placement of all their arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax import model, parallel
from dsv4_jax.cache import init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import cache_specs, param_specs, shardings
from sharding.rules import RULES
from sharding.shards import Shards

NUM = Numerics("reference", "bfloat16", "pallas")
Tree = Any


class Sizes(NamedTuple):
    """batch: sequences on the whole mesh. context: tokens that each has room for. chunk: new
    tokens per sequence of a prefill step."""

    batch: int
    context: int
    chunk: int


class Program(NamedTuple):
    """A jittable function, its arguments as shapes with placement, and which it may overwrite."""

    run: Callable[..., Any]
    weights: Tree
    cache: Tree
    others: tuple[Any, ...]
    donated: tuple[int, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.weights, self.cache, *self.others)


def placed(shapes: Tree, specs: Tree, shards: Shards) -> Tree:
    """Shapes with their placement."""

    def one(shape: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(one, shapes, shardings(specs, shards))


def weights_of(cfg: ModelConfig, shards: Shards) -> Tree:
    """Shapes of all parameters with their placement. The MTP block counts too."""
    shapes = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    return placed(shapes, param_specs(cfg, shards), shards)


def cache_of(cfg: ModelConfig, sizes: Sizes, shards: Shards, num: Numerics = NUM) -> Tree:
    """Shapes of the state of `sizes.batch` sequences with their placement."""
    make = partial(init_cache, cfg, sizes.batch, sizes.context, num, shards=shards)
    shapes = jax.eval_shape(make)
    return placed(shapes, cache_specs(shapes, shards), shards)


def _step(fresh: int, cfg: ModelConfig, sizes: Sizes, shards: Shards) -> Program:
    def run(params: Tree, cache: Tree, tokens_BT: Any, count_B: Any) -> Any:
        out, cache = parallel.prefill(cfg, NUM, params, tokens_BT, cache, count_B, shards=shards)
        return out.logits, cache

    assert isinstance(shards.mesh, Mesh)
    batch = shards.axes("batch") or None
    here = partial(NamedSharding, shards.mesh)
    others = (
        jax.ShapeDtypeStruct((sizes.batch, fresh), jnp.int32, sharding=here(PartitionSpec(batch))),
        jax.ShapeDtypeStruct((sizes.batch,), jnp.int32, sharding=here(PartitionSpec(batch))),
    )
    weights, cache = weights_of(cfg, shards), cache_of(cfg, sizes, shards)
    return Program(run, weights, cache, others, (1,))


def decode(cfg: ModelConfig, sizes: Sizes, shards: Shards) -> Program:
    """One token per sequence."""
    return _step(1, cfg, sizes, shards)


def prefill(cfg: ModelConfig, sizes: Sizes, shards: Shards) -> Program:
    """A chunk of new tokens per sequence, into a cache that has room for the whole context."""
    return _step(sizes.chunk, cfg, sizes, shards)


class Kind(NamedTuple):
    """build: the program. rules: the table that places its weights."""

    build: Callable[[ModelConfig, Sizes, Shards], Program]
    rules: str


PROGRAMS = {"decode": Kind(decode, "serve"), "prefill": Kind(prefill, "serve")}


def rules_of(program: str) -> Any:
    """The rule table of a program.

    Raises:
        ValueError: no such program.
    """
    if program not in PROGRAMS:
        raise ValueError(f"program {program!r} must be one of {', '.join(PROGRAMS)}")
    return RULES[PROGRAMS[program].rules]

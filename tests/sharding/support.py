"""A small model with every layer kind, and one way to run it on one device or on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dsv4_jax import model, parallel, presets
from dsv4_jax.cache import Cache, init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import cache_specs, param_specs, shardings
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import SERVE, Rules
from sharding.shards import Shards
from tests.model.support import random_units

CFG = presets.tiny().replace(
    dim=64,
    num_layers=2,
    compress_ratios=(4, 16, 0),
    num_heads=8,
    head_dim=16,
    rope_dim=8,
    q_rank=32,
    o_groups=8,
    o_rank=16,
    num_experts=16,
    expert_dim=32,
    window=16,
    index_heads=2,
    index_dim=16,
    index_topk=6,
    hc_iters=3,
    dense_format=None,
)
DEEP = CFG.replace(num_layers=6, compress_ratios=(0, 4, 16, 4, 16, 0, 0))  # with a scan
# Sizes that the attention kernels take.
WIDE = CFG.replace(head_dim=128, index_dim=128, rope_dim=64, num_heads=2, o_groups=2)
PLAIN = Numerics("plain", "float32", "reference")
ROW_BLOCK = 4
CAPACITY = 160
# Lengths that end inside and at the borders of shards (of 64, 32 and 16 tokens), windows and rows.
COUNTS = np.array([128, 113, 1, 65, 64, 16, 33, 97], np.int32)
BATCH, FRESH = len(COUNTS), int(COUNTS.max())


def shards_of(
    mesh: str, rules: Rules = SERVE, exchange: str | None = None, row_block: int = ROW_BLOCK
) -> Shards:
    """Emulated devices as a mesh."""
    shape = MeshShape.parse(mesh)
    devices = jax.devices()[: shape.num_devices]
    return Shards(make_mesh(shape, devices), rules, row_block, exchange)


def placed(tree: Any, where: Any) -> Any:
    """`jax.device_put` that also works where some devices belong to other processes."""

    def one(a: Any, sharding: Any) -> jax.Array:
        if isinstance(a, jax.Array) and not a.is_fully_addressable:
            return a if a.sharding == sharding else jax.device_put(a, sharding)
        values = np.asarray(a)
        return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])

    return jax.tree.map(one, tree, where)


def fetch(a: jax.Array) -> np.ndarray:
    """All of an array, on every process."""
    if a.is_fully_addressable:
        return np.asarray(a)
    return np.asarray(multihost_utils.process_allgather(a, tiled=True))


class Compiled:
    """A function compiled at its first call, without the optimisations that take most of the time.

    Arrays are placed as the program wants them: decoding starts from what prefill left.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.run = fn, None

    def __call__(self, *args: Any) -> Any:
        if self.run is None:
            options = {"xla_backend_optimization_level": 0}
            self.run = jax.jit(self.fn, keep_unused=True).lower(*args).compile(options)
        return self.run(*placed(args, self.run.input_shardings[0]))


@dataclass
class Case:
    """A model's weights, and prompts."""

    cfg: ModelConfig = CFG
    seed: int = 0

    @cached_property
    def params(self) -> Any:
        units = random_units(self.cfg, self.seed)
        return model.group_params(self.cfg, units.__getitem__)

    @cached_property
    def tokens_BT(self) -> jax.Array:
        rng = np.random.default_rng(self.seed)
        return jnp.asarray(rng.integers(0, self.cfg.vocab_size, (BATCH, FRESH)), jnp.int32)

    def run(
        self, shards: Shards, num: Numerics = PLAIN, mtp: bool = True, steps: int = 4
    ) -> tuple[list, Cache]:
        """Logits of the prompts and of the MTP block, greedy tokens and their logits; the cache."""
        cfg, params = self.cfg, self.params
        cache = init_cache(cfg, BATCH, CAPACITY, num, shards=shards)
        functions: Any = model
        more: dict[str, Any] = {}
        if shards.mesh is not None:
            params = placed(params, shardings(param_specs(cfg, shards), shards))
            cache = placed(cache, shardings(cache_specs(cache, shards), shards))
            functions, more = parallel, {"shards": shards}
        prefill = Compiled(partial(functions.prefill, cfg, num, all_logits=True, **more))
        decode = Compiled(partial(functions.decode_step, cfg, num, **more))
        draft = Compiled(partial(functions.draft, cfg, num, **more))
        count_B = jnp.asarray(COUNTS)
        out, cache = prefill(params, self.tokens_BT, cache, count_B)
        whole = fetch(out.logits)
        logits = [whole[row, :n] for row, n in enumerate(COUNTS)]
        if mtp:
            next_BT = jnp.roll(self.tokens_BT, -1, axis=1)
            drafted, cache = draft(params, out.streams_BTMD, next_BT, cache, count_B)
            logits.append(fetch(drafted.logits))
        last = np.stack([part[-1] for part in logits[:BATCH]])
        for _ in range(steps):
            token_B = jnp.asarray(last.argmax(-1), jnp.int32)
            out, cache = decode(params, token_B, cache)
            last = fetch(out.logits)
            logits += [np.asarray(token_B), last]
        return logits, cache


def in_order(cache: Cache, shards: Shards) -> Cache:
    """The cache as one device has it: compressed rows in order, without room added for shards."""
    if (count := shards.count("context")) == 1:
        return cache

    def rows(a: Any) -> np.ndarray:
        blocks = np.asarray(a).reshape(*a.shape[:2], count, -1, shards.row_block, a.shape[3])
        return np.moveaxis(blocks, 2, 3).reshape(*a.shape[:2], -1, a.shape[3])

    def layer(entry: dict[str, Any]) -> dict[str, Any]:
        return {k: jax.tree.map(rows, v) if k in ("rows", "keys") else v for k, v in entry.items()}

    return Cache(
        cache.pos_B,
        [[layer(entry) for entry in group] for group in cache.groups],
        cache.mtp_pos_B,
        [layer(entry) for entry in cache.mtp],
    )


def worst(got: Any, want: Any) -> float:
    """Largest difference ÷ largest value, over all arrays; those of `got` may be longer."""
    found = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        a = a[tuple(slice(n) for n in b.shape)]
        found = max(found, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return found

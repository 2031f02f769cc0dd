"""What fits where, without compiling: bytes and floors from sizes alone, the best of few meshes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from dsv4_jax.cache import init_cache
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.parallel import for_length
from dsv4_jax.params import count_params
from dsv4_jax.placement import cache_specs, explain
from dsv4_jax.preflight.programs import NUM, Sizes, rules_of
from dsv4_jax.preflight.traffic import sent_bytes
from pallas_kernels.aot import CHIPS
from sharding.mesh import MeshShape, MeshSizes, generation, num_chips
from sharding.shards import Shards

# Bytes per second that a device sends over all its links: half of what public tables give for both
# directions. TPU7x: of one of the two devices of a chip.
SENDS = {"v5e": 200e9, "v5p": 600e9, "v6e": 400e9, "TPU7x": 300e9}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16".split()
HEADROOM = 0.92  # of memory, for weights and caches; temporaries and code take the rest
MAX_TENSOR = 16


def devices_of(topology: str) -> int:
    """JAX devices of a slice."""
    return num_chips(topology) * (2 if generation(topology) == "TPU7x" else 1)


def slices_of(kind: str) -> list[str]:
    """Slices of a chip generation, small ones first."""
    return [f"{kind}:{size}" for size in (FLAT if kind in ("v5e", "v6e") else CUBES)]


@dataclass(frozen=True)
class Estimate:
    """Bytes per device and seconds per step that no run can undercut, by resource."""

    mesh: MeshShape
    weights: int
    cache: int
    compute_s: float
    hbm_s: float
    ici_s: float

    @property
    def floor_s(self) -> float:
        return max(self.compute_s, self.hbm_s, self.ici_s)


def weight_bytes(cfg: ModelConfig, shards: Shards) -> int:
    """Of all stored parameters, on one device."""
    return sum(row.device_bytes for row in explain(cfg, shards))


def expert_bytes(cfg: ModelConfig, shards: Shards) -> int:
    """Of the routed experts alone."""
    return sum(row.device_bytes for row in explain(cfg, shards) if "ffn/experts" in row.name)


def cache_bytes(cfg: ModelConfig, sizes: Sizes, shards: Shards) -> int:
    """Of the state of all sequences, on one device."""
    make = partial(init_cache, cfg, sizes.batch, sizes.context, NUM, shards=shards)
    shapes = jax.eval_shape(make)

    def one(shape: Any, spec: Any) -> int:
        return math.prod(shards.local_shape(spec, shape.shape)) * shape.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, shapes, cache_specs(shapes, shards))))


def estimate(cfg: ModelConfig, kind: str, mesh: MeshShape, program: str, sizes: Sizes) -> Estimate:
    """Bytes and floors of one step of a program on a mesh of chips of a generation.

    Compute: operations that every run needs, spread evenly, at bfloat16 peak. HBM: weights of the
    experts in use and of everything else, and all caches, read once. ICI: the formula of `traffic`
    over all links. A prefill chunk stands at the end of its context.

    Raises:
        ValueError: something does not divide.
    """
    fresh = 1 if program == "decode" else sizes.chunk
    shards = for_length(Shards(MeshSizes(mesh), rules_of(program)), fresh)  # type: ignore[arg-type]
    parts = shards.count("batch")
    if sizes.batch % parts:
        raise ValueError(f"a batch of {sizes.batch} does not divide into {parts} parts")
    weights, cache = weight_bytes(cfg, shards), cache_bytes(cfg, sizes, shards)
    sent = sum(sent_bytes(cfg, shards, sizes, fresh).values())
    tokens = sizes.batch * fresh
    operations = tokens * token_flops(cfg, sizes.context) / mesh.num_devices
    chip, experts = CHIPS[kind], expert_bytes(cfg, shards)
    idle = experts * (1 - min(1.0, tokens * cfg.experts_per_token / cfg.num_experts))
    embedding = 2 * cfg.vocab_size * cfg.dim // shards.count("vocab")
    read = weights - idle - embedding + cache
    return Estimate(
        mesh, weights, cache, operations / chip.flops, read / chip.hbm_rate, sent / SENDS[kind]
    )


def token_flops(cfg: ModelConfig, context: int) -> float:
    """Of one token at the end of a context: matrices in use, attention, index scores."""
    heads = 4.0 * cfg.num_heads * cfg.head_dim  # per row that is seen
    total = 2.0 * count_params(cfg).active
    for layer in range(cfg.num_layers):
        ratio, seen = cfg.ratio(layer), min(cfg.window, context)
        if ratio == CSA:
            total += 2.0 * cfg.index_heads * cfg.index_dim * (context // ratio)
            seen += min(cfg.index_topk, context // ratio)
        elif ratio:
            seen += context // ratio
        total += heads * seen
    return total


def candidates(devices: int, batch: int, can_split: bool) -> Iterator[MeshShape]:
    """A few meshes of this many devices: heads over up to 16, batch and experts over the rest.

    Sequences are split only where there are fewer than devices.
    """
    tensor = 1
    while tensor <= min(devices, MAX_TENSOR):
        rest = devices // tensor
        expert = math.gcd(rest, batch)
        yield MeshShape(expert=expert, context=rest // expert, tensor=tensor)
        if can_split and expert > 1:
            yield MeshShape(context=rest, tensor=tensor)
        tensor *= 2


def fits(found: Estimate, kind: str) -> bool:
    return found.weights + found.cache <= HEADROOM * CHIPS[kind].hbm_bytes


def ranked(cfg: ModelConfig, kind: str, devices: int, program: str, sizes: Sizes) -> list[Estimate]:
    """Meshes that divide, those that fit first, then by floor."""
    found = []
    for mesh in candidates(devices, sizes.batch, program != "decode"):
        try:
            found.append(estimate(cfg, kind, mesh, program, sizes))
        except ValueError:  # does not divide: no candidate
            continue
    return sorted(found, key=lambda e: (not fits(e, kind), e.floor_s))


def smallest(
    cfg: ModelConfig, kind: str, program: str, sizes: Sizes
) -> tuple[str, Estimate] | None:
    """The smallest slice of a generation that holds the program, and its best mesh."""
    for topology in slices_of(kind):
        best = ranked(cfg, kind, devices_of(topology), program, sizes)
        if best and fits(best[0], kind):
            return topology, best[0]
    return None

"""The engine's programs: a closed set of shapes over one donated state.

The state holds ring slots (one more than requests: padding goes to the last), a pool of pages
(page 0 is scratch), each slot's last token, and a pool of checkpoints of ring state.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from dsv4_jax import model
from dsv4_jax.cache import Cache, LayerCache, init_paged_cache
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import sample_batch
from dsv4_jax.serving.engine.units import UNIT

Rings = list[dict[str, Any]]


class Sizes(NamedTuple):
    """What is allocated: request slots, pages (scratch included), tokens, checkpoints."""

    slots: int
    pages: int
    page_tokens: int
    max_len: int
    checkpoints: int

    @property
    def table_pages(self) -> int:
        """Entries of a sequence's page table."""
        return -(-self.max_len // self.page_tokens)


@struct.dataclass
class State:
    """Everything that steps change. `last_S`: newest token of each slot, not yet computed."""

    cache: Cache
    last_S: Array
    checkpoints: Rings


class Batch(NamedTuple):
    """Rows of a step as arrays; rows that are not real have `count_B` 0 and the scratch slot."""

    slots_B: Any
    pos_B: Any
    count_B: Any
    table_BP: Any
    keys_B2: Any  # uint32 words of each request's random key
    temperature_B: Any
    top_p_B: Any
    top_k_B: Any


def layers_of(cache: Cache) -> list[LayerCache]:
    """All layer caches, main and MTP, in a fixed order."""
    return [layer for group in cache.groups for layer in group] + cache.mtp


def _rings(layer: LayerCache) -> dict[str, Any]:
    """The ring state that a 128-aligned point needs.

    A compressor without overlap has an empty window there, if its ratio divides the unit.
    """
    kept = {"window": layer["window"]}
    if "ring" in layer:
        ratio = layer["ring"]["values"].shape[2]
        if "keys" in layer or UNIT % ratio:
            kept["ring"] = layer["ring"]
    if "keys" in layer:
        kept["key_ring"] = layer["key_ring"]
    return kept


def init_state(cfg: ModelConfig, num: Numerics, sizes: Sizes, scan: bool = True) -> State:
    """Empty state. Rings need no clearing for new sequences: visibility follows positions."""
    cache = init_paged_cache(cfg, sizes.slots + 1, sizes.pages, sizes.page_tokens, num, scan)

    def pool(a: Array) -> Array:
        return jnp.zeros((a.shape[0], max(sizes.checkpoints, 1), *a.shape[2:]), a.dtype)

    return State(
        cache=cache,
        last_S=jnp.zeros(sizes.slots + 1, jnp.int32),
        checkpoints=[jax.tree.map(pool, _rings(layer)) for layer in layers_of(cache)],
    )


def _view(state: State, batch: Batch) -> Cache:
    return dataclasses.replace(
        state.cache,
        pos_B=batch.pos_B,
        mtp_pos_B=batch.pos_B,
        slots_B=batch.slots_B,
        table_BP=batch.table_BP,
    )


def _sampled(state: State, cache: Cache, logits_BV: Array, batch: Batch, ends_B: Array):
    """Stores and returns each row's new token, and whether its logits were all finite."""
    tokens_B = sample_batch(
        logits_BV,
        jax.random.wrap_key_data(batch.keys_B2),
        ends_B,
        batch.temperature_B,
        batch.top_p_B,
        batch.top_k_B,
    )
    cache = dataclasses.replace(
        cache,
        pos_B=state.cache.pos_B,
        mtp_pos_B=state.cache.mtp_pos_B,
        slots_B=None,
        table_BP=None,
    )
    state = dataclasses.replace(
        state, cache=cache, last_S=state.last_S.at[batch.slots_B].set(tokens_B)
    )
    return state, tokens_B, jnp.isfinite(logits_BV).all(axis=-1)


def decode(cfg: ModelConfig, num: Numerics, params: model.Params, state: State, batch: Batch):
    """Computes each slot's last token at its position and samples the one behind it."""
    cache = _view(state, batch)
    tokens_B = state.last_S[batch.slots_B]
    out, cache = model.decode_step(cfg, num, params, tokens_B, cache, batch.count_B > 0)
    return _sampled(state, cache, out.logits, batch, batch.pos_B + 1)


def prefill(
    cfg: ModelConfig,
    num: Numerics,
    params: model.Params,
    state: State,
    batch: Batch,
    tokens_BT: Array,
):
    """Computes a chunk of each prompt; the token sampled behind it counts at a prompt's end."""
    cache = _view(state, batch)
    out, cache = model.prefill(cfg, num, params, tokens_BT, cache, batch.count_B)
    return _sampled(state, cache, out.logits, batch, batch.pos_B + batch.count_B)


def copy_pages(state: State, sources_K: Array, targets_K: Array) -> State:
    """Copies whole pages, reading all sources before writing."""

    def copied(layer: LayerCache) -> LayerCache:
        pools = {name: layer[name] for name in ("rows", "keys") if name in layer}
        pools = jax.tree.map(lambda a: a.at[:, targets_K].set(a[:, sources_K]), pools)
        return layer | pools

    return _with_layers(state, [copied(layer) for layer in layers_of(state.cache)])


def save_rings(state: State, slot: Array, handle: Array) -> State:
    """Copies a slot's ring state into the checkpoint pool."""
    saved = [
        jax.tree.map(lambda pool, a: pool.at[:, handle].set(a[:, slot]), pool, _rings(layer))
        for pool, layer in zip(state.checkpoints, layers_of(state.cache), strict=True)
    ]
    return dataclasses.replace(state, checkpoints=saved)


def load_rings(state: State, slot: Array, handle: Array) -> State:
    """Copies a checkpoint into a slot's rings."""
    layers = [
        layer
        | jax.tree.map(lambda pool, a: a.at[:, slot].set(pool[:, handle]), pool, _rings(layer))
        for pool, layer in zip(state.checkpoints, layers_of(state.cache), strict=True)
    ]
    return _with_layers(state, layers)


def _with_layers(state: State, layers: list[LayerCache]) -> State:
    groups, rest = [], list(layers)
    for group in state.cache.groups:
        groups.append(rest[: len(group)])
        rest = rest[len(group) :]
    return dataclasses.replace(
        state, cache=dataclasses.replace(state.cache, groups=groups, mtp=rest)
    )


class Programs:
    """The jitted programs of one model and one set of sizes."""

    def __init__(self, cfg: ModelConfig, num: Numerics, params: model.Params, sizes: Sizes) -> None:
        self.sizes = sizes
        self.params = params
        self.init = partial(init_state, cfg, num, sizes, model.is_scanned(cfg, params))
        self.decode = jax.jit(partial(decode, cfg, num), donate_argnums=1)
        self.prefill = jax.jit(partial(prefill, cfg, num), donate_argnums=1)
        self.copy_pages = jax.jit(copy_pages, donate_argnums=0)
        self.save_rings = jax.jit(save_rings, donate_argnums=0)
        self.load_rings = jax.jit(load_rings, donate_argnums=0)

    def empty_batch(self, size: int) -> Batch:
        """`size` padding rows, as numpy arrays to be filled in."""
        sizes = self.sizes
        return Batch(
            slots_B=np.full(size, sizes.slots, np.int32),
            pos_B=np.zeros(size, np.int32),
            count_B=np.zeros(size, np.int32),
            table_BP=np.zeros((size, sizes.table_pages), np.int32),
            keys_B2=np.zeros((size, 2), np.uint32),
            temperature_B=np.zeros(size, np.float32),
            top_p_B=np.ones(size, np.float32),
            top_k_B=np.zeros(size, np.int32),
        )


class Memory(NamedTuple):
    """Bytes on the device, by use."""

    weights: int
    slots: int
    pages: int
    checkpoints: int


def memory(cfg: ModelConfig, num: Numerics, params: Any, sizes: Sizes) -> Memory:
    """What a configuration takes, without allocating it. Temporaries are not included."""

    def total(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in leaves)

    state = jax.eval_shape(partial(init_state, cfg, num, sizes))
    layers = layers_of(state.cache)
    pages = total([[layer.get("rows"), layer.get("keys")] for layer in layers])
    return Memory(total(params), total(layers) - pages, pages, total(state.checkpoints))


assert CSA and UNIT % CSA == 0, "checkpoints stand at ends of CSA windows"

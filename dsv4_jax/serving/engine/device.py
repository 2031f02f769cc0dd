"""What the engine keeps on the device, and how slots, pages and checkpoints are copied.

The state holds ring slots (one more than requests: padding goes to the last), a pool of pages
(page 0 is scratch), each slot's last token and what it said before, and a pool of checkpoints of
ring state.
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

from dsv4_jax.cache import Cache, LayerCache, init_paged_cache, page_unit
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.decoded import weight_bytes
from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import explain
from dsv4_jax.sampling import Knobs, Logprobs
from dsv4_jax.serving.engine.units import UNIT
from dsv4_jax.speculation import Guesses, check_rings
from sharding.shards import SINGLE, Shards

Rings = list[dict[str, Any]]
POOLS = ("rows", "keys")  # of a layer, in pages; the rest belongs to slots
FAILED = -1  # stands for a token whose logits were not finite


class Sizes(NamedTuple):
    """What is allocated: request slots, pages (scratch included), tokens, checkpoints.

    guesses: tokens that the MTP block guesses ahead; 0 never runs it. rejects: whether guesses are
    judged by rejection, for which their distributions are kept. burst: steps that one call of the
    decoding program may run.
    """

    slots: int
    pages: int
    page_tokens: int
    max_len: int
    checkpoints: int
    guesses: int = 0
    rejects: bool = False
    burst: int = 1

    @property
    def table_pages(self) -> int:
        """Entries of a sequence's page table."""
        return -(-self.max_len // self.page_tokens)


@struct.dataclass
class State:
    """Everything that steps change.

    last_S: newest token of each slot, not yet computed. pos_S: its position, once a slot decodes.
    guesses: of each slot, for the tokens behind the newest: int32 `[S, K]` and float32 `[S, K, V]`.
    uses_SV: what penalties read, see `sampling.count_uses`; true only of slots whose requests
    penalize.
    """

    cache: Cache
    last_S: Array
    pos_S: Array
    guesses: Guesses
    uses_SV: Array
    checkpoints: Rings


class Batch(NamedTuple):
    """Rows of a step. Rows that are not real have count 0 and the scratch slot.

    rows_B3, int32. Of prompts: position, tokens computed, and whether the token behind them counts.
    Of rows that decode: the position in front of which they stop, 1, 1; where they stand is in the
    state. words_BW: masks of the tokens that may be drawn, uint32. The rest stays the same while
    the rows do.
    """

    rows_B3: Any
    slots_B: Any
    table_BP: Any
    knobs: Knobs
    words_BW: Any


class Prompt(NamedTuple):
    """Tokens of prompts; of rows with `scored_B`, targets_BT are judged (each the token behind).

    behind_B: the token behind the last one, where it is not to be drawn.
    """

    tokens_BT: Any
    targets_BT: Any
    scored_B: Any
    behind_B: Any


class Sampled(NamedTuple):
    """What a step drew: int32 ids, `FAILED`, or `EMPTY` behind the last.

    Log-probabilities are 0 unless a row wants them.
    """

    tokens_BT: Array
    logprobs: Logprobs


def layers_of(cache: Cache) -> list[LayerCache]:
    """All layer caches, main and MTP, in a fixed order."""
    return [layer for group in cache.groups for layer in group] + cache.mtp


def ring_state(layer: LayerCache) -> dict[str, Any]:
    """What a slot holds of a layer."""
    return {name: part for name, part in layer.items() if name not in POOLS}


def _aligned(layer: LayerCache) -> dict[str, Any]:
    """The ring state that a 128-aligned point needs.

    A compressor without overlap has an empty window there.
    """
    kept = ring_state(layer)
    if "keys" not in layer:
        kept.pop("ring", None)
    return kept


def init_state(cfg: ModelConfig, num: Numerics, sizes: Sizes, scan: bool = True) -> State:
    """Empty state. Rings need no clearing for new sequences: visibility follows positions."""
    assert UNIT % page_unit(cfg) == 0, "checkpoints stand at ends of all windows"
    slots, guesses = sizes.slots + 1, sizes.guesses
    cache = init_paged_cache(cfg, slots, sizes.pages, sizes.page_tokens, num, scan, spare=guesses)
    check_rings(cfg, cache, guesses)
    size = slots, guesses, cfg.vocab_size
    chances = jnp.full(size, 1 / cfg.vocab_size, jnp.float32) if sizes.rejects else None

    def pool(a: Array) -> Array:
        return jnp.zeros((a.shape[0], max(sizes.checkpoints, 1), *a.shape[2:]), a.dtype)

    return State(
        cache=cache,
        last_S=jnp.zeros(slots, jnp.int32),
        pos_S=jnp.zeros(slots, jnp.int32),
        guesses=Guesses(jnp.zeros((slots, guesses), jnp.int32), chances),
        uses_SV=jnp.zeros((slots, cfg.vocab_size), jnp.int32),
        checkpoints=[jax.tree.map(pool, _aligned(layer)) for layer in layers_of(cache)],
    )


def start_slot(state: State, slot: Array, last: Array, position: Array) -> State:
    """Sets a slot's last token and where it stands."""
    return dataclasses.replace(
        state, last_S=state.last_S.at[slot].set(last), pos_S=state.pos_S.at[slot].set(position)
    )


def set_uses(state: State, slot: Array, uses_V: Array) -> State:
    """Sets what a slot's penalties count from."""
    return dataclasses.replace(state, uses_SV=state.uses_SV.at[slot].set(uses_V))


def copy_pages(state: State, sources_K: Array, targets_K: Array) -> State:
    """Copies whole pages, reading all sources before writing."""
    return write_pages(state, targets_K, read_pages(state, sources_K))


def read_pages(state: State, pages_K: Array) -> Rings:
    """The rows of pages, by layer: `[repeats, K, ...]`."""
    return [
        {
            name: jax.tree.map(lambda a: a[:, pages_K], layer[name])
            for name in POOLS
            if name in layer
        }
        for layer in layers_of(state.cache)
    ]


def write_pages(state: State, pages_K: Array, rows: Rings) -> State:
    """Puts back what `read_pages` returned, into any pages."""

    def put(pool: Array, new: Array) -> Array:
        return pool.at[:, pages_K].set(new)

    layers = [
        layer | {name: jax.tree.map(put, layer[name], part) for name, part in new.items()}
        for layer, new in zip(layers_of(state.cache), rows, strict=True)
    ]
    return _with_layers(state, layers)


def read_slot(state: State, slot: Array) -> Rings:
    """The whole ring state of a slot, wherever it stands."""
    return [jax.tree.map(lambda a: a[:, slot], ring_state(x)) for x in layers_of(state.cache)]


def write_slot(state: State, slot: Array, rings: Rings) -> State:
    """Puts ring state into a slot: what `read_slot` or `read_checkpoint` returned."""
    layers = [
        layer | {name: _put(layer[name], slot, part) for name, part in new.items()}
        for layer, new in zip(layers_of(state.cache), rings, strict=True)
    ]
    return _with_layers(state, layers)


def read_checkpoint(state: State, handle: Array) -> Rings:
    """A checkpoint of the pool."""
    return jax.tree.map(lambda a: a[:, handle], state.checkpoints)


def write_checkpoint(state: State, handle: Array, rings: Rings) -> State:
    """Puts a checkpoint into the pool."""
    return dataclasses.replace(state, checkpoints=_put(state.checkpoints, handle, rings))


def save_rings(state: State, slot: Array, handle: Array) -> State:
    """Copies a slot's ring state into the checkpoint pool."""
    rings = [jax.tree.map(lambda a: a[:, slot], _aligned(x)) for x in layers_of(state.cache)]
    return write_checkpoint(state, handle, rings)


def load_rings(state: State, slot: Array, handle: Array) -> State:
    """Copies a checkpoint into a slot's rings."""
    return write_slot(state, slot, read_checkpoint(state, handle))


def _put(pool: Any, index: Array, new: Any) -> Any:
    return jax.tree.map(lambda a, x: a.at[:, index].set(x), pool, new)


def _with_layers(state: State, layers: list[LayerCache]) -> State:
    groups, rest = [], list(layers)
    for group in state.cache.groups:
        groups.append(rest[: len(group)])
        rest = rest[len(group) :]
    return dataclasses.replace(
        state, cache=dataclasses.replace(state.cache, groups=groups, mtp=rest)
    )


class Memory(NamedTuple):
    """Bytes on each device, by use."""

    weights: int
    slots: int
    pages: int
    checkpoints: int


def memory(
    cfg: ModelConfig, num: Numerics, sizes: Sizes, shards: Shards = SINGLE, decoded: bool = False
) -> Memory:
    """What a configuration takes on each device, without allocating it, temporaries aside.

    decoded: weights are decoded once; then there is one device.
    """
    state = jax.eval_shape(partial(init_state, cfg, num, sizes))
    layers = layers_of(state.cache)
    pages = bytes_of([[layer.get(name) for name in POOLS] for layer in layers])
    slots = bytes_of(layers) - pages + bytes_of((state.uses_SV, state.guesses))
    stored = sum(row.device_bytes for row in explain(cfg, shards))
    weights = weight_bytes(cfg) if decoded else stored
    return Memory(weights, slots, pages, bytes_of(state.checkpoints))


def bytes_of(tree: Any) -> int:
    """Size of all arrays of a tree, abstract ones too."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in leaves)


assert CSA and UNIT % CSA == 0, "checkpoints stand at ends of CSA windows"

"""The engine's programs: a closed set of shapes over one donated state.

The state holds ring slots (one more than requests: padding goes to the last), a pool of pages
(page 0 is scratch), each slot's last token and what it said before, and a pool of checkpoints of
ring state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax import model, parallel
from dsv4_jax.cache import Cache, LayerCache, init_paged_cache
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import explain
from dsv4_jax.sampling import Knobs, Logprobs, logprobs_of, no_logprobs, sample_rows
from dsv4_jax.serving.engine.units import UNIT
from sharding.shards import SINGLE, Shards

Rings = list[dict[str, Any]]
POOLS = ("rows", "keys")  # of a layer, in pages; the rest belongs to slots
SCORE_BLOCK = 32  # positions whose logits exist at a time when a prompt is scored
FAILED = -1  # stands for a token whose logits were not finite


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
    """Everything that steps change.

    last_S: newest token of each slot, not yet computed. uses_SV: what penalties read, see
    `sampling.count_uses`; true only of slots whose requests penalize.
    """

    cache: Cache
    last_S: Array
    uses_SV: Array
    checkpoints: Rings


class Batch(NamedTuple):
    """Rows of a step. Rows that are not real have count 0 and the scratch slot.

    rows_B3: int32 position, tokens computed, and whether the token behind them counts. words_BW:
    masks of the tokens that may be drawn, uint32. The rest stays the same while the rows do.
    """

    rows_B3: Any
    slots_B: Any
    table_BP: Any
    knobs: Knobs
    words_BW: Any


class Prompt(NamedTuple):
    """Tokens of prompts; of rows with `scored_B`, targets_BT are judged (each the token behind)."""

    tokens_BT: Any
    targets_BT: Any
    scored_B: Any


class Sampled(NamedTuple):
    """What a step drew: int32 ids or `FAILED`; log-probabilities are 0 unless a row wants them."""

    tokens_B: Array
    logprobs: Logprobs


def layers_of(cache: Cache) -> list[LayerCache]:
    """All layer caches, main and MTP, in a fixed order."""
    return [layer for group in cache.groups for layer in group] + cache.mtp


def ring_state(layer: LayerCache) -> dict[str, Any]:
    """What a slot holds of a layer."""
    return {name: part for name, part in layer.items() if name not in POOLS}


def _aligned(layer: LayerCache) -> dict[str, Any]:
    """The ring state that a 128-aligned point needs.

    A compressor without overlap has an empty window there, if its ratio divides the unit.
    """
    kept = ring_state(layer)
    if "ring" in kept and "keys" not in layer and UNIT % layer["ring"]["values"].shape[2] == 0:
        del kept["ring"]
    return kept


def init_state(cfg: ModelConfig, num: Numerics, sizes: Sizes, scan: bool = True) -> State:
    """Empty state. Rings need no clearing for new sequences: visibility follows positions."""
    cache = init_paged_cache(cfg, sizes.slots + 1, sizes.pages, sizes.page_tokens, num, scan)

    def pool(a: Array) -> Array:
        return jnp.zeros((a.shape[0], max(sizes.checkpoints, 1), *a.shape[2:]), a.dtype)

    return State(
        cache=cache,
        last_S=jnp.zeros(sizes.slots + 1, jnp.int32),
        uses_SV=jnp.zeros((sizes.slots + 1, cfg.vocab_size), jnp.int32),
        checkpoints=[jax.tree.map(pool, _aligned(layer)) for layer in layers_of(cache)],
    )


def _view(state: State, batch: Batch) -> Cache:
    return dataclasses.replace(
        state.cache,
        pos_B=batch.rows_B3[:, 0],
        mtp_pos_B=batch.rows_B3[:, 0],
        slots_B=batch.slots_B,
        table_BP=batch.table_BP,
    )


def _sampled(
    state: State, cache: Cache, logits_BV: Array, batch: Batch, shards: Shards
) -> tuple[State, Sampled]:
    """Draws each row's next token and stores it in the row's slot."""
    if isinstance(shards.mesh, Mesh):  # every device draws the same from whole rows
        whole = NamedSharding(shards.mesh, PartitionSpec())
        logits_BV = lax.with_sharding_constraint(logits_BV, whole)
    pos_B, count_B, samples_B = batch.rows_B3.T
    slots_B, knobs = batch.slots_B, batch.knobs
    tokens_B = sample_rows(
        logits_BV, pos_B + count_B, knobs, batch.words_BW, state.uses_SV, slots_B
    )
    logprobs = lax.cond(
        knobs.wants_logprobs_B.any(),
        logprobs_of,
        lambda logits, tokens: no_logprobs(tokens.shape, logits.shape[1]),
        logits_BV,
        tokens_B,
    )
    cache = dataclasses.replace(
        cache,
        pos_B=state.cache.pos_B,
        mtp_pos_B=state.cache.mtp_pos_B,
        slots_B=None,
        table_BP=None,
    )
    state = dataclasses.replace(
        state,
        cache=cache,
        last_S=state.last_S.at[slots_B].set(tokens_B),
        uses_SV=state.uses_SV.at[slots_B, tokens_B].add(2 * samples_B),
    )
    finite_B = jnp.isfinite(logits_BV).all(axis=-1)
    return state, Sampled(jnp.where(finite_B, tokens_B, FAILED), logprobs)


def decode(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    state: State,
    batch: Batch,
) -> tuple[State, Sampled]:
    """Computes each slot's last token at its position and samples the one behind it."""
    cache, is_real_B = _view(state, batch), batch.rows_B3[:, 1] > 0
    tokens_B = state.last_S[batch.slots_B]
    out, cache = parallel.decode_step(cfg, num, params, tokens_B, cache, is_real_B, shards=shards)
    return _sampled(state, cache, out.logits, batch, shards)


def prefill(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    state: State,
    batch: Batch,
    prompt: Prompt,
) -> tuple[State, Sampled, Logprobs]:
    """Computes a chunk of each prompt; the token sampled behind it counts at a prompt's end."""
    cache = _view(state, batch)
    out, cache = parallel.prefill(
        cfg, num, params, prompt.tokens_BT, cache, batch.rows_B3[:, 1], shards=shards
    )
    scores = lax.cond(
        prompt.scored_B.any(),
        partial(_score, cfg, num, shards),
        lambda _, streams, targets: no_logprobs(targets.shape, cfg.vocab_size),
        params,
        out.streams_BTMD,
        prompt.targets_BT,
    )
    return *_sampled(state, cache, out.logits, batch, shards), scores


def _score(
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
    params: model.Params,
    streams_BTMD: Array,
    targets_BT: Array,
) -> Logprobs:
    """Log-probabilities at every position, with the logits of one block there at a time."""
    batch, length = targets_BT.shape
    blocks = length // SCORE_BLOCK

    def one(block: Array) -> Logprobs:
        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, block * SCORE_BLOCK, SCORE_BLOCK, axis=1)

        logits = parallel.logits_of(cfg, num, params, cut(streams_BTMD), shards=shards)
        return logprobs_of(logits, cut(targets_BT))

    def joined(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(batch, length, *a.shape[3:])

    return jax.tree.map(joined, lax.map(one, jnp.arange(blocks)))


def start_slot(state: State, slot: Array, last: Array) -> State:
    """Sets a slot's last token."""
    return dataclasses.replace(state, last_S=state.last_S.at[slot].set(last))


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


def _light(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program of a step without the checkpoints: what it does not touch costs time per call."""

    def run(params: model.Params, state: State, *rest: Any) -> Any:
        changed, *results = program(params, dataclasses.replace(state, checkpoints=[]), *rest)
        return dataclasses.replace(changed, checkpoints=state.checkpoints), *results

    return run


class Programs:
    """The jitted programs of one model and one set of sizes.

    Over a mesh every device holds the whole state and sees all rows; only weights are split.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num: Numerics,
        params: model.Params,
        sizes: Sizes,
        shards: Shards = SINGLE,
    ) -> None:
        self.sizes = sizes
        self.vocab_size = cfg.vocab_size
        self.params = params
        # Results of programs are bound to where they lie. A state that is not would be another
        # signature, and the first program of the warm-up be compiled again for the first request.
        # Host arrays are not bound to a single device, whether they are put there or not.
        self._home: Any = next(iter(jax.tree.leaves(params)[0].devices()))
        if isinstance(shards.mesh, Mesh):
            self._home = NamedSharding(shards.mesh, PartitionSpec())
        self._init = self._jit(partial(init_state, cfg, num, sizes, model.is_scanned(cfg, params)))
        self.decode = _light(self._jit(partial(decode, cfg, num, shards), 1))
        self.prefill = _light(self._jit(partial(prefill, cfg, num, shards), 1))
        self.start_slot = self._jit(start_slot, 0)
        self.set_uses = self._jit(set_uses, 0)
        self.copy_pages = self._jit(copy_pages, 0)
        self.read_pages = self._jit(read_pages)
        self.write_pages = self._jit(write_pages, 0)
        self.read_slot = self._jit(read_slot)
        self.write_slot = self._jit(write_slot, 0)
        self.read_checkpoint = self._jit(read_checkpoint)
        self.write_checkpoint = self._jit(write_checkpoint, 0)
        self.save_rings = self._jit(save_rings, 0)
        self.load_rings = self._jit(load_rings, 0)

    def init(self) -> State:
        """The empty state, where the programs keep it."""
        return jax.device_put(self._init(), self._home)

    def _jit(self, fn: Callable[..., Any], *donated: int) -> Callable[..., Any]:
        if not isinstance(self._home, NamedSharding):
            return jax.jit(fn, donate_argnums=donated)
        program = jax.jit(fn, donate_argnums=donated, out_shardings=self._home)

        def run(*args: Any) -> Any:
            """Host arrays are placed first: else they would be another signature."""
            return program(*jax.tree.map(lambda a: a if _is_placed(a) else self.put(a), args))

        return run

    def put(self, tree: Any) -> Any:
        """Host arrays where the programs want them; of several processes, each brings the same."""
        where = self._home
        if not isinstance(where, NamedSharding):
            return jax.device_put(tree)
        if where.is_fully_addressable:
            return jax.device_put(tree, where)

        def everywhere(a: Any) -> Array:
            values = np.asarray(a)
            return jax.make_array_from_callback(values.shape, where, lambda at: values[at])

        return jax.tree.map(lambda a: a if _is_placed(a) else everywhere(a), tree)

    def tie(self, owner: Any, tree: Any) -> None:
        """What was read, `tree`, is needed as long as `owner` lives: see `mirror.Mirror`."""


def _is_placed(a: Any) -> bool:
    return isinstance(a, jax.Array)


class Memory(NamedTuple):
    """Bytes on each device, by use."""

    weights: int
    slots: int
    pages: int
    checkpoints: int


def memory(cfg: ModelConfig, num: Numerics, sizes: Sizes, shards: Shards = SINGLE) -> Memory:
    """What a configuration takes on each device, without allocating it, temporaries aside."""
    state = jax.eval_shape(partial(init_state, cfg, num, sizes))
    layers = layers_of(state.cache)
    pages = bytes_of([[layer.get(name) for name in POOLS] for layer in layers])
    slots = bytes_of(layers) - pages + bytes_of(state.uses_SV)
    weights = sum(row.device_bytes for row in explain(cfg, shards))
    return Memory(weights, slots, pages, bytes_of(state.checkpoints))


def bytes_of(tree: Any) -> int:
    """Size of all arrays of a tree, abstract ones too."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in leaves)


assert CSA and UNIT % CSA == 0, "checkpoints stand at ends of CSA windows"

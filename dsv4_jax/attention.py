"""V4 attention: low-rank queries, one shared key/value row per token, and up to three memories.

Every layer sees a sliding window. HCA layers also see all completed compressed rows; CSA layers see
the ones their indexer selects. A chunk of T new tokens from any position goes through one path.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from dsv4_jax import attend, context, indexer, kernels
from dsv4_jax import cache as store
from dsv4_jax.compress import Chunk, compress
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.norm import head_norm, rms_norm
from dsv4_jax.numerics import Numerics, fp8_matmul, linear, linear_over, matmul_each
from dsv4_jax.params import attention_specs, declare
from dsv4_jax.quant import KV_BLOCK, DecodedWeight, dequantize, fake_fp4, fake_fp8, hadamard
from dsv4_jax.rope import Rotation, frequencies, rotate
from sharding.shards import SINGLE, Shards

QUERY_TILE = 128  # queries that attend together; bounds the score arrays
FEW_QUERIES = 8  # of a sequence that decodes: each adds up its rows in an order of its own
DENSE_FACTOR = 16  # up to K times this many visible rows, CSA masks instead of gathering


class Attention(nn.Module):
    """Attention of one layer; `ratio` decides which memories it has."""

    cfg: ModelConfig
    num: Numerics
    ratio: int
    shards: Shards = SINGLE

    def setup(self) -> None:
        specs = attention_specs(self.cfg, self.ratio)
        self.weights: dict[str, Any] = declare(self, self.cfg, specs, self.shards)

    def __call__(
        self, x_BTD: Array, chunk: Chunk, cache: store.LayerCache, index: Array
    ) -> tuple[Array, store.LayerCache]:
        turn = chunk.rope_rows if self.ratio else chunk.rope_window
        q_BTNH, latent_BTQ = self._queries(x_BTD, turn)
        cache = dict(cache)
        window, cache["window"] = self._push(x_BTD, chunk, cache, index)
        query = None
        if self.ratio:
            self._compress_rows(x_BTD, chunk, cache, index)
        if self.ratio == CSA:
            query = self._index_query(x_BTD, latent_BTQ, turn)
            self._compress_keys(x_BTD, chunk, cache, index)
        out_BTNH = self._attend(q_BTNH, window, chunk, cache, index, query, turn)
        return self._project(out_BTNH), cache

    def remember(
        self, x_BTD: Array, chunk: Chunk, cache: store.LayerCache, index: Array
    ) -> store.LayerCache:
        """The cache with the tokens in it, of a layer that has a window only."""
        assert not self.ratio, "other memories are not filled"
        return cache | {"window": self._push(x_BTD, chunk, cache, index)[1]}

    def recall(self, x_B1D: Array, chunk: Chunk, cache: store.LayerCache, index: Array) -> Array:
        """The output of each sequence's newest token, which `remember` has put into the cache."""
        turn, num = chunk.rope_window, self.num
        rows_BSH = store.ring_rows(cache["window"], chunk.place(index), num.jnp_dtype)
        positions_BS = store.ring_positions(cache["window"], chunk.pos_B)
        window = Window(rows_BSH, positions_BS, is_ring=True)
        q_B1NH = self._queries(x_B1D, turn)[0]
        return self._project(self._attend(q_B1NH, window, chunk, cache, index, None, turn))

    def _queries(self, x_BTD: Array, turn: Rotation) -> tuple[Array, Array]:
        """Heads of this device, normed and turned, and the latents they come from."""
        cfg, num, w = self.cfg, self.num, self.weights
        latent_BTQ = rms_norm(linear(x_BTD, w["wq_a"], num), w["q_norm"], cfg.norm_eps, num)
        q_BTx = linear(latent_BTQ, w["wq_b"], num)
        if num.matrix_kernels:
            return kernels.query_heads(q_BTx, turn, cfg, num), latent_BTQ
        q_BTNH = q_BTx.reshape(*q_BTx.shape[:2], -1, cfg.head_dim)
        return rotate(head_norm(q_BTNH, cfg.norm_eps, num), per_head(turn), num), latent_BTQ

    def _push(
        self, x_BTD: Array, chunk: Chunk, cache: store.LayerCache, index: Array
    ) -> tuple[Window, store.Rows]:
        """The window that the tokens see, themselves included, and the advanced ring."""
        cfg, num, w = self.cfg, self.num, self.weights
        turn = chunk.rope_rows if self.ratio else chunk.rope_window
        kv_BTH = rms_norm(linear(x_BTD, w["wkv"], num), w["kv_norm"], cfg.norm_eps, num)
        kv_BTH = round_rows(rotate(kv_BTH, turn, num), cfg, num)
        return _extend_window(cache["window"], kv_BTH, index, chunk, cfg, num, self.shards)

    def _attend(
        self,
        q_BTNH: Array,
        window: Window,
        chunk: Chunk,
        cache: store.LayerCache,
        index: Array,
        query: indexer.IndexQuery | None,
        turn: Rotation,
    ) -> Array:
        """Attention output, turned back."""
        cfg, num, sink_N, shards = self.cfg, self.num, self.weights["sink"], self.shards
        if shards.count("context") > 1 and not shards.split:
            return self._attend_shared(q_BTNH, window, chunk, cache, index, query, turn)
        cache, index = context.local_cache(cache, index, shards)
        if num.kernels:
            recent_BSH = None if window.is_ring else window.rows_BSH
            args = (chunk, cache, index, query, self.ratio, turn, cfg, num)
            try:
                return kernels.attend(q_BTNH, recent_BSH, sink_N, *args)
            except NotImplementedError:
                if num.implementation is not None:
                    raise
        args = (chunk, cache, index, query, self.ratio, cfg, num)
        out_BTNH = attend_chunk(q_BTNH, window, sink_N, *args)
        return rotate(out_BTNH, per_head(turn), num, inverse=True)

    def _attend_shared(
        self,
        q_BTNH: Array,
        window: Window,
        chunk: Chunk,
        cache: store.LayerCache,
        index: Array,
        query: indexer.IndexQuery | None,
        turn: Rotation,
    ) -> Array:
        """Attention output of tokens that every shard of a context has, turned back."""
        cfg, num, shards, sink_N = self.cfg, self.num, self.shards, self.weights["sink"]
        if num.kernels:
            recent_BSH = None if window.is_ring else window.rows_BSH
            args = (chunk, cache, index, query, self.ratio, turn, cfg, num, shards)
            return kernels.attend_shared(q_BTNH, recent_BSH, sink_N, *args)
        args = (chunk, cache, index, query, self.ratio, cfg, num, shards)
        out_BTNH = attend_shared(q_BTNH, window, sink_N, *args)
        return rotate(out_BTNH, per_head(turn), num, inverse=True)

    def _compress_rows(
        self, x_BTD: Array, chunk: Chunk, cache: store.LayerCache, index: Array
    ) -> None:
        weights, cfg, num = self.weights["compressor"], self.cfg, self.num
        freqs = frequencies(cfg, compressed=True)
        new, cache["ring"] = compress(
            weights, x_BTD, cache["ring"], index, chunk, self.num, cfg.norm_eps, freqs, self.shards
        )
        new = context.own_rows(new, chunk, self.ratio, x_BTD.shape[1], self.shards)
        rows = round_rows(new.rows_BCH, cfg, self.num)
        place = chunk.place(index)
        cache["rows"] = store.write_rows(
            cache["rows"], place, new.first_B, new.count_B, rows, num.kernels, self._every(x_BTD)
        )

    def _compress_keys(
        self, x_BTD: Array, chunk: Chunk, cache: store.LayerCache, index: Array
    ) -> None:
        weights, cfg, num = self.weights["indexer"]["compressor"], self.cfg, self.num
        freqs = frequencies(cfg, compressed=True)
        state, shards = cache["key_ring"], self.shards
        new, cache["key_ring"] = compress(
            weights, x_BTD, state, index, chunk, self.num, cfg.norm_eps, freqs, shards
        )
        new = context.own_rows(new, chunk, self.ratio, x_BTD.shape[1], shards)
        keys = round_index(new.rows_BCH, self.num)
        place = chunk.place(index)
        cache["keys"] = store.write_rows(
            cache["keys"], place, new.first_B, new.count_B, keys, num.kernels, self._every(x_BTD)
        )

    def _every(self, x_BTD: Array) -> int:
        """Of single tokens, one in so many completes a row."""
        return self.ratio if x_BTD.shape[1] == 1 else 1

    def _index_query(self, x_BTD: Array, latent_BTQ: Array, turn: Rotation) -> indexer.IndexQuery:
        cfg, num, w = self.cfg, self.num, self.weights["indexer"]
        q_BTy = linear(latent_BTQ, w["wq_b"], num)
        q_BTIJ = q_BTy.reshape(*q_BTy.shape[:2], cfg.index_heads, cfg.index_dim)
        q_BTIJ = round_index(rotate(q_BTIJ, per_head(turn), num), num)
        scale = cfg.index_dim**-0.5 * cfg.index_heads**-0.5
        w_BTI = num.cast(linear(x_BTD, w["weights_proj"], num).astype(jnp.float32) * scale)
        return indexer.IndexQuery(q_BTIJ, w_BTI)

    def _project(self, out_BTNH: Array) -> Array:
        """Grouped low-rank output: consecutive heads form a group with its own slice of wo_a."""
        cfg, num = self.cfg, self.num
        wo_a = self.weights["wo_a"]
        if num.matrix_kernels and not isinstance(wo_a, Array | DecodedWeight):
            out_BTx = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
            groups = wo_a.shape[0] // cfg.o_rank
            low_BTz = fp8_matmul(out_BTx, wo_a, num, rounded=False, groups=groups)
            return linear_over(low_BTz, self.weights["wo_b"], num, self.shards, "o_groups")
        out_BTGg = out_BTNH.reshape(*out_BTNH.shape[:2], -1, cfg.group_dim)
        # the official code never rounds the activations in front of wo_a
        work = jnp.dtype(jnp.float32) if isinstance(wo_a, DecodedWeight) else num.jnp_dtype
        wo_a_GOg = dequantize(wo_a, work).reshape(-1, cfg.o_rank, cfg.group_dim)
        low_BTGO = matmul_each(out_BTGg.astype(work), wo_a_GOg)
        low_BTz = num.cast(low_BTGO).reshape(*out_BTNH.shape[:2], -1)
        return linear_over(low_BTz, self.weights["wo_b"], num, self.shards, "o_groups")


def per_head(turn: Rotation) -> Rotation:
    """The same rotation for every head: `[B, T, 1, R/2]`."""
    return Rotation(turn.cos[:, :, None], turn.sin[:, :, None])


def round_rows(rows: Array, cfg: ModelConfig, num: Numerics) -> Array:
    """FP8 rounding of the non-rotary channels of KV rows, in reference mode."""
    if not num.rounds:
        return rows
    still = cfg.head_dim - cfg.rope_dim
    return jnp.concatenate([fake_fp8(rows[..., :still], KV_BLOCK), rows[..., still:]], axis=-1)


def round_index(x: Array, num: Numerics) -> Array:
    """Hadamard rotation and FP4 rounding of index queries and keys, in reference mode.

    Without rounding the rotation cancels in the dot product, so plain mode leaves it out.
    """
    return fake_fp4(num.cast(hadamard(x))) if num.rounds else x


class Window(NamedTuple):
    """Rows around a chunk's queries and their positions; negative where there is no row.

    is_ring: they are the ring with the chunk in it, as it lies.
    """

    rows_BSH: Array
    position_BS: Array
    is_ring: bool = False


def _extend_window(
    ring: store.Rows,
    kv_BTH: Array,
    index: Array,
    chunk: Chunk,
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards = SINGLE,
) -> tuple[Window, store.Rows]:
    """The window in front of the chunk followed by the chunk's rows, and the advanced ring.

    Of a token, or as many as the ring has room for beside the window, it is the advanced ring as it
    lies: nothing is moved, and a row's place depends on its position alone.
    """
    length, fresh = store.num_rows(ring), kv_BTH.shape[1]
    place, pos_B, count_B = chunk.place(index), chunk.pos_B, chunk.count_B
    if store.can_push(ring, fresh, cfg.window) and not shards.split:
        ring = store.ring_push(ring, place, pos_B, count_B, kv_BTH, num.kernels)
        rows_BSH = store.ring_rows(ring, place, num.jnp_dtype)
        return Window(rows_BSH, store.ring_positions(ring, pos_B + fresh - 1), True), ring
    history = store.ring_history(ring, place, pos_B, length, num.jnp_dtype)
    recent_BSH = jnp.concatenate([context.history(history, kv_BTH, shards), kv_BTH], axis=1)
    ring = context.write_ring(ring, place, chunk, recent_BSH, shards, num.kernels)
    return Window(recent_BSH, pos_B[:, None] + jnp.arange(-length, fresh)[None]), ring


def attend_chunk(
    q_BTNH: Array,
    window: Window,
    sink_N: Array,
    chunk: Chunk,
    cache: store.LayerCache,
    index: Array,
    query: indexer.IndexQuery | None,
    ratio: int,
    cfg: ModelConfig,
    num: Numerics,
) -> Array:
    """Attention output `[B, T, N, H]` (still rotated) of all queries of a chunk, tile by tile."""
    fresh = q_BTNH.shape[1]
    tile = min(fresh, QUERY_TILE)
    tiles = -(-fresh // tile)
    pad = tiles * tile - fresh

    def padded(a: Array) -> Array:
        edges = [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a, edges, constant_values=-1) if pad else a

    q_BTNH = padded(q_BTNH)
    window = Window(padded(window.rows_BSH), padded(window.position_BS))
    if query is not None:
        query = indexer.IndexQuery(padded(query.q_BTIJ), padded(query.w_BTI))
    attend_tile = partial(_attend_tile, window, sink_N, chunk, cache, index, ratio, cfg, num, tiles)
    if tiles == 1:
        return attend_tile(jnp.int32(0), q_BTNH, query)[:, :fresh]

    def cut(a: Array, begin: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, begin, tile, axis=1)

    def body(step: Array, q_BTNH: Array) -> Array:
        """The tile's outputs take the place of its queries."""
        begin = step * tile
        part = query and indexer.IndexQuery(cut(query.q_BTIJ, begin), cut(query.w_BTI, begin))
        out = attend_tile(begin, cut(q_BTNH, begin), part)
        return lax.dynamic_update_slice_in_dim(q_BTNH, out, begin, axis=1)

    return lax.fori_loop(0, tiles, body, q_BTNH)[:, :fresh]


def _attend_tile(
    window: Window,
    sink_N: Array,
    chunk: Chunk,
    cache: store.LayerCache,
    index: Array,
    ratio: int,
    cfg: ModelConfig,
    num: Numerics,
    tiles: int,
    begin: Array,
    q_BTNH: Array,
    query: indexer.IndexQuery | None,
) -> Array:
    """Queries `begin` … `begin + tile` of the chunk over window and compressed rows."""
    tile = q_BTNH.shape[1]
    span = window.rows_BSH.shape[1] - (tiles - 1) * tile  # what the tile's queries may see
    rows_BSH, position_BS = (lax.dynamic_slice_in_dim(a, begin, span, axis=1) for a in window[:2])
    query_BT = chunk.pos_B[:, None] + begin + jnp.arange(tile)[None]
    ago_BTS = query_BT[:, :, None] - position_BS[:, None]
    mask_BTS = (ago_BTS >= 0) & (ago_BTS < cfg.window) & (position_BS >= 0)[:, None]
    state = attend.absorb(attend.start(q_BTNH), q_BTNH, rows_BSH, mask_BTS, num)
    if ratio:
        visible_BT = chunk.visible(begin + jnp.arange(tile), ratio)
        rows, place = cache["rows"], chunk.place(index)
        if query is None:
            state = _absorb_visible(state, q_BTNH, rows, place, visible_BT, None, num)
        else:
            state = _absorb_selected(
                state, q_BTNH, rows, cache["keys"], place, query, visible_BT, cfg, num
            )
    return attend.finish(state, sink_N, num)


def attend_shared(
    q_BTNH: Array,
    window: Window,
    sink_N: Array,
    chunk: Chunk,
    cache: store.LayerCache,
    index: Array,
    query: indexer.IndexQuery | None,
    ratio: int,
    cfg: ModelConfig,
    num: Numerics,
    shards: Shards,
) -> Array:
    """`attend_chunk` of a few tokens that all shards of a context have, each with its own rows.

    The window counts on the first shard alone.
    """
    steps_T = jnp.arange(q_BTNH.shape[1])
    query_BT = chunk.pos_B[:, None] + steps_T[None]
    ago_BTS = query_BT[:, :, None] - window.position_BS[:, None]
    mask_BTS = (ago_BTS >= 0) & (ago_BTS < cfg.window) & (window.position_BS >= 0)[:, None]
    mask_BTS &= shards.rank("context") == 0
    state = attend.absorb(attend.start(q_BTNH), q_BTNH, window.rows_BSH, mask_BTS, num)
    if ratio:
        visible_BT = context.rows_before(chunk.visible(steps_T, ratio), shards)
        rows, place, mask_BTC = cache["rows"], chunk.place(index), None
        if query is not None:
            scores = indexer.score_rows(query, cache["keys"], place, visible_BT, num)
            mask_BTC = context.selection_mask(scores, cfg.index_topk, shards)
        state = _absorb_visible(state, q_BTNH, rows, place, visible_BT, mask_BTC, num)
    return attend.finish(context.merge(state, shards), sink_N, num)


def _absorb_visible(
    state: attend.SoftmaxState,
    q_BTNH: Array,
    rows: store.Rows,
    place: store.Place,
    visible_BT: Array,
    mask_BTC: Array | None,
    num: Numerics,
) -> attend.SoftmaxState:
    """All compressed rows below `visible_BT` (and in the mask, if any), tile by tile."""
    tile = store.tile_rows(rows, place)

    def body(step: Array, state: attend.SoftmaxState) -> attend.SoftmaxState:
        begin = step * tile
        mask = (begin + jnp.arange(tile))[None, None] < visible_BT[..., None]
        if mask_BTC is not None:
            mask &= lax.dynamic_slice_in_dim(mask_BTC, begin, tile, axis=2)
        rows_BSH = store.read_tile(rows, place, begin, tile, num.jnp_dtype)
        return attend.absorb(state, q_BTNH, rows_BSH, mask, num)

    return lax.fori_loop(0, (visible_BT.max() + tile - 1) // tile, body, state)


def _absorb_selected(
    state: attend.SoftmaxState,
    q_BTNH: Array,
    rows: store.Rows,
    keys: store.Rows,
    place: store.Place,
    query: indexer.IndexQuery,
    visible_BT: Array,
    cfg: ModelConfig,
    num: Numerics,
) -> attend.SoftmaxState:
    """The rows the indexer keeps: all of them while they are few, else masked, else gathered."""
    keep, capacity = cfg.index_topk, store.row_room(rows, place)
    longest = visible_BT.max()

    def everything(state: attend.SoftmaxState) -> attend.SoftmaxState:
        return _absorb_visible(state, q_BTNH, rows, place, visible_BT, None, num)

    if capacity <= keep:
        return everything(state)
    few_rows = indexer.whole_tiles(DENSE_FACTOR * keep, keys, place)

    def masked(state: attend.SoftmaxState) -> attend.SoftmaxState:
        scores = indexer.score_rows(query, keys, place, visible_BT, num, count=few_rows)
        mask = indexer.selection_mask(scores, keep)
        return _absorb_visible(state, q_BTNH, rows, place, visible_BT, mask, num)

    def gathered(state: attend.SoftmaxState) -> attend.SoftmaxState:
        chosen = indexer.select_rows(query, keys, place, visible_BT, keep, num)
        rows_BTKH = store.gather_rows(rows, place, chosen.rows_BTK, num.jnp_dtype)
        return attend.absorb(state, q_BTNH, rows_BTKH, chosen.valid_BTK, num)

    def by_sequence(state: attend.SoftmaxState) -> attend.SoftmaxState:
        # a sequence that sees few rows adds them up in the order it would without its neighbours
        is_short_BT = visible_BT <= keep
        few_BT = jnp.where(is_short_BT, visible_BT, 0)
        both = zip(
            _absorb_visible(state, q_BTNH, rows, place, few_BT, None, num),
            gathered(state),
            strict=True,
        )
        is_short = is_short_BT[:, :, None, None]
        return attend.SoftmaxState(*(jnp.where(is_short, few, many) for few, many in both))

    def sparse(state: attend.SoftmaxState) -> attend.SoftmaxState:
        if q_BTNH.shape[1] <= FEW_QUERIES:
            return by_sequence(state)
        if capacity <= DENSE_FACTOR * keep:
            return masked(state)
        return lax.cond(longest <= DENSE_FACTOR * keep, masked, gathered, state)

    return lax.cond(longest <= keep, everything, sparse, state)

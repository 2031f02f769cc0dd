"""How tokens reach experts that live on other devices, and how their outputs come back.

gather: every device of the group sees all tokens and runs its own experts; parts are added in rank
order. ragged: a token travels to each of its experts and the outputs travel back, to be added in
expert order, as on one device. padded: the same with room for the worst case in every message, for
backends without ragged messages. All are dropless.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv4_jax.gather import invert, places, ranks, take
from dsv4_jax.numerics import Numerics
from sharding.shards import Shards, ordered_scatter, ordered_total

MAX_GATHERED = 8  # devices with tokens of their own, up to which all see all tokens
MAX_ROWS = 1 << 16  # rows a device makes room for at once; more tokens take several rounds

# (tokens [U, D], expert numbers on this device [U, A], weights [U, A], whether real [U]) to float32
# sums [U, D]; numbers from the count of local experts on contribute nothing.
Experts = Callable[[Array, Array, Array, Array], Array]


class Tokens(NamedTuple):
    """What travels: rows, their experts (numbers of the whole model), weights, whether real."""

    x_UD: Array
    experts_UA: Array
    weights_UA: Array
    real_U: Array


def exchange(
    tokens: Tokens, local_experts: int, run: Experts, num: Numerics, shards: Shards
) -> Array:
    """Σ over each token's experts, float32 `[U, D]`, whatever devices the experts live on."""
    axes = shards.axes("experts")
    if not axes:
        return run(*tokens)
    own = tuple(axis for axis in axes if axis in shards.token_axes)
    rest = tuple(axis for axis in axes if axis not in own)
    form = shards.exchange
    if form is None and math.prod(shards.size(axis) for axis in own) <= MAX_GATHERED:
        form = "gather"
    if form == "gather":
        return _gathered(tokens, local_experts, run, own, rest, shards)
    return _travelled(tokens, local_experts, run, num, rest, shards, form)


def _gathered(
    tokens: Tokens,
    local_experts: int,
    run: Experts,
    own: tuple[str, ...],
    rest: tuple[str, ...],
    shards: Shards,
) -> Array:
    """own: axes whose devices have tokens of their own; along `rest` all have the same."""
    counts = [math.prod(shards.size(axis) for axis in axes) for axes in (own, rest)]
    x_UD, weights_UA = tokens.x_UD, tokens.weights_UA
    experts_UA = jnp.where(tokens.real_U[:, None], tokens.experts_UA, -1)
    if own:
        about = jnp.concatenate([experts_UA.astype(jnp.float32), weights_UA], axis=1)
        x_UD, about = (lax.all_gather(a, own, axis=0, tiled=True) for a in (x_UD, about))
        experts, weights_UA = jnp.split(about, 2, axis=1)
        experts_UA = experts.astype(jnp.int32)
    local_UA = _local(experts_UA, local_experts, shards.rank("experts"))
    part_UD = run(x_UD, local_UA, weights_UA, jnp.ones(len(x_UD), bool))
    part_UD = ordered_scatter(part_UD, own, counts[0], 0)
    return ordered_total(part_UD, rest, counts[1])


def _local(experts: Array, local_experts: int, rank: Array) -> Array:
    """Numbers on this device; `local_experts` for those that live elsewhere."""
    local = experts - rank * local_experts
    return jnp.where((local >= 0) & (local < local_experts), local, local_experts)


def _travelled(
    tokens: Tokens,
    local_experts: int,
    run: Experts,
    num: Numerics,
    rest: tuple[str, ...],
    shards: Shards,
    form: str | None,
) -> Array:
    """Devices with the same tokens first share them out; long inputs travel in rounds."""
    count, per_token = tokens.experts_UA.shape
    parts = math.prod(shards.size(axis) for axis in rest)
    # rows that one token of each device may need
    room = shards.count("experts") * min(per_token, local_experts)
    mine = -(-count // parts)
    rounds = -(-mine * room // MAX_ROWS)
    step = -(-mine // rounds)
    pad = parts * rounds * step - count

    def share(a: Array) -> Array:
        a = jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))
        a = a.reshape(parts, rounds, step, *a.shape[1:])
        return lax.dynamic_index_in_dim(a, shards.rank_along(rest), keepdims=False)

    shared = Tokens(*(share(part) for part in tokens))
    travel = _Travel(local_experts, run, num, shards, form)
    if rounds == 1:
        out = travel(Tokens(*(part[0] for part in shared)))
    else:

        @jax.checkpoint  # a training step keeps the tokens of a round, not the room made for them
        def one(tokens: Tokens) -> Array:
            return travel(tokens)

        out = lax.map(one, shared).reshape(rounds * step, -1)
    if rest:
        out = lax.all_gather(out, rest, axis=0, tiled=True)
    return out[:count]


class _Travel(NamedTuple):
    """One round: rows go out sorted by expert and come back in the same order."""

    local_experts: int
    run: Experts
    num: Numerics
    shards: Shards
    form: str | None

    def __call__(self, tokens: Tokens) -> Array:
        count, per_token = tokens.experts_UA.shape
        devices = self.shards.count("experts")
        nowhere = self.local_experts * devices
        owner_Y = jnp.where(tokens.real_U[:, None], tokens.experts_UA, nowhere).reshape(-1)
        # rows of padding tokens have an owner too, behind all others
        rank_Y, count_E, is_own_EY = ranks(owner_Y, nowhere + 1)
        place_Y = places(rank_Y, jnp.cumsum(count_E) - count_E, is_own_EY, len(owner_Y))
        order_Y = invert(place_Y, len(owner_Y))
        sent = count_E[:nowhere].reshape(devices, self.local_experts).sum(axis=1)
        # the owner of row n of all, sorted: as many as have all their rows in front of it
        number_Y1 = jnp.arange(len(owner_Y), dtype=jnp.int32)[:, None]
        sorted_Y = (number_Y1 >= jnp.cumsum(count_E)[None]).sum(axis=1, dtype=jnp.int32)
        target_Y, local_Y = sorted_Y // self.local_experts, sorted_Y % self.local_experts
        x_UD = tokens.x_UD
        repeated = jnp.broadcast_to(x_UD[:, None], (count, per_token, x_UD.shape[1]))
        rows_YD = take(repeated.reshape(len(owner_Y), -1), order_Y, place_Y)
        weights_Y = take(tokens.weights_UA.reshape(-1), order_Y, place_Y)
        about_Y2 = jnp.stack([local_Y.astype(jnp.float32), weights_Y], axis=1)
        room = count * min(per_token, self.local_experts)  # at most so many rows between two
        back_YD = self._there_and_back(rows_YD, about_Y2, target_Y, sent, room)
        picked = take(back_YD, place_Y, order_Y).reshape(count, per_token, -1)
        picked = jnp.where(tokens.real_U[:, None, None], picked, 0).astype(jnp.float32)
        total = picked[:, 0]
        for a in range(1, per_token):
            total = total + picked[:, a]
        return total

    def _there_and_back(
        self, rows_YD: Array, about_Y2: Array, target_Y: Array, sent: Array, room: int
    ) -> Array:
        ragged, padded = partial(self._ragged, room), partial(self._padded, room)
        args = (rows_YD, about_Y2, target_Y, sent)
        if self.form is None:
            return lax.platform_dependent(*args, tpu=ragged, default=padded)
        return ragged(*args) if self.form == "ragged" else padded(*args)

    def _work(self, rows: Array, about: Array, is_real: Array) -> Array:
        """Outputs of rows that have arrived, one expert each, in the dtype they travel in."""
        local = jnp.where(is_real, about[:, 0].astype(jnp.int32), self.local_experts)
        out = self.run(rows, local[:, None], about[:, 1:], is_real)
        return self.num.cast(out)  # exact: each is one expert's output

    def _padded(
        self, room: int, rows_YD: Array, about_Y2: Array, target_Y: Array, sent: Array
    ) -> Array:
        axes, devices = self.shards.axes("experts"), len(sent)
        first = jnp.cumsum(sent) - sent
        lane_Y = jnp.arange(len(rows_YD)) - first[jnp.minimum(target_Y, devices - 1)]
        slot_Y = jnp.where(target_Y < devices, target_Y * room + lane_Y, devices * room)

        def there(a: Array) -> Array:
            boxes = jnp.zeros((devices * room, *a.shape[1:]), a.dtype)
            boxes = boxes.at[slot_Y].set(a, mode="drop").reshape(devices, room, -1)
            return lax.all_to_all(boxes, axes, 0, 0, tiled=True).reshape(devices * room, -1)

        received = lax.all_to_all(sent, axes, 0, 0, tiled=True)
        is_real = (jnp.arange(room)[None] < received[:, None]).reshape(-1)
        out = self._work(there(rows_YD), there(about_Y2), is_real)
        out = lax.all_to_all(out.reshape(devices, room, -1), axes, 0, 0, tiled=True)
        return out.reshape(devices * room, -1).at[slot_Y].get(mode="fill", fill_value=0)

    def _ragged(
        self, room: int, rows_YD: Array, about_Y2: Array, target_Y: Array, sent: Array
    ) -> Array:
        axes, devices = self.shards.axes("experts"), len(sent)
        me = self.shards.rank("experts")
        table = lax.all_gather(sent, axes)  # [from, to]
        came = table[:, me]
        out_first = jnp.cumsum(sent) - sent
        in_first = jnp.cumsum(came) - came
        # where a sender's rows begin on each receiver, and a receiver's among those of a sender
        there_at = (jnp.cumsum(table, axis=0) - table)[me]
        back_at = (jnp.cumsum(table, axis=1) - table)[:, me]

        def there(a: Array) -> Array:
            inbox = jnp.zeros((devices * room, *a.shape[1:]), a.dtype)
            return lax.ragged_all_to_all(a, inbox, out_first, sent, there_at, came, axis_name=axes)

        is_real = jnp.arange(devices * room) < came.sum()
        out = self._work(there(rows_YD), there(about_Y2), is_real)
        home = jnp.zeros(rows_YD.shape, out.dtype)
        return lax.ragged_all_to_all(out, home, in_first, came, back_at, sent, axis_name=axes)

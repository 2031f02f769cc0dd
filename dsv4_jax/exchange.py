"""How tokens reach experts that live on other devices, and how their outputs come back.

gather: every device of the group sees all tokens and runs its own experts; parts are added in rank
order. ragged: a token travels to each of its experts and the outputs travel back, to be added in
expert order, as on one device. padded: the same with room for the worst case in every message, for
backends without ragged messages. All are dropless. Where the worst case exceeds the room that a
device makes, ragged messages come in as many waves as the routing needs, most often one; padded
ones take a part of the tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from dsv4_jax.gather import invert, places, ranks, take
from dsv4_jax.numerics import Numerics
from dsv4_jax.waves import sum_of
from sharding.shards import Shards, ordered_scatter, ordered_total

MAX_GATHERED = 8  # devices with tokens of their own, up to which all see all tokens
MAX_ROWS = 1 << 16  # rows a device makes room for at once
SPARE = 1.5  # room of a wave over what arrives if all devices get the same

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
    """Devices with the same tokens first share them out."""
    count, per_token = tokens.experts_UA.shape
    parts = math.prod(shards.size(axis) for axis in rest)
    # rows that one token of each device may need
    room = shards.count("experts") * min(per_token, local_experts)
    mine = -(-count // parts)
    rounds = -(-mine * room // MAX_ROWS)
    travel = _Travel(local_experts, run, num, shards, form)

    def share(a: Array, rounds: int) -> Array:
        pad = parts * rounds * -(-mine // rounds) - count
        a = jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))
        a = a.reshape(parts, rounds, -1, *a.shape[1:])
        return lax.dynamic_index_in_dim(a, shards.rank_along(rest), keepdims=False)

    def joined(out: Array) -> Array:
        return (lax.all_gather(out, rest, axis=0, tiled=True) if rest else out)[:count]

    def at_once(form: str | None, *tokens: Array) -> Array:
        mine = Tokens(*(share(part, 1)[0] for part in tokens))
        return joined(travel._replace(form=form)(mine))

    def in_rounds(*tokens: Array) -> Array:
        @jax.checkpoint  # a training step keeps the tokens of a round, not the room made for them
        def one(tokens: Tokens) -> Array:
            return travel._replace(form="padded")(tokens)

        out = lax.map(one, Tokens(*(share(part, rounds) for part in tokens)))
        return joined(out.reshape(-1, out.shape[-1]))

    if rounds == 1 or form == "ragged":
        return at_once(form, *tokens)
    if form == "padded":
        return in_rounds(*tokens)
    return lax.platform_dependent(*tokens, tpu=partial(at_once, "ragged"), default=in_rounds)


class _Travel(NamedTuple):
    """Rows go out sorted by expert and come back in the same order."""

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
        message = _Messages(
            sent,
            came,
            jnp.cumsum(sent) - sent,
            jnp.cumsum(came) - came,
            # where a sender's rows begin on each receiver, a receiver's among those of a sender
            (jnp.cumsum(table, axis=0) - table)[me],
            (jnp.cumsum(table, axis=1) - table)[:, me],
        )
        worst = devices * room
        if worst <= MAX_ROWS:
            return self._wave(worst, jnp.zeros((), jnp.int32), message, rows_YD, about_Y2)
        per_wave = min(-(-int(SPARE * len(rows_YD)) // 128) * 128, MAX_ROWS)
        waves = -(-table.sum(axis=0).max() // per_wave)
        assert isinstance(self.shards.mesh, Mesh)
        waves = lax.pmax(waves, tuple(self.shards.mesh.axis_names))  # nobody waits for a message
        return sum_of(partial(self._wave, per_wave), waves, message, rows_YD, about_Y2)

    def _wave(
        self, size: int, n: Array, message: _Messages, rows_YD: Array, about_Y2: Array
    ) -> Array:
        """Outputs of the rows that are n·size to (n+1)·size on their receivers, else zeros."""
        axes = self.shards.axes("experts")
        came, there, here = message.cut(n * size, size)
        out_first, sent_now, at_receiver = there
        in_first, came_now, at_sender = here

        def send(a: Array) -> Array:
            inbox = jnp.zeros((size, *a.shape[1:]), a.dtype)
            return lax.ragged_all_to_all(
                a, inbox, out_first, sent_now, at_receiver, came_now, axis_name=axes
            )

        is_real = jnp.arange(size) < came
        out = self._work(send(rows_YD), send(about_Y2), is_real)
        home = jnp.zeros(rows_YD.shape, out.dtype)
        return lax.ragged_all_to_all(
            out, home, in_first, came_now, at_sender, sent_now, axis_name=axes
        )


class _Messages(NamedTuple):
    """Counts and places of rows by device, int32 `[devices]`: sent to it and come from it.

    out_first: where those sent begin here; there_at: on the receiver. in_first: where those that
    come begin here; back_at: on the sender. Of receivers the places are those of an inbox with
    room for all.
    """

    sent: Array
    came: Array
    out_first: Array
    in_first: Array
    there_at: Array
    back_at: Array

    def cut(self, low: Array, size: int) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        """Of rows at `low` to `low + size` of their receivers: how many come, a scalar, and of
        messages out and in the first row, the count and the place at the other end."""

        def inside(begin: Array, count: Array) -> tuple[Array, Array]:
            first = jnp.clip(low - begin, 0, count)
            return first, jnp.clip(low + size - begin, 0, count) - first

        skipped, sent = inside(self.there_at, self.sent)
        at_receiver = jnp.where(sent > 0, self.there_at + skipped - low, 0)
        out = (self.out_first + skipped, sent, at_receiver)
        skipped, came = inside(self.in_first, self.came)
        in_first = jnp.where(came > 0, self.in_first + skipped - low, 0)
        return came.sum(), out, (in_first, came, self.back_at + skipped)

"""Slots, and what the requests in them hold: pages, cached prefixes, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4_jax.serving.engine.checkpoints import Handle
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.node import Hit, Node
from dsv4_jax.serving.engine.parking import Parking
from dsv4_jax.serving.engine.prefill import cut_points, tail_start
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.step import (
    DecodeRow,
    Draft,
    PageCopy,
    SlotStart,
    Snapshot,
    TableUpdate,
)
from dsv4_jax.serving.engine.units import UNIT


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a step will have done."""

    request: Request
    slot: int
    end: int  # tokens computed behind it; of rows that decode at most
    samples: bool
    width: int = 0  # tokens that a row which decodes may compute; 0 is a prompt's


@dataclass
class InFlight:
    """What a planned step will have done once its results are in."""

    step: int
    rows: list[Row] = field(default_factory=list)
    restored: list[Node] = field(default_factory=list)
    snapshots: list[tuple[Request, int, Handle]] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)  # source pages, held while planning


class Slots:
    """Gives slots to requests and takes them back, with everything that goes with them."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, parking: Parking) -> None:
        self.live: dict[int, Request] = {}
        self._config = config
        self._parking = parking
        self._cache = cache
        self._pages = cache.pages
        self._free = list(range(config.num_slots - 1, -1, -1))
        self._no_room: tuple[Request, int] | None = None  # who found none, pages held then

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def _caches(self) -> bool:
        return self._cache.store.capacity > 0

    def start(self, request: Request, draft: Draft, record: InFlight) -> Hit | None:
        """Puts a request into a free slot, where it was parked or behind the cached prefix.

        Returns:
            The prefix; None if the pages do not suffice now.
        """
        if self._no_room is not None:
            who, held = self._no_room
            if who is request and self._pages.num_held >= held:
                return None
        hit = self._look_up(request)
        pages = self._obtain(request, hit)
        if pages is None and not self.live:
            hit = Hit()  # to copy from a page takes one more than to compute it
            pages = self._obtain(request, hit)
        if pages is None:
            self._no_room = request, self._pages.num_held
            return None
        self._no_room = None
        request.pages = pages
        request.slot = self._free.pop()
        self.live[request.slot] = request
        request.target = len(request.tokens)
        # of a request that decodes, only the results told where its state stood
        parked = len(request.tokens) - 1 if request.num_generated else request.parked
        request.planned = request.committed = parked if request.parked else hit.tokens
        request.least, request.ahead, request.snapped = request.planned, 0, 0
        request.pin, request.skipped = hit.node, 0
        request.cuts = self._cuts(request, hit)
        request.tail = tail_start(len(request.prompt), self._config.tail_shape)
        self._prepare(request, hit, draft, record)
        return hit

    def park(self, request: Request) -> None:
        """Puts the state of a request away and takes everything back."""
        assert request.slot is not None
        if request.planned:
            self._parking.park(request, request.slot, request.pages)
        request.parked = request.planned
        self.release(request)

    def retry(self) -> None:
        """Says that something other than a held page became free."""
        self._no_room = None

    def grow(self, request: Request, draft: Draft) -> bool:
        """Makes sure the next position has a page; False if there is none even after eviction."""
        if request.planned < self.room(request):
            return True
        if not self._cache.evict(1):
            return False
        assert request.slot is not None
        [page] = self._pages.allocate(1)
        draft.tables.append(TableUpdate(request.slot, len(request.pages), (page,)))
        request.pages.append(page)
        return True

    def room(self, request: Request) -> int:
        """Positions that have a page."""
        return len(request.pages) * self._pages.page_tokens

    def hand_out(self, request: Request, count: int, samples: bool, record: InFlight) -> None:
        """Notes that the step computes the next `count` tokens of a prompt."""
        assert request.slot is not None
        request.planned += count
        request.least = request.planned
        request.in_flight += 1
        record.rows.append(Row(request, request.slot, request.planned, samples))

    def hand_out_decode(
        self, request: Request, stop: int, width: int, record: InFlight
    ) -> DecodeRow:
        """Notes that the step computes one to `width` tokens, all in front of `stop`.

        Without guesses all of them stand, and are computed for certain.
        """
        assert request.slot is not None
        request.planned = max(request.planned, stop)
        request.least = min(request.least + 1, stop) if self._config.guesses else stop
        request.ahead += width
        request.in_flight += 1
        record.rows.append(Row(request, request.slot, stop, True, width))
        return DecodeRow(request.slot, stop, width, request)

    def advanced(self, row: Row) -> None:
        """Notes how far a row that decoded came, which its request's log says."""
        request = row.request
        request.committed = len(request.tokens) - 1
        request.ahead -= row.width
        last = request.limit - 1
        most = min(request.committed + request.ahead, request.planned)
        request.planned = max(most, request.committed)
        request.least = max(min(request.committed + request.in_flight, last), request.committed)
        if not self._config.guesses:
            request.least = request.planned
        self._publish(request, request.committed)

    def snapshot(self, request: Request, draft: Draft, record: InFlight) -> None:
        """Keeps the state behind the step, if there is room for it."""
        assert request.slot is not None
        handle = self._cache.take_checkpoint()
        if handle is not None:
            draft.snapshots.append(Snapshot(request.slot, request.planned, handle))
            record.snapshots.append((request, request.planned, handle))

    def commit(self, row: Row) -> None:
        """Notes that the rows of a prompt's chunk are right, and caches the units they complete."""
        row.request.committed = row.end
        self._publish(row.request, row.end)

    def _publish(self, request: Request, end: int) -> None:
        """Caches the units in front of `end`.

        Output is only cached where its continuation is expected: rows that were computed one by
        one are not those of a prompt to the last bit.
        """
        known = request.pin.depth if request.pin is not None else 0
        end = end if request.keep_output else min(end, len(request.prompt))
        if self._caches and end // UNIT > known:
            assert request.chain is not None
            request.chain.extend(request.tokens)
            units = end // UNIT
            request.pin = self._cache.publish(request.chain, request.pages, units, request.pin)

    def keep(self, request: Request, position: int, handle: Handle) -> None:
        """Gives a finished snapshot to the tree, or to the request while its output grows.

        Where an output ends is not known before, so each checkpoint in it replaces the one before.
        """
        if not request.is_live:
            self._cache.store.drop(handle)
            return
        assert request.committed >= position, "the state of a step that is not in"
        if position > len(request.prompt):
            previous, request.output_checkpoint = request.output_checkpoint, (position, handle)
            if previous is None:
                return
            position, handle = previous
            if position % self._config.checkpoint_every:
                self._cache.store.drop(handle)
                return
        assert request.chain is not None
        self._cache.attach(request.chain, position, handle)

    def release(self, request: Request) -> None:
        """Takes everything back; what is cached stays until the room is needed."""
        assert request.slot is not None and request.chain is not None
        if request.output_checkpoint is not None:
            self._cache.attach(request.chain, *request.output_checkpoint)
        for page in request.pages:
            self._pages.release(page)
        if request.pin is not None:
            self._cache.unpin(request.pin)
        del self.live[request.slot]
        self._free.append(request.slot)
        request.slot = request.pin = request.output_checkpoint = None
        request.pages, request.cuts = [], []
        request.target = request.planned = request.committed = request.least = 0

    def check(self) -> None:
        """Asserts that slots, pages and pins are held by exactly the live requests."""
        assert sorted([*self._free, *self.live]) == list(range(self._config.num_slots))
        held: dict[int, int] = {}
        pins: dict[Node, int] = {}
        for slot, request in self.live.items():
            assert request.slot == slot, "a request is not in its slot"
            room = len(request.pages) * self._pages.page_tokens
            order = request.committed, request.least, request.planned, room
            assert list(order) == sorted(order), f"positions are off: {order}"
            for page in request.pages:
                held[page] = held.get(page, 0) + 1
            if request.pin is not None:
                pins[request.pin] = pins.get(request.pin, 0) + 1
        for page in range(self._pages.num_pages):
            assert self._pages.holders(page)[0] == held.get(page, 0), f"holders of page {page}"
        for node in self._cache.nodes.values():
            assert node.pins == pins.get(node, 0), f"pins of a unit at depth {node.depth}"

    def _look_up(self, request: Request) -> Hit:
        assert request.chain is not None
        if not self._caches or not request.reuse_prefix or request.parked:
            return Hit()
        request.chain.extend(request.tokens)
        # The last token is always computed: its logits are needed.
        return self._cache.acquire(request.chain, len(request.tokens) - 1)

    def _obtain(self, request: Request, hit: Hit) -> list[int] | None:
        """Returns the request's table, all pages held; None, the hit abandoned, if they lack."""
        borrowed = [] if hit.copy_from is None else [hit.copy_from]
        for page in (*hit.pages, *borrowed):
            self._pages.share(page)
        size = len(request.tokens)
        new = self._pages.pages_for(size) - len(hit.pages)
        with_reserve = min(size + self._config.reserve_tokens, request.limit)
        wanted = max(self._pages.pages_for(with_reserve) - len(hit.pages), new)
        if self._pages.num_obtainable >= wanted and self._cache.evict(new):
            return [*hit.pages, *self._pages.allocate(new)]
        for page in (*hit.pages, *borrowed):
            self._pages.release(page)
        self._cache.abandon(hit)
        return None

    def _cuts(self, request: Request, hit: Hit) -> list[int]:
        if not self._caches:
            return []
        chain, every = request.chain, self._config.checkpoint_every
        assert chain is not None

        def is_cached(position: int) -> bool:
            node = self._cache.at(chain, position)
            return node is not None and node.checkpoint is not None

        return cut_points(request, request.planned, every, hit.matched, is_cached)

    def _prepare(self, request: Request, hit: Hit, draft: Draft, record: InFlight) -> None:
        """Puts what a slot needs before its first row into the plan."""
        assert request.slot is not None
        checkpoint = None
        if hit.node is not None:
            checkpoint = hit.node.checkpoint
            record.restored.append(hit.node)
        is_resumed, request.parked = request.parked > 0, 0
        if is_resumed:
            self._parking.resume(request, request.slot, request.pages)
        start = SlotStart(request.slot, request, request.planned, checkpoint, is_resumed)
        draft.starts.append(start)
        draft.tables.append(TableUpdate(request.slot, 0, tuple(request.pages)))
        if hit.copy_from is not None:
            target = request.pages[len(hit.pages)]
            tokens = hit.tokens % self._pages.page_tokens
            draft.copies.append(PageCopy(hit.copy_from, target, tokens))
            record.copied.append(hit.copy_from)

"""Which requests run next, and what came of each step."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsv4_jax.serving.engine.checkpoints import Handle
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.metrics import Metrics
from dsv4_jax.serving.engine.node import Hit
from dsv4_jax.serving.engine.pace import Pace
from dsv4_jax.serving.engine.parking import Parking
from dsv4_jax.serving.engine.prefill import choose_chunk, piece, prefill_order, same_kind
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.request import FinishReason, Request, Status, Times
from dsv4_jax.serving.engine.slots import InFlight, Row, Slots
from dsv4_jax.serving.engine.step import Draft, PrefillRow, StepPlan, bucket
from dsv4_jax.serving.engine.units import UNIT
from dsv4_jax.serving.engine.waiting import Rejection, WaitingQueue

DECODE_COST = 8  # a decoded token costs a tenant as much as this many prefilled ones
MAX_IN_FLIGHT = 2  # steps that may be planned before the results of the first are in
MAX_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class Delivery:
    """Tokens of one step that now belong to a request, from number `index` of what it generated."""

    request: Request
    tokens: Sequence[int]
    index: int


class Scheduler:
    """Turns requests into steps. Not thread-safe: only `Request.cancel` may come from outside.

    Args:
        config: Sizes and limits.
        cache: Prefix cache over the pages to give out.
        parking: Keeps the state of requests that lose their slot.
        clock: Seconds that never go back.
        metrics: Where things are counted.
        pace: How many tokens a step computes of rows that decode.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: PrefixCache,
        parking: Parking,
        clock: Callable[[], float],
        metrics: Metrics | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.metrics = metrics or Metrics(max_len=config.max_len)
        self.pace = pace or Pace(config.guesses)
        self.queue = WaitingQueue(config.queue, config.quantum)
        self.slots = Slots(config, cache, parking)
        self.preempted: list[Request] = []  # most urgent first
        self.draining = False
        self._parking = parking
        self._clock = clock
        self._in_flight: deque[InFlight] = deque()
        self._finished: list[Request] = []
        self._next: Request | None = None  # whose turn it is, though there was no room yet
        self._steps = 0
        self._arrivals = 0
        self._start_gap_s = 1.0  # mean time between two admissions while others wait
        self._last_start = clock()
        self._watch()

    # What the front end calls.

    def submit(self, request: Request) -> Rejection | None:
        """Puts a request into the queue, or says at once why not.

        Raises:
            ValueError: it could never run here; the message names the limit.
        """
        most = min(self.config.max_len, self.cache.pages.num_usable * self.cache.pages.page_tokens)
        if len(request.prompt) + (request.max_tokens > 0) > most:
            raise ValueError(
                f"request {request.id}: a prompt of {len(request.prompt)} tokens leaves no room "
                f"for output; prompt and output together may have {most}"
            )
        reason = None if request.continues else self._why_not(request)
        if reason is not None:
            self.metrics.count("admission_rejections", reason=reason)
            return Rejection(reason, min(max(math.ceil(self._start_gap_s), 1), MAX_RETRY_S))
        now = self._clock()
        self._arrivals += 1
        request.order = self._arrivals
        request.times.arrived = now
        request.urgency = request.priority * self.config.ageing_s - now
        request.limit = min(len(request.prompt) + request.max_tokens, most)
        request.chain = self.cache.chain(request.tenant)
        self.queue.add(request)
        return None

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in whatever state it is; results of steps under way are discarded."""
        was = request.status
        if was is Status.FINISHED:
            return
        if was is Status.WAITING:
            self.queue.remove(request)
        else:
            if was is Status.PREEMPTED:
                self.preempted.remove(request)
                self._parking.forget(request)
            else:
                self.slots.release(request)
            self.queue.free_slot(request.tenant)
        if self._next is request:
            self._next = None
        request.status, request.finish_reason = Status.FINISHED, reason
        request.times.finished = self._clock()
        request.leader = None
        self.metrics.finished(request, was)
        self._finished.append(request)

    def drain(self) -> None:
        """Refuses new requests from now on; those that were taken go on."""
        self.draining = True

    def abort_all(self, reason: FinishReason) -> None:
        """Ends every request."""
        for request in list(self.requests()):
            self.finish(request, reason)

    def take_finished(self) -> list[Request]:
        """Returns the requests that ended since the last call, for whatever reason."""
        finished, self._finished = self._finished, []
        return finished

    def requests(self) -> Iterator[Request]:
        """All that have not ended."""
        yield from self.queue
        yield from self.preempted
        yield from self.slots.live.values()

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended or the result of a step is missing."""
        return bool(self.slots.live or self.preempted or len(self.queue) or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Steps whose results are missing."""
        return len(self._in_flight)

    # What the loop calls.

    def plan(self) -> StepPlan | None:
        """Plans the next step; None if there is nothing to do before more requests or results."""
        assert len(self._in_flight) < MAX_IN_FLIGHT, "too many steps without results"
        self._reap()
        draft, record = Draft(), InFlight(self._steps)
        self._plan_decode(draft, record)
        self._admit(draft, record)
        self._plan_prefill(draft, record)
        for page in record.copied:
            self.cache.pages.release(page)
        if not record.rows and not draft.starts and not draft.snapshots:
            return None
        self._steps += 1
        self._in_flight.append(record)
        plan = draft.finish(record.step, self.config.decode_batches)
        self.metrics.observe("iteration_tokens_total", plan.num_tokens)
        return plan

    def complete(
        self, step: int, tokens: Mapping[int, Sequence[int]], failed: Collection[int] = ()
    ) -> list[Delivery]:
        """Takes the results of the oldest step that has none.

        Args:
            step: Its number.
            tokens: By slot, what the plan's `sampling_slots` sampled; failed ones may be missing.
            failed: Slots whose numbers are not to be trusted: their requests end with an error,
                and nothing of this step is cached for them.

        Returns:
            The tokens of requests that had not ended in the meantime, though they may now.
        """
        record, delivered = self._in_flight.popleft(), []
        assert record.step == step, f"results of step {step}, expected those of {record.step}"
        for row in record.rows:
            row.request.in_flight -= 1
            if row.slot in failed:
                self.finish(row.request, FinishReason.ERROR)
            elif row.request.status is not Status.FINISHED:
                counted = self._take(row, tokens.get(row.slot, ()))
                if counted is not None:
                    delivered.append(counted)
        for node in record.restored:
            self.cache.restored(node)
            self.slots.retry()
        for request, position, handle in record.snapshots:
            self.slots.keep(request, position, handle)
        for row in record.rows:
            if row.samples and row.request.status is not Status.FINISHED:
                self._end_if_done(row.request)
        self.metrics.count("generation_tokens", sum(len(own.tokens) for own in delivered))
        return delivered

    # Inside.

    def _why_not(self, request: Request) -> str | None:
        """Why a request is not taken now."""
        return "draining" if self.draining else self.queue.why_full(request, self.slots.num_free)

    def _reap(self) -> None:
        """Ends what was cancelled or waited too long."""
        oldest = self._clock() - self.config.queue.timeout_s
        for request in list(self.requests()):
            if request.cancelled:
                self.finish(request, FinishReason.CANCELLED)
            elif request.status is Status.WAITING and request.times.arrived < oldest:
                self.finish(request, FinishReason.QUEUE_TIMEOUT)

    def _plan_decode(self, draft: Draft, record: InFlight) -> None:
        """One token, or more, for everyone who runs; the most urgent get pages first."""
        running = [r for r in self.slots.live.values() if r.status is Status.RUNNING]
        draft.width = self.pace.width(len(running)) if running else 1
        if self._may_burst(running):
            draft.width, draft.burst = self.config.burst, True
        for request in sorted(running, key=lambda r: r.rank):
            if request.status is not Status.RUNNING or request.least + 1 >= request.limit:
                continue  # preempted for one before it, or all is handed out
            if request.guided and request.in_flight:
                continue
            if request.keep_output and self._waits_at_edge(request, draft, record):
                continue
            while request.is_live and not self.slots.grow(request, draft):
                self._preempt(max(self.slots.live.values(), key=lambda r: r.rank))
            if request.slot is None:
                continue
            width = 1 if self._is_careful(request) else draft.width
            stop = min(request.planned + width, request.limit - 1, self.slots.room(request))
            if request.keep_output:
                stop = min(stop, edge_of(request))
            draft.decode.append(self.slots.hand_out_decode(request, stop, width, record))
            if request.keep_output and request.planned % UNIT == 0:
                self._snapshot_if_there(request, draft, record)

    def _may_burst(self, running: Sequence[Request]) -> bool:
        """Whether several tokens in one call hold up nobody."""
        waits = self._next is not None or len(self.queue)
        if self.config.burst == 1 or self.preempted or (waits and self.slots.has_free):
            return False
        others = any(request.status is not Status.RUNNING for request in self.slots.live.values())
        return not others and not any(map(self._is_careful, running))

    def _is_careful(self, request: Request) -> bool:
        """Whether the next token may be drawn only where the one in front of it is known."""
        return request.guided or request.planned + 1 - len(request.prompt) < request.early

    def _waits_at_edge(self, request: Request, draft: Draft, record: InFlight) -> bool:
        """Whether output that is kept stands still at the end of a unit, for its snapshot."""
        position = request.planned
        if position <= len(request.prompt) or position % UNIT or position == request.snapped:
            return False
        self._snapshot_if_there(request, draft, record)
        return True

    def _snapshot_if_there(self, request: Request, draft: Draft, record: InFlight) -> None:
        """Takes a snapshot if the steps so far leave the state where it may be, for certain."""
        if request.least == request.planned:
            self.slots.snapshot(request, draft, record)
            request.snapped = request.planned

    def _preempt(self, request: Request) -> None:
        """Takes slot and pages; the state is parked."""
        self.slots.park(request)
        request.status = Status.PREEMPTED
        request.preemptions += 1
        insort(self.preempted, request, key=lambda r: r.rank)
        self.metrics.count("num_preemptions")

    def _admit(self, draft: Draft, record: InFlight) -> None:
        """Gives free slots to those whose turn it is, preempted ones first, while pages last.

        Who has the turn and finds no room keeps it, so that large requests start too.
        """
        while self.slots.has_free:
            if self.preempted:
                request = self.preempted[0]
                if request.in_flight:
                    return  # its log is not complete yet
            else:
                request = self._next = self._next or self.queue.pick(self._may_start)
            hit = self.slots.start(request, draft, record) if request is not None else None
            if request is None or hit is None:
                return
            if request.status is Status.WAITING:
                self._started(request, hit)
            else:
                self.preempted.remove(request)
            is_prompt_in = request.planned >= len(request.prompt)
            request.status = Status.RUNNING if is_prompt_in else Status.PREFILL

    def _may_start(self, request: Request) -> bool:
        """Whether nothing but room can keep a request from starting."""
        if request.held_until is not None and self._clock() < request.held_until:
            return False
        leader = request.leader
        if leader is not None and leader.status is not Status.FINISHED:
            if leader.times.first_token is None:
                return False
        if len(request.prompt) <= self.config.long_prefill:
            return True
        prefills = [r for r in self.slots.live.values() if r.status is Status.PREFILL]
        long = sum(r.target > self.config.long_prefill for r in prefills)
        return long < self.config.max_long_prefills

    def _started(self, request: Request, hit: Hit) -> None:
        """Moves a request out of the queue, at the expense of its tenant."""
        now = self._clock()
        self.queue.take_slot(request.tenant)
        self.queue.remove(request)
        self.queue.charge(request.tenant, len(request.prompt) - hit.tokens)
        self._next = None
        request.times.started = now
        request.cached_tokens = hit.tokens
        if len(self.queue):
            self._start_gap_s += 0.1 * (now - self._last_start - self._start_gap_s)
        self._last_start = now
        self.metrics.started(request, hit.matched)

    def _plan_prefill(self, draft: Draft, record: InFlight) -> None:
        """Fills what the decoding rows leave of the step with chunks of prompts."""
        config = self.config
        order = prefill_order(r for r in self.slots.live.values() if r.status is Status.PREFILL)
        if not order:
            return
        fits = same_kind(order)
        pieces = [piece(request) for request in fits]
        if config.tail_shape is not None and order[0].planned >= order[0].tail:
            draft.prefill_batch, draft.chunk = config.tail_shape
            rows = min(draft.prefill_batch, len(fits))
        else:
            alone = max(config.step_tokens, config.chunk_sizes[-1])
            budget = config.step_tokens - draft.width * len(draft.decode) if draft.decode else alone
            sizes = config.chunk_sizes, config.prefill_batches
            draft.chunk, rows = choose_chunk(pieces, budget, *sizes)
            draft.prefill_batch = bucket(rows, config.prefill_batches)
        chosen = fits[:rows]
        for request in order:
            request.skipped += request not in chosen
        for request, size in zip(chosen, pieces, strict=False):
            self._plan_chunk(request, min(size, draft.chunk), draft, record)

    def _plan_chunk(self, request: Request, count: int, draft: Draft, record: InFlight) -> None:
        assert request.slot is not None
        start, end = request.planned, request.planned + count
        pages = tuple(request.pages[: self.cache.pages.pages_for(end)])
        tokens, samples = tuple(request.tokens[start:end]), end == request.target
        draft.prefill.append(PrefillRow(request.slot, start, tokens, pages, samples, request))
        self.slots.hand_out(request, count, samples, record)
        request.skipped = 0
        if request.cuts and request.cuts[0] == end:
            request.cuts.pop(0)
            self.slots.snapshot(request, draft, record)
        if samples:
            request.status = Status.RUNNING

    def _take(self, row: Row, tokens: Sequence[int]) -> Delivery | None:
        """Notes what a row computed, and adds its tokens to the log up to the last that counts."""
        request, delivered = row.request, None
        if row.width and self.config.guesses:
            self._count_guesses(row, len(tokens))
        counted = up_to_end(request, tokens) if row.samples else []
        if counted:
            self._note_times(request.times, len(counted))
            delivered = Delivery(request, counted, request.num_generated)
            request.tokens += counted
            self.queue.charge(request.tenant, DECODE_COST * len(counted))
        if not request.is_live:
            return delivered
        self.slots.advanced(row) if row.width else self.slots.commit(row)
        return delivered

    def _note_times(self, times: Times, count: int) -> None:
        now = self._clock()
        self.metrics.tokens(times, now, count)
        if times.first_token is None:
            times.first_token = now
        times.last_token = now

    def _count_guesses(self, row: Row, count: int) -> None:
        guesses = min(row.width, row.end - len(row.request.tokens) + 1) - 1
        if guesses > 0 and count:
            self.pace.saw(guesses, count - 1)
            self.metrics.guessed(guesses, count - 1)

    def _end_if_done(self, request: Request) -> None:
        if request.num_generated and request.tokens[-1] in request.stop_ids:
            self.finish(request, FinishReason.STOP)
        elif len(request.tokens) >= request.limit:
            self.finish(request, FinishReason.LENGTH)

    def _watch(self) -> None:
        """Lets the gauges read the state."""
        watch, pages, live = self.metrics.watch, self.cache.pages, self.slots.live
        watch("num_requests_running", lambda: len(live))
        watch("num_requests_waiting", lambda: len(self.queue))
        watch("num_requests_preempted", lambda: len(self.preempted))
        watch("kv_cache_usage_perc", lambda: pages.num_held / pages.num_usable)
        watch("slot_usage_perc", lambda: len(live) / self.config.num_slots)

    # Invariants.

    def checkpoints(self) -> list[Handle]:
        """Handles in use by the tree, by requests and by steps under way."""
        live = self.slots.live.values()
        own = [r.output_checkpoint[1] for r in live if r.output_checkpoint is not None]
        flying = [handle for record in self._in_flight for _, _, handle in record.snapshots]
        return self.cache.checkpoints + own + flying

    def check(self) -> None:
        """Asserts that slots, pages, pins and queues are conserved."""
        self.slots.check()
        self.cache.pages.check()
        self.cache.check()
        self.queue.check()
        for request in [*self.preempted, *self.queue]:
            assert request.slot is None and not request.pages and request.pin is None
        served = [*self.preempted, *self.slots.live.values()]
        for name in {request.tenant for request in self.requests()}:
            own = sum(request.tenant == name for request in served)
            assert self.queue.slots_of(name) == own, f"slots of tenant {name}"


def edge_of(request: Request) -> int:
    """The next end of a unit: output that is kept must not be computed past it at once."""
    return (request.planned // UNIT + 1) * UNIT


def up_to_end(request: Request, tokens: Sequence[int]) -> list[int]:
    """Of the tokens that follow a request's log, those that still count."""
    counted = list(tokens[: request.limit - len(request.tokens)])
    ends = (place for place, token in enumerate(counted, 1) if token in request.stop_ids)
    return counted[: next(ends, None)]

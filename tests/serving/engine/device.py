"""A device without numbers: it runs plans on hashes and checks everything they touch.

The state of a sequence is a hash of its tokens. It stands for ring state, is written to pages and
checkpoints, and decides which token comes next; so whatever is lost, mixed up or computed twice
shows in a check or in the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.host import Unit
from dsv4_jax.serving.engine.pages import SCRATCH_PAGE
from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.scheduler import Scheduler
from dsv4_jax.serving.engine.step import PrefillRow, StepPlan
from dsv4_jax.serving.engine.units import UNIT

VOCABULARY = 97


def advance(state: int, token: int) -> int:
    return hash((state, token))


def start_state(tenant: str) -> int:
    return hash((17, *tenant.encode()))


def next_token(state: int) -> int:
    return (state >> 5) % VOCABULARY


def states_of(request: Request, count: int) -> list[int]:
    """The states at the ends of the complete units of the first `count` tokens, then the last."""
    state, ends = start_state(request.tenant), []
    for index in range(count):
        state = advance(state, request.tokens[index])
        if (index + 1) % UNIT == 0:
            ends.append(state)
    return [*ends, state]


def solo(request: Request) -> list[int]:
    """What the request generates when nobody else is there."""
    state, generated = start_state(request.tenant), []
    for token in request.prompt:
        state = advance(state, token)
    while len(request.prompt) + len(generated) < request.limit:
        generated.append(next_token(state))
        if generated[-1] in request.stop_ids:
            break
        state = advance(state, generated[-1])
    return generated


@dataclass
class _Slot:
    position: int
    state: int
    ends: list[int]  # states at the ends of units
    last_token: int = -1
    table: list[int] = field(default_factory=list)


class FakeDevice:
    """Runs plans in order; `poison` makes the next row of a slot come out wrong.

    It is a second tier of the prefix cache as well, one that forgets nothing, and the parking.
    """

    def __init__(self, config: SchedulerConfig, page_tokens: int) -> None:
        self.poison: set[int] = set()
        self.computed = 0  # tokens
        self._config = config
        self._page_units = page_tokens // UNIT
        self._slots: dict[int, _Slot] = {}
        self._rows: dict[tuple[int, int], tuple[int, int]] = {}  # page, unit → state, tokens
        self._checkpoints: dict[int, tuple[int, int]] = {}  # handle → position, state
        self.saved = 0  # checkpoints in the second tier
        self._saved_units: dict[Unit, list[tuple[int, int]]] = {}
        self._saved_states: dict[Unit, tuple[int, int]] = {}
        self.parked: dict[Request, tuple[_Slot, list[list[tuple[int, int] | None]]]] = {}
        self.resumed = 0

    def run(self, plan: StepPlan, scheduler: Scheduler) -> tuple[dict[int, list[int]], set[int]]:
        """Returns the sampled tokens and the slots whose results are not to be trusted."""
        self._check_shapes(plan)
        self._check_writers(plan, scheduler)
        self._prepare(plan)
        poisoned = self.poison & {row.slot for row in (*plan.prefill, *plan.decode)}
        self.poison -= poisoned
        sampled = {}
        for row in plan.prefill:
            slot = self._slots[row.slot]
            assert row.start == slot.position, "a position is skipped or computed twice"
            assert list(row.pages) == slot.table[: len(row.pages)]
            self._read(slot)
            for token in row.tokens:
                self._step(slot, token, row.slot in poisoned)
            if row.samples:
                slot.last_token = next_token(slot.state)
                sampled[row.slot] = [slot.last_token]
        for row in plan.decode:
            slot, drawn = self._slots[row.slot], []
            assert slot.position <= row.stop
            count = min(plan.width, row.stop - slot.position)
            assert count <= row.width, "more tokens than the row may have"
            if not plan.burst:  # some guesses fail
                count = count and 1 + abs(hash((slot.state, "guesses"))) % count
            for _ in range(count):
                self._read(slot)
                self._step(slot, slot.last_token, row.slot in poisoned)
                slot.last_token = next_token(slot.state)
                drawn.append(slot.last_token)
            sampled[row.slot] = drawn
        assert set(sampled) == set(plan.sampling_slots)
        for snapshot in plan.snapshots:
            slot = self._slots[snapshot.slot]
            assert snapshot.position == slot.position and slot.position % UNIT == 0
            self._checkpoints[snapshot.checkpoint] = slot.position, slot.state
        return sampled, poisoned

    # The second tier.

    def save_page(self, units: Sequence[Unit], page: int) -> None:
        assert len(units) <= self._page_units
        rows = [self._rows[page, inner] for inner in range(len(units))]
        for count, unit in enumerate(units, 1):
            self._saved_units[unit] = rows[:count]

    def has_unit(self, unit: Unit) -> bool:
        return unit in self._saved_units

    def load_page(self, unit: Unit, page: int) -> None:
        self._rows |= {(page, n): row for n, row in enumerate(self._saved_units[unit])}

    def save_checkpoint(self, unit: Unit, handle: int) -> None:
        self.saved += 1
        self._saved_states[unit] = self._checkpoints[handle]

    def has_checkpoint(self, unit: Unit) -> bool:
        return unit in self._saved_states

    def load_checkpoint(self, unit: Unit, handle: int) -> None:
        self._checkpoints[handle] = self._saved_states[unit]

    # The parking.

    def park(self, request: Request, slot: int, pages: Sequence[int]) -> None:
        units = range(self._page_units)
        rows = [[self._rows.get((page, unit)) for unit in units] for page in pages]
        assert request not in self.parked
        assert request.least <= self._slots[slot].position <= request.planned
        self.parked[request] = self._slots.pop(slot), rows

    def resume(self, request: Request, slot: int, pages: Sequence[int]) -> None:
        state, rows = self.parked.pop(request)
        assert len(pages) >= len(rows)
        for page, units in zip(pages, rows, strict=False):
            self._rows |= {(page, n): row for n, row in enumerate(units) if row is not None}
        self._slots[slot] = replace(state, table=[])
        self.resumed += 1

    def forget(self, request: Request) -> None:
        self.parked.pop(request, None)

    def _prepare(self, plan: StepPlan) -> None:
        for start in plan.starts:
            *ends, state = states_of(start.request, start.position)
            if start.is_resumed:
                slot = self._slots[start.slot]
                assert (slot.position, slot.state, slot.ends) == (start.position, state, ends)
                if start.request.num_generated:
                    assert slot.last_token == start.request.tokens[-1]
                continue
            if start.checkpoint is None:
                assert start.position == 0
            else:
                assert self._checkpoints[start.checkpoint] == (start.position, state)
            self._slots[start.slot] = _Slot(start.position, state, ends)
        copied = {}
        for copy in plan.copies:
            assert copy.tokens % UNIT == 0 and 0 < copy.tokens < self._page_units * UNIT
            for unit in range(copy.tokens // UNIT):
                copied[copy.target, unit] = self._rows[copy.source, unit]
        self._rows |= copied
        for update in plan.tables:
            table = self._slots[update.slot].table
            assert update.first <= len(table), "a hole in a page table"
            table[update.first : update.first + len(update.pages)] = update.pages

    def _place(self, slot: _Slot, unit: int) -> tuple[int, int]:
        page, inner = divmod(unit, self._page_units)
        return slot.table[page], inner

    def _read(self, slot: _Slot) -> None:
        """Attention looks at everything in front of the position."""
        for unit, end in enumerate(slot.ends):
            assert self._rows[self._place(slot, unit)] == (end, UNIT), f"unit {unit} is wrong"
        if slot.position % UNIT:
            here = self._place(slot, slot.position // UNIT)
            assert self._rows[here] == (slot.state, slot.position % UNIT), "the open unit is wrong"

    def _step(self, slot: _Slot, token: int, poisoned: bool) -> None:
        place = self._place(slot, slot.position // UNIT)
        slot.state = advance(slot.state, token) ^ (12345 if poisoned else 0)
        slot.position += 1
        self.computed += 1
        self._rows[place] = slot.state, (slot.position - 1) % UNIT + 1
        if slot.position % UNIT == 0:
            slot.ends.append(slot.state)

    def _check_shapes(self, plan: StepPlan) -> None:
        """Only compiled shapes, every row inside its shape, every slot at most once."""
        config = self._config
        is_tail = (plan.prefill_batch, plan.chunk) == config.tail_shape
        assert is_tail or plan.chunk in (0, *config.chunk_sizes)
        assert is_tail or plan.prefill_batch in (0, *config.prefill_batches)
        assert plan.decode_batch in (0, *config.decode_batches)
        assert len(plan.prefill) <= plan.prefill_batch
        assert len(plan.decode) <= plan.decode_batch
        slots = [row.slot for row in (*plan.prefill, *plan.decode)]
        assert len(slots) == len(set(slots))
        assert slots or plan.starts or plan.snapshots, "a step for nothing"
        for row in plan.prefill:
            assert row.start % UNIT == 0 and 0 < len(row.tokens) <= plan.chunk
            assert len(row.tokens) % UNIT == 0 or row.samples, "only the last chunk may be odd"
            assert config.tail_shape is None or is_tail == self._is_tail(row)
        padded = plan.chunk * plan.prefill_batch + len(plan.decode)
        smallest = config.chunk_sizes[0] * config.prefill_batches[0] + len(plan.decode)
        if plan.decode:
            assert padded <= max(config.step_tokens, smallest)

    def _is_tail(self, row: PrefillRow) -> bool:
        """Whether the row's own prompt says that it is computed among others."""
        assert self._config.tail_shape is not None
        length = len(row.request.prompt)
        rest = length % UNIT
        return 0 < rest <= self._config.tail_shape[1] and row.start == length - rest

    def _check_writers(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """A page that is written is in one table, and cached units of it lie in front."""
        pages, size = scheduler.cache.pages, scheduler.cache.pages.page_tokens
        cached: dict[int, int] = {}
        for node in scheduler.cache.nodes.values():
            cached[node.page] = max(cached.get(node.page, 0), node.depth * UNIT)
        spans = [(row.slot, row.start, row.start + len(row.tokens)) for row in plan.prefill]
        spans += [(row.slot, self._slots[row.slot].position, row.stop) for row in plan.decode]
        for slot, start, end in spans:
            request = scheduler.slots.live[slot]
            for index in range(start // size, (end - 1) // size + 1):
                page = request.pages[index]
                assert page != SCRATCH_PAGE and pages.holders(page)[0] == 1, "a shared page"
                assert cached.get(page, 0) <= start, "a cached unit is overwritten"

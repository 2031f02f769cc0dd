"""Runs plans on the device. Belongs to the engine's thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv4_jax.sampling import (
    EVERYTHING,
    Knobs,
    Logprobs,
    count_uses,
    knobs_of,
    mask_words,
    no_bias,
)
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.device import Batch, Prompt, Sampled
from dsv4_jax.serving.engine.mirror import Mirror
from dsv4_jax.serving.engine.programs import Programs
from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.step import DecodeRow, PageCopy, PrefillRow, SlotStart, StepPlan
from dsv4_jax.serving.engine.stream import Payload
from dsv4_jax.serving.model import Allowed
from dsv4_jax.speculation import EMPTY

Row = PrefillRow | DecodeRow
PAGES_AT_ONCE = 16  # that leave or enter the device in one call


@dataclass
class Launched:
    """Rows of a step that were queued on the device, and results that are not there yet.

    `failed` holds rows that must not count, by slot: what went wrong with them on the host.
    """

    rows: Sequence[Row]
    sampled: Sampled
    scores: Logprobs | None = None
    failed: dict[int, Exception] = field(default_factory=dict)
    mask_s: float | None = None  # to fill the masks of guides, if there are any
    start_s: float = field(default_factory=time.monotonic)
    width: int = 1  # tokens that were computed of each row that decodes
    program: str = "prefill"  # what computes the rows

    def land(self) -> Landed:
        """Waits for the results; log-probabilities of prompts go to their requests at once."""
        drawn = np.asarray(self.sampled.tokens_BT)[: len(self.rows)].tolist()
        tokens = [[token for token in row if token != EMPTY] for row in drawn]
        payloads = [row.request.payload for row in self.rows]
        logprobs = None
        if any(payload.sampling.logprobs is not None for payload in payloads):
            logprobs = jax.device_get(self.sampled.logprobs)
        if self.scores is not None:
            scores = jax.device_get(self.scores)
            for i, row in enumerate(self.rows):
                if row.request.payload.sampling.prompt_logprobs is not None:
                    assert isinstance(row, PrefillRow)
                    row.request.payload.add_scores(row, scores, i)
        return Landed(self.rows, tokens, logprobs, self.failed)


class Landed(NamedTuple):
    """Results of a step on the host, in the order of its rows."""

    rows: Sequence[Row]
    tokens: list[list[int]]
    logprobs: Logprobs | None
    failed: dict[int, Exception]


@dataclass(frozen=True)
class _Fixed:
    """Device arrays of a batch that change only with its rows or their tables."""

    rows: tuple[tuple[int, Request], ...]
    tables: int  # version
    slots_B: Any
    table_BP: Any
    knobs: Any
    words_BW: Any
    host_words_BW: np.ndarray | None  # the same; None allows everything
    has_own: bool  # a row may have a mask that holds for one step


class Runner:
    """The device's state and what belongs to it on the host."""

    def __init__(self, programs: Programs | Mirror, config: SchedulerConfig) -> None:
        self.programs = programs
        self.state = programs.init()
        self._config = config
        self._scratch = config.num_slots
        shape = (config.num_slots + 1, programs.sizes.table_pages)
        self._tables = np.zeros(shape, np.int32)
        self._tables_version = 0
        self._fixed: dict[type, _Fixed] = {}
        self._blank: dict[tuple[Any, ...], Any] = {}  # constants on the device
        self._mask_words = mask_words(programs.vocab_size)

    def run(self, plan: StepPlan) -> list[Launched]:
        """Queues a step on the device.

        If this raises, `is_intact` says whether the state can still be used; what the plan was to
        do has been done in part.
        """
        for start in plan.starts:
            self._start(start)
        if plan.copies:
            self._copy(plan.copies)
        for update in plan.tables:
            end = update.first + len(update.pages)
            self._tables[update.slot, update.first : end] = update.pages
        self._tables_version += bool(plan.tables)
        launched = []
        if plan.prefill:
            launched.append(self._prefill(plan))
        if plan.decode:
            launched.append(self._decode(plan))
        for snapshot in plan.snapshots:
            slot, handle = np.int32(snapshot.slot), np.int32(snapshot.checkpoint)
            self.state = self.programs.save_rings(self.state, slot, handle)
        return launched

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles every program by running it on padding alone.

        progress: called with how many of the large programs are done, and how many there are.
        """
        programs, scratch, first = self.programs, np.int32(self._scratch), np.int32(0)
        config = self._config
        tasks: list[Callable[[], object]] = []
        for size in config.decode_batches:
            tasks += [partial(self._pad, which, size) for which in self._step_programs()]
        shapes = list(itertools.product(config.prefill_batches, config.chunk_sizes))
        for size, chunk in shapes + ([config.tail_shape] if config.tail_shape else []):
            tasks.append(partial(self._launch_prefill, self._padding(size), (), size, chunk))
        for done, task in enumerate(tasks):
            progress(done, len(tasks))
            task()
        progress(len(tasks), len(tasks))
        none = np.zeros(self._config.num_slots, np.int32)
        self.state = programs.copy_pages(self.state, none, none)
        self.state = programs.save_rings(self.state, scratch, first)
        self.state = programs.load_rings(self.state, scratch, first)
        self.state = programs.start_slot(self.state, scratch, first, first)
        uses = count_uses([0], [], programs.vocab_size)
        self.state = programs.set_uses(self.state, scratch, uses)
        # What comes back may still be on its way to the host, or be there: two signatures.
        for is_there in (False, True):
            self._warm_up_returns(is_there)
        jax.block_until_ready(self.state)

    def _step_programs(self) -> list[Callable[..., Any]]:
        config, programs = self._config, self.programs
        more = [programs.verify] * bool(config.guesses) + [programs.burst] * (config.burst > 1)
        return [programs.decode, *more]

    def _pad(self, program: Callable[..., Any], size: int) -> None:
        self.state, _ = program(self.programs.params, self.state, self._padding(size))

    def _warm_up_returns(self, is_there: bool) -> None:
        """Takes pages, a slot and a checkpoint out and puts them back."""
        programs, slot, handle = self.programs, np.int32(self._scratch), np.int32(0)
        owners: list[set[int]] = []  # of what was read, until here

        def out(tree: Any) -> Any:
            tree = jax.device_get(tree) if is_there else tree
            owners.append(set())
            programs.tie(owners[-1], tree)
            return tree

        for count in (1, PAGES_AT_ONCE):
            pages = np.zeros(count, np.int32)
            rows = out(programs.read_pages(self.state, pages))
            self.state = programs.write_pages(self.state, pages, rows)
        rings = out(programs.read_slot(self.state, slot))
        self.state = programs.write_slot(self.state, slot, rings)
        rings = out(programs.read_checkpoint(self.state, handle))
        self.state = programs.write_checkpoint(self.state, handle, rings)

    def is_intact(self) -> bool:
        """Whether the state is there and free of errors; waits for what is under way."""
        leaves = jax.tree.leaves(self.state)
        if any(leaf.is_deleted() for leaf in leaves):
            return False
        try:
            jax.block_until_ready(leaves)
        except Exception:  # whatever the runtime says: it concerns the state
            return False
        return True

    # Inside.

    def _start(self, start: SlotStart) -> None:
        programs, request, slot = self.programs, start.request, np.int32(start.slot)
        self._tables[start.slot] = 0
        self._tables_version += 1
        if start.checkpoint is not None:
            self.state = programs.load_rings(self.state, slot, np.int32(start.checkpoint))
        if request.num_generated:
            newest = np.int32(request.tokens[-1]), np.int32(len(request.tokens) - 1)
            self.state = programs.start_slot(self.state, slot, *newest)
        if request.payload.sampling.penalizes:
            generated = request.tokens[len(request.prompt) :]
            uses = count_uses(request.prompt, generated, programs.vocab_size)
            self.state = programs.set_uses(self.state, slot, uses)

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        pairs = np.zeros((2, self._config.num_slots), np.int32)
        for i, copy in enumerate(copies):
            pairs[:, i] = copy.source, copy.target
        self.state = self.programs.copy_pages(self.state, *pairs)

    def _decode(self, plan: StepPlan) -> Launched:
        rows_B3 = np.zeros((plan.decode_batch, 3), np.int32)
        rows_B3[: len(plan.decode)] = [(row.stop, 1, 1) for row in plan.decode]
        start_s = time.monotonic()
        batch, failed, mask_s = self._batch(plan.decode, rows_B3)
        name = "burst" if plan.burst else "decode" if plan.width == 1 else "verify"
        program = getattr(self.programs, name)
        self.state, sampled = program(self.programs.params, self.state, batch)
        sampled.tokens_BT.copy_to_host_async()
        return Launched(plan.decode, sampled, None, failed, mask_s, start_s, plan.width, name)

    def _prefill(self, plan: StepPlan) -> Launched:
        rows_B3 = np.zeros((plan.prefill_batch, 3), np.int32)
        for i, row in enumerate(plan.prefill):
            rows_B3[i] = row.start, len(row.tokens), row.samples
        start_s = time.monotonic()
        batch, failed, mask_s = self._batch(plan.prefill, rows_B3)
        sampled, scores = self._launch_prefill(batch, plan.prefill, plan.prefill_batch, plan.chunk)
        return Launched(plan.prefill, sampled, scores, failed, mask_s, start_s)

    def _launch_prefill(
        self, batch: Batch, rows: Sequence[PrefillRow], size: int, chunk: int
    ) -> tuple[Sampled, Logprobs | None]:
        tokens, scored = np.zeros((size, chunk), np.int32), np.zeros(size, bool)
        behind = np.zeros(size, np.int32)
        targets: Any = None
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            end = row.start + len(row.tokens)
            behind[i] = row.request.tokens[end] if end < len(row.request.tokens) else 0
            if row.request.payload.sampling.prompt_logprobs is not None:
                targets = np.zeros_like(tokens) if targets is None else targets
                judged = row.request.prompt[row.start + 1 : end + 1]
                targets[i, : len(judged)] = judged
                scored[i] = True
        is_scored = targets is not None
        if not is_scored:
            targets = self._constant((size, chunk), 0, np.int32)
        self.state, sampled, scores = self.programs.prefill(
            self.programs.params, self.state, batch, Prompt(tokens, targets, scored, behind)
        )
        sampled.tokens_BT.copy_to_host_async()
        return sampled, scores if is_scored else None

    def _batch(
        self, rows: Sequence[Row], rows_B3: np.ndarray
    ) -> tuple[Batch, dict[int, Exception], float | None]:
        """The batch, rows whose guides failed, and the seconds that guides took."""
        fixed = self._fixed_of(rows, len(rows_B3))
        start_s = time.monotonic()
        words, failed = self._masks(rows, fixed, len(rows_B3))
        has_guides = fixed.has_own and any(row.request.guided for row in rows)
        mask_s = time.monotonic() - start_s if has_guides else None
        return Batch(rows_B3, fixed.slots_B, fixed.table_BP, fixed.knobs, words), failed, mask_s

    def _fixed_of(self, rows: Sequence[Row], size: int) -> _Fixed:
        """What stays on the device from step to step while the same requests run."""
        key, kind = tuple((row.slot, row.request) for row in rows), type(rows[0])
        last = self._fixed.get(kind)
        if last is not None and (last.rows != key or len(last.slots_B) != size):
            last = None
        if last is not None and last.tables == self._tables_version:
            return last
        slots = np.full(size, self._scratch, np.int32)
        slots[: len(rows)] = [row.slot for row in rows]
        payloads = [row.request.payload for row in rows]
        if last is None:
            values = [(payload.sampling, payload.key_2) for payload in payloads]
            host_words = self._allowed(rows, size)
            slots_B, knobs = self.programs.put(slots), self._placed(knobs_of(values, size))
            words = self._everything(size) if host_words is None else self.programs.put(host_words)
        else:
            slots_B, knobs = last.slots_B, last.knobs
            words, host_words = last.words_BW, last.host_words_BW
        table_BP = self.programs.put(self._tables[slots])
        has_own = any(payload.guide or payload.has_early for payload in payloads)
        version = self._tables_version
        fixed = _Fixed(key, version, slots_B, table_BP, knobs, words, host_words, has_own)
        self._fixed[kind] = fixed
        return fixed

    def _placed(self, knobs: Knobs) -> Knobs:
        """Knobs on the device; most batches have no bias, and what says so is there already."""
        size = len(knobs.bias_BJ)
        none = no_bias(size)
        if knobs.bias_BJ is not none[1]:
            return self.programs.put(knobs)
        key = (size, "no bias")
        if key not in self._blank:
            self._blank[key] = self.programs.put(none)
        ids_BJ, bias_BJ = self._blank[key]
        rest = self.programs.put(knobs._replace(bias_ids_BJ=None, bias_BJ=None))
        return rest._replace(bias_ids_BJ=ids_BJ, bias_BJ=bias_BJ)

    def _allowed(self, rows: Sequence[Row], size: int) -> np.ndarray | None:
        """Masks that stay while the rows do; None allows everything."""
        masks = [row.request.payload.allowed for row in rows]
        if not any(masks):
            return None
        words = np.full((size, self._mask_words), EVERYTHING, np.uint32)
        for i, mask in enumerate(masks):
            if mask is not None:
                words[i] = mask.words_W
        return words

    def _masks(
        self, rows: Sequence[Row], fixed: _Fixed, size: int
    ) -> tuple[Any, dict[int, Exception]]:
        """Masks of a step, filled while the device works on the steps before."""
        failed: dict[int, Exception] = {}
        words: np.ndarray | None = None
        for i, row in enumerate(rows if fixed.has_own else ()):
            try:
                mine = _own_mask(row, self._mask_words)
            except Exception as error:  # foreign code: it costs this request and no other
                failed[row.slot] = error
                continue
            if mine is None:
                continue
            if words is None:
                words = self._copied(fixed.host_words_BW, size)
            words[i] = mine
        return (fixed.words_BW if words is None else words), failed

    def _copied(self, words_BW: np.ndarray | None, size: int) -> np.ndarray:
        if words_BW is not None:
            return words_BW.copy()
        return np.full((size, self._mask_words), EVERYTHING, np.uint32)

    def _everything(self, size: int) -> Any:
        return self._constant((size, self._mask_words), EVERYTHING, np.uint32)

    def fitted(self, allowed: Allowed | None) -> Allowed | None:
        """The same for the model's vocabulary, which may be larger than that of the words.

        Raises:
            ValueError: it is smaller.
        """

        def fit(words_W: np.ndarray) -> np.ndarray:
            if len(words_W) > self._mask_words:
                raise ValueError(f"a mask of {len(words_W)} words is too long for this model")
            return np.pad(words_W, (0, self._mask_words - len(words_W)))

        if allowed is None:
            return None
        early = None if allowed.early_W is None else fit(allowed.early_W)
        return replace(allowed, words_W=fit(allowed.words_W), early_W=early)

    def _constant(self, shape: tuple[int, ...], value: int, dtype: type) -> Any:
        key = (*shape, value, dtype)
        if key not in self._blank:
            self._blank[key] = self.programs.put(np.full(shape, value, dtype))
        return self._blank[key]

    def _padding(self, size: int) -> Batch:
        """A batch of nothing."""
        return Batch(
            np.zeros((size, 3), np.int32),
            self.programs.put(np.full(size, self._scratch, np.int32)),
            self.programs.put(self._tables[np.full(size, self._scratch)]),
            self.programs.put(knobs_of([], size)),
            self._everything(size),
        )


def _own_mask(row: Row, width: int) -> np.ndarray | None:
    """A mask that holds for this step only, None if there is none.

    Raises:
        ValueError: it allows nothing. Exception: what the guide raised.
    """
    payload: Payload = row.request.payload
    if not (isinstance(row, DecodeRow) or row.samples):
        return None
    allowed, words_W = payload.allowed, None
    if allowed is not None and payload.has_early and _drawn(row) < allowed.early:
        words_W = allowed.early_W
    if payload.guide is None:
        return words_W
    mine = np.full(width, EVERYTHING, np.uint32)
    if not payload.guide.fill(mine):
        return words_W
    if words_W is None and allowed is not None:
        words_W = allowed.words_W
    if words_W is not None:
        mine &= words_W
    if not mine.any():
        raise ValueError("the guide allows no token at all")
    return mine


def _drawn(row: Row) -> int:
    """Tokens drawn before the one that this row draws."""
    end = row.start + len(row.tokens) if isinstance(row, PrefillRow) else row.stop
    return end - len(row.request.prompt)

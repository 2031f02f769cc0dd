"""The engine: one thread that plans steps, runs them on the device, and hands out tokens."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import page_unit
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.checkpoints import CheckpointPool
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.device import Batch, Programs, Sizes
from dsv4_jax.serving.engine.metrics import Metrics
from dsv4_jax.serving.engine.pages import PageAllocator
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.scheduler import Scheduler
from dsv4_jax.serving.engine.step import DecodeRow, PrefillRow, StepPlan
from dsv4_jax.serving.engine.units import UNIT

log = logging.getLogger(__name__)
LOOK_AHEAD = 2  # steps under way: the device works on one while the host reads the other
IDLE_WAIT_S = 0.5


class EngineError(RuntimeError):
    """A request that the engine could not finish."""


class EngineFull(RuntimeError):
    """A request that was refused at once. `retry_after_s`: when to try again."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(f"the engine refuses requests now: {reason}")
        self.reason, self.retry_after_s = reason, retry_after_s


@dataclass(eq=False)
class _Payload:
    """What the loop keeps of a request: its sampling numbers and where its tokens go."""

    sampling: SamplingParams
    key_2: np.ndarray
    out: queue.SimpleQueue[int | FinishReason] = field(default_factory=queue.SimpleQueue)


class Engine:
    """Continuous batching over a fixed set of compiled shapes; a `TokenModel` of many streams.

    Raises:
        ValueError: sizes that contradict each other.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num: Numerics,
        params: Params,
        scheduling: SchedulerConfig,
        sizes: Sizes,
        fingerprint: str = "",
    ) -> None:
        if sizes.slots != scheduling.num_slots or sizes.max_len != scheduling.max_len:
            raise ValueError("sizes of device and scheduler differ")
        if UNIT % page_unit(cfg):
            raise ValueError(
                f"compress_ratios need pages of {page_unit(cfg)} tokens; the unit here is {UNIT}"
            )
        self.max_len, self.metrics = scheduling.max_len, Metrics()
        self.config = scheduling
        self.programs = Programs(cfg, num, params, sizes)
        self.pages = PageAllocator(sizes.pages, sizes.page_tokens)
        store = CheckpointPool(sizes.checkpoints)
        cache = PrefixCache(self.pages, store, fingerprint)
        self.scheduler = Scheduler(scheduling, cache, time.monotonic, self.metrics)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ids = itertools.count()
        self._state = self.programs.init()
        self._stopping = False
        self.failure: BaseException | None = None
        self._tables = np.zeros((sizes.slots + 1, sizes.table_pages), np.int32)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # What clients call, from any thread.

    def start(self) -> None:
        """Starts the engine's thread; call `warm_up` first."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests and the thread."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop_ids: frozenset[int],
        tenant: str = "",
        request_id: str | None = None,
    ) -> Generator[int]:
        """Yields sampled ids, the final stop id included; closing the iterator cancels.

        Raises:
            EngineFull: refused at once. EngineError: the engine failed or is shutting down.
            ValueError: the prompt is empty or too long.
        """
        key_2 = np.asarray(jax.random.key_data(sampling.key()))
        payload = _Payload(sampling, key_2)
        request = Request(
            id=request_id or f"r{next(self._ids)}",
            prompt=prompt_ids,
            max_tokens=sampling.max_tokens,
            tenant=tenant,
            stop_ids=stop_ids,
            payload=payload,
        )
        with self._work:
            if self.failure or self._stopping:
                raise EngineError("the engine has stopped") from self.failure
            rejection = self.scheduler.submit(request)
            if rejection is not None:
                raise EngineFull(rejection.reason, rejection.retry_after_s)
            self._work.notify_all()
        return self._tokens(request, payload)

    def _tokens(self, request: Request, payload: _Payload) -> Generator[int]:
        try:
            while isinstance(item := payload.out.get(), int):
                yield item
            if item not in (FinishReason.STOP, FinishReason.LENGTH):
                raise EngineError(f"the request ended early: {item}") from self.failure
        finally:
            request.cancel()

    # The engine's thread.

    def warm_up(self) -> None:
        """Compiles every program by running it on padding rows alone."""
        config, programs, state = self.config, self.programs, self._state
        for size in config.decode_batches:
            state, tokens, _ = programs.decode(programs.params, state, programs.empty_batch(size))
        for chunk, size in itertools.product(config.chunk_sizes, config.prefill_batches):
            blank = np.zeros((size, chunk), np.int32)
            batch = programs.empty_batch(size)
            state, tokens, _ = programs.prefill(programs.params, state, batch, blank)
        jax.random.key_data(SamplingParams(1, seed=0).key())
        none = np.zeros(config.num_slots, np.int32)
        state = programs.copy_pages(state, none, none)
        scratch, first = jnp.int32(config.num_slots), jnp.int32(0)
        state = programs.save_rings(state, scratch, first)
        self._state = jax.block_until_ready(programs.load_rings(state, scratch, first))

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.exception("the engine stopped")
            self.failure = error
        with self._lock:
            self.scheduler.abort_all(FinishReason.ERROR if self.failure else FinishReason.SHUTDOWN)
            self._report()

    def _loop(self) -> None:
        under_way: deque[tuple[StepPlan, list[Any]]] = deque()
        while True:
            with self._work:
                if self._stopping:
                    return
                plan = self.scheduler.plan() if len(under_way) < LOOK_AHEAD else None
                self._report()
                if plan is None and not under_way:
                    self._work.wait(IDLE_WAIT_S)
                    continue
            if plan is not None:
                under_way.append((plan, self._launch(plan)))
            if plan is None or len(under_way) == LOOK_AHEAD:
                self._collect(*under_way.popleft())

    def _report(self) -> None:
        for request in self.scheduler.take_finished():
            request.payload.out.put(request.finish_reason)

    def _launch(self, plan: StepPlan) -> list[Any]:
        """Queues a step on the device; returns its results, which are not there yet."""
        programs, state, results = self.programs, self._state, []
        for start in plan.starts:
            self._tables[start.slot] = 0
            if start.checkpoint is not None:
                handle = jnp.int32(start.checkpoint)
                state = programs.load_rings(state, jnp.int32(start.slot), handle)
        if plan.copies:
            pairs = np.zeros((2, self.config.num_slots), np.int32)
            for i, copy in enumerate(plan.copies):
                pairs[:, i] = copy.source, copy.target
            state = programs.copy_pages(state, *pairs)
        for update in plan.tables:
            self._tables[update.slot, update.first : update.first + len(update.pages)] = (
                update.pages
            )
        if plan.prefill:
            batch = self._batch(plan.prefill, plan.prefill_batch)
            tokens = np.zeros((plan.prefill_batch, plan.chunk), np.int32)
            for i, row in enumerate(plan.prefill):
                tokens[i, : len(row.tokens)] = row.tokens
            state, *out = programs.prefill(programs.params, state, batch, tokens)
            results.append((plan.prefill, out))
        if plan.decode:
            batch = self._batch(plan.decode, plan.decode_batch)
            state, *out = programs.decode(programs.params, state, batch)
            results.append((plan.decode, out))
        for snapshot in plan.snapshots:
            handle = jnp.int32(snapshot.checkpoint)
            state = programs.save_rings(state, jnp.int32(snapshot.slot), handle)
        self._state = state
        return results

    def _batch(self, rows: Sequence[PrefillRow] | Sequence[DecodeRow], size: int) -> Batch:
        batch = self.programs.empty_batch(size)
        for i, row in enumerate(rows):
            is_prefill = isinstance(row, PrefillRow)
            payload: _Payload = row.request.payload
            batch.slots_B[i] = row.slot
            batch.pos_B[i] = row.start if is_prefill else row.position
            batch.count_B[i] = len(row.tokens) if is_prefill else 1
            batch.table_BP[i] = self._tables[row.slot]
            batch.keys_B2[i] = payload.key_2
            batch.temperature_B[i] = payload.sampling.temperature
            batch.top_p_B[i] = payload.sampling.top_p
            batch.top_k_B[i] = payload.sampling.top_k
        return batch

    def _collect(self, plan: StepPlan, results: list[Any]) -> None:
        """Waits for a step, advances the requests, and sends tokens to their readers."""
        tokens: dict[int, int] = {}
        failed: set[int] = set()
        for rows, (sampled, finite) in results:
            sampled, finite = np.asarray(sampled), np.asarray(finite)
            for i, row in enumerate(rows):
                tokens[row.slot] = int(sampled[i])
                if not finite[i]:
                    failed.add(row.slot)
        with self._lock:
            for delivery in self.scheduler.complete(plan.step, tokens, failed):
                delivery.request.payload.out.put(delivery.token)
            self._report()

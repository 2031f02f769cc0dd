"""The engine: one thread that plans steps, runs them on the device, and hands out tokens."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from dsv4_jax.cache import page_unit
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.blobs import BlobStore
from dsv4_jax.serving.engine.checkpoints import CheckpointPool
from dsv4_jax.serving.engine.compiles import compiled_here
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.device import FAILED, Sizes
from dsv4_jax.serving.engine.disk import DiskTier, layout_of
from dsv4_jax.serving.engine.host_memory import HostMemory
from dsv4_jax.serving.engine.metrics import Metrics
from dsv4_jax.serving.engine.mirror import Mirror, ProcessLost, Sender
from dsv4_jax.serving.engine.pace import Pace
from dsv4_jax.serving.engine.pages import PageAllocator
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.programs import Programs
from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.runner import Landed, Launched, Row, Runner
from dsv4_jax.serving.engine.scheduler import Delivery, Scheduler
from dsv4_jax.serving.engine.step import StepPlan
from dsv4_jax.serving.engine.stream import EngineError, Payload, RequestStream, SlowReader, token_of
from dsv4_jax.serving.engine.units import UNIT
from dsv4_jax.serving.engine.watchdog import EngineStuck, Watchdog
from dsv4_jax.serving.model import Allowed, TokenGuide, TokenStream
from sharding.shards import SINGLE, Shards

log = logging.getLogger(__name__)
LOOK_AHEAD = 2  # steps under way: the device works on one while the host reads the other
IDLE_WAIT_S = 0.5
STEP_TIMEOUT_S = 300.0
LAST_WRITES_S = 10.0  # for what is still to go to disk at the end


class EngineFull(RuntimeError):
    """A request that was refused at once. `retry_after_s`: when to try again."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(f"the engine refuses requests now: {reason}")
        self.reason, self.retry_after_s = reason, retry_after_s


class NotFinite(ArithmeticError):
    """Logits that hold NaN or infinity."""


class DiskCache(NamedTuple):
    """A folder for what the prefix cache and the replay store keep, and its bytes at most."""

    folder: str
    capacity: int


class Step(NamedTuple):
    """A step under way; without results, it failed when it was launched."""

    plan: StepPlan
    launched: list[Launched]


class Engine:
    """Continuous batching over a fixed set of compiled shapes; a `TokenModel` of many streams.

    Args:
        cfg: The model,
        num: its numerics,
        params: and weights.
        scheduling: Sizes and limits of the scheduler.
        sizes: What to allocate.
        fingerprint: Changes with anything that changes what the prefix cache holds.
        host_cache_bytes: Host memory for what the prefix cache evicts.
        step_timeout_s: A step that takes longer ends the engine.
        model_name: What metrics call the model.
        metrics_prefix: Stands in front of their names.
        shards: The mesh its weights are spread over, by the rules `ENGINE`.
        channel: To the other processes of the mesh, which `mirror.follow` it.
        disk_cache: Where prefixes outlive the process; None keeps none.
        adapts: Guesses only while that pays.

    Raises:
        ValueError: sizes that contradict each other, or the folder cannot be used.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num: Numerics,
        params: Params,
        scheduling: SchedulerConfig,
        sizes: Sizes,
        fingerprint: str = "",
        host_cache_bytes: int = 0,
        step_timeout_s: float = STEP_TIMEOUT_S,
        model_name: str = "",
        metrics_prefix: str = "dsv4:",
        shards: Shards = SINGLE,
        channel: Sender | None = None,
        disk_cache: DiskCache | None = None,
        adapts: bool = True,
    ) -> None:
        if sizes.slots != scheduling.num_slots or sizes.max_len != scheduling.max_len:
            raise ValueError("sizes of device and scheduler differ")
        if sizes.guesses != scheduling.guesses:
            raise ValueError("guesses of device and scheduler differ")
        if sizes.burst != scheduling.burst:
            raise ValueError("bursts of device and scheduler differ")
        if sizes.guesses and not cfg.num_mtp_layers:
            raise ValueError(f"guesses={sizes.guesses} need an MTP block, which this model lacks")
        if UNIT % page_unit(cfg):
            raise ValueError(
                f"compress_ratios need pages of {page_unit(cfg)} tokens; the unit here is {UNIT}"
            )
        if host_cache_bytes < 0 or step_timeout_s <= 0:
            raise ValueError("host_cache_bytes must not be negative, step_timeout_s positive")
        self.max_len, self.config = scheduling.max_len, scheduling
        self.metrics = metrics = Metrics(model_name, scheduling.max_len, metrics_prefix)
        programs = Programs(cfg, num, params, sizes, shards)
        self._mirror = None if channel is None else Mirror(programs, channel)
        self.runner = Runner(self._mirror or programs, scheduling)
        self.pages = PageAllocator(sizes.pages, sizes.page_tokens)

        def evicted(tier: str) -> None:
            metrics.count("prefix_cache_evictions", tier=tier)

        self.host = HostMemory(self.runner, host_cache_bytes, lambda: evicted("host"))
        store = CheckpointPool(sizes.checkpoints)
        tier = self.host if host_cache_bytes or disk_cache else None
        cache = PrefixCache(self.pages, store, fingerprint, tier, evicted)
        self.pace = Pace(scheduling.guesses, adapts)
        args = (scheduling, cache, self.host, time.monotonic, metrics, self.pace)
        self.scheduler = Scheduler(*args)
        self._landed_s = 0.0  # when the newest results came
        metrics.describe(
            "cache_config_info",
            "Sizes of the cache.",
            page_tokens=sizes.page_tokens,
            num_pages=self.pages.num_usable,
            num_slots=sizes.slots,
            num_checkpoints=sizes.checkpoints,
            max_len=sizes.max_len,
            host_bytes=host_cache_bytes,
        )
        metrics.watch("host_cache_usage_perc", lambda: self.host.used / max(host_cache_bytes, 1))
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self.disk = None if disk_cache is None else self._open_disk(disk_cache, fingerprint)
        metrics.watch("disk_cache_bytes", lambda: self.disk.store.used if self.disk else 0)
        self._ids = itertools.count()
        self._ready: set[Payload] = set()  # with tokens that no reader has yet
        self._flushes: list[Future[int]] = []
        self._stopping = False
        self.failure: BaseException | None = None
        self._compiled = 0  # by the engine's thread
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = Watchdog(step_timeout_s, lambda: self.busy_s, self.fail)

    def _open_disk(self, where: DiskCache, fingerprint: str) -> DiskTier:
        def count(event: str) -> None:
            self.metrics.count("disk_cache_events", event=event)

        name = f"{fingerprint or 'model'}-{layout_of(self.runner.state).digest}"
        store = BlobStore(where.folder, name, where.capacity, count)
        cache = self.scheduler.cache
        tier = DiskTier(self.runner, cache, self.host, store, self._work, time.monotonic, count)
        cache.on_attach = tier.keep
        return tier

    # What clients call, from any thread.

    def start(self) -> None:
        """Starts the engine's thread; call `warm_up` first. From here on nothing may compile."""
        self._thread.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Ends all requests and the thread."""
        self._watchdog.stop()
        with self._work:
            self._stopping = True
            self._work.notify_all()
        if self._thread.is_alive():
            self._thread.join(1.0 if isinstance(self.failure, EngineStuck | ProcessLost) else None)
        if self._mirror is not None and self.failure is None:
            self._mirror.end()
        if self.disk is not None:
            self.disk.close()

    def fail(self, reason: BaseException) -> None:
        """Ends all requests with an error, and takes no more.

        From any thread: the engine's own never holds the lock while it waits for the device.
        """
        self.failure = self.failure or reason
        self._end_all(self.failure)

    def drain(self) -> None:
        """Refuses new requests from now on; those that were taken go on."""
        with self._lock:
            self.scheduler.drain()

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop_ids: frozenset[int],
        *,
        tenant: str = "",
        request_id: str | None = None,
        guide: TokenGuide | None = None,
        after: TokenStream | None = None,
        keep_output: bool = False,
        checkpoints: Sequence[int] = (),
        allowed: Allowed | None = None,
        priority: int = 0,
        continues: bool = False,
    ) -> RequestStream:
        """Queues a request; see `TokenModel.stream`.

        Raises:
            EngineFull: refused at once. EngineError: the engine failed or is shutting down.
            ValueError: the prompt is empty or too long, or an id is outside the vocabulary.
        """
        if after is not None and not isinstance(after, RequestStream):
            raise ValueError("after must be a stream of this engine")
        self._check_ids(prompt_ids, sampling)
        allowed = self.runner.fitted(allowed)
        payload = Payload(sampling, guide, sampling.key_words(), allowed=allowed)
        request = Request(
            id=request_id or f"r{next(self._ids)}",
            prompt=prompt_ids,
            max_tokens=sampling.max_tokens,
            tenant=tenant,
            priority=priority,
            stop_ids=stop_ids,
            checkpoints=checkpoints,
            keep_output=keep_output,
            guided=guide is not None,
            early=allowed.early if payload.has_early and allowed is not None else 0,
            reuse_prefix=sampling.prompt_logprobs is None,
            continues=continues,
            leader=after.request if after is not None else None,
            payload=payload,
        )
        with self._work:
            if self.failure or self._stopping:
                raise EngineError("the engine has stopped") from self.failure
            rejection = self.scheduler.submit(request)
            if rejection is not None:
                raise EngineFull(rejection.reason, rejection.retry_after_s)
            if self.disk is not None and request.reuse_prefix:
                self.disk.fetch(request)
            self._work.notify_all()
        return RequestStream(request, payload)

    def flush_cache(self) -> int:
        """Forgets the cached prefixes that no request uses, and all on the host and on disk.

        Returns:
            Tokens that were forgotten on the device.

        Raises:
            EngineError: the engine has stopped.
        """
        done: Future[int] = Future()
        with self._work:
            if self.failure or self._stopping:
                raise EngineError("the engine has stopped") from self.failure
            self._flushes.append(done)
            self._work.notify_all()
        tokens = done.result()
        if self.disk is not None:
            self.disk.clear()
        return tokens

    @property
    def busy_s(self) -> float:
        """Seconds its thread has been at the same step; 0 while it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _check_ids(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        size = self.runner.programs.vocab_size
        prompt = np.asarray(prompt_ids, np.int64)
        if prompt.size and not 0 <= prompt.min() <= prompt.max() < size:
            raise ValueError(f"the prompt holds an id outside the vocabulary of {size}")
        wrong = [token for token, _ in sampling.logit_bias if token >= size]
        if wrong:
            raise ValueError(f"logit_bias names id {wrong[0]}; the vocabulary has {size}")

    # The engine's thread.

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles every program by running it on padding rows alone; see `Runner.warm_up`."""
        self.runner.warm_up(progress)

    def _run(self) -> None:
        try:
            self._loop()
            if self.disk is not None and not self.failure:
                self.disk.finish(LAST_WRITES_S)
        except BaseException as error:
            log.exception("the engine stopped")
            self.failure = self.failure or error
        self._busy_since = None
        self._end_all(self.failure)

    def _end_all(self, failure: BaseException | None) -> None:
        """Ends every request: with an error, or because the engine shuts down."""
        with self._lock:
            for request in self.scheduler.requests():
                request.payload.error = request.payload.error or failure
            self.scheduler.abort_all(FinishReason.ERROR if failure else FinishReason.SHUTDOWN)
            self._report()
            for done in self._flushes:
                done.set_exception(EngineError("the engine has stopped"))
            self._flushes.clear()

    def _flush(self) -> None:
        """Empties the prefix cache for those who asked."""
        if not self._flushes:
            return
        cache = self.scheduler.cache
        before = len(cache.nodes)
        cache.flush()
        self.host.clear()
        if self.disk is not None:
            self.disk.forget()
        for done in self._flushes:
            done.set_result((before - len(cache.nodes)) * UNIT)
        self._flushes.clear()

    def _loop(self) -> None:
        under_way: deque[Step] = deque()
        while True:
            with self._work:
                if self._stopping or self.failure:
                    return
                self._busy_since = time.monotonic()
                self._flush()
                plan = self.scheduler.plan() if len(under_way) < LOOK_AHEAD else None
                self._report()
                self.host.unstage()
                if plan is None and not under_way:
                    self._hand_out()
                    if self.disk is not None and self.disk.pump():
                        continue
                    self._busy_since = None
                    self._work.wait(IDLE_WAIT_S)
                    continue
            if plan is not None:
                under_way.append(self._launch(plan))
            self._hand_out()
            if plan is None or len(under_way) == LOOK_AHEAD:
                self._collect(under_way.popleft())
            self._count_compiles()

    def _report(self) -> None:
        for request in self.scheduler.take_finished():
            request.payload.end(request.finish_reason)

    def _count_compiles(self) -> None:
        if (total := compiled_here()) > self._compiled:
            self.metrics.count("compilations_after_ready", total - self._compiled)
            self._compiled = total

    def _launch(self, plan: StepPlan) -> Step:
        """Queues a step on the device."""
        try:
            return Step(plan, self.runner.run(plan))
        except Exception as error:
            self._survive(plan, error)
            return Step(plan, [])

    def _survive(self, plan: StepPlan, error: Exception) -> None:
        """Ends the requests of a failed step; the engine goes on if its state is unharmed."""
        log.exception("step %d failed", plan.step)
        if not self.runner.is_intact():
            raise error
        with self._lock:
            for part in (*plan.starts, *plan.prefill, *plan.decode):
                self._fail(part.request, error)

    def _fail(self, request: Request, error: BaseException) -> None:
        request.payload.error = request.payload.error or error
        self.scheduler.finish(request, FinishReason.ERROR)

    def _collect(self, step: Step) -> None:
        """Waits for a step, advances the requests, and sends tokens to their readers."""
        plan, landed = step.plan, []
        try:
            for part in step.launched:
                landed.append(part.land())
                self._measure(part, len(step.launched) == 1)
        except Exception as error:
            self._survive(plan, error)
        self.host.settle()
        if self.disk is not None:
            self.disk.pump()
        failed = {row.slot for row in (*plan.prefill, *plan.decode)}
        tokens: dict[int, list[int]] = {}
        places: dict[Request, tuple[Landed, int]] = {}
        for part in landed:
            for i, (row, drawn) in enumerate(zip(part.rows, part.tokens, strict=True)):
                tokens[row.slot], places[row.request] = drawn, (part, i)
                if (error := self._error_of(row, drawn, part)) is None:
                    failed.remove(row.slot)
                else:
                    row.request.payload.error = error
        with self._lock:
            deliveries = self.scheduler.complete(plan.step, tokens, failed)
        for delivery in deliveries:
            self._deliver(delivery, *places[delivery.request])
        with self._lock:
            self._report()

    def _measure(self, part: Launched, is_alone: bool) -> None:
        """Notes what a program took; `is_alone`: it was the only one of its step."""
        now_s = time.monotonic()
        self.metrics.step(part.program, now_s - part.start_s)
        begin_s, self._landed_s = max(part.start_s, self._landed_s), now_s
        if part.program in ("decode", "verify") and is_alone:
            self.pace.took(len(part.rows), part.width, now_s - begin_s)
        if part.mask_s is not None:
            self.metrics.observe("grammar_mask_seconds", part.mask_s)

    def _error_of(self, row: Row, tokens: Sequence[int], part: Landed) -> Exception | None:
        """Why a row must not count."""
        if FAILED in tokens:
            self.metrics.count("nan_logits")
            return NotFinite("the model's logits hold NaN or infinity")
        if row.slot in part.failed:
            self.metrics.count("grammar_errors")
        return part.failed.get(row.slot)

    def _deliver(self, delivery: Delivery, part: Landed, index: int) -> None:
        request, payload = delivery.request, delivery.request.payload
        if payload.is_behind:
            log.warning("request %s: its reader is too slow", request.id)
            with self._lock:
                self._fail(request, SlowReader("the stream is read more slowly than it grows"))
            return
        best = payload.sampling.logprobs
        for at, token in enumerate(delivery.tokens):
            if payload.guide is not None and not self._guide(request, token):
                break
            payload.ready.append(token_of(token, part.logprobs, (index, at), best))
        self._ready.add(payload)

    def _guide(self, request: Request, token: int) -> bool:
        """Tells a request's guide a token; a refusal ends the request."""
        try:
            request.payload.guide.advance(token)
        except Exception as error:  # foreign code: it costs this request and no other
            self.metrics.count("grammar_errors")
            log.warning("request %s: its guide refused a token: %r", request.id, error)
            with self._lock:
                self._fail(request, error)
            return False
        return True

    def _hand_out(self) -> None:
        """Wakes readers, best while the device works: they contend with this thread."""
        now_s = time.monotonic()
        self._ready = {payload for payload in self._ready if not payload.hand_out(now_s)}

"""Schedulers on a fake device and a fake clock."""

from collections import deque

from dsv4_jax.serving.engine.checkpoints import CheckpointPool
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.pages import PageAllocator
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.scheduler import Delivery, Scheduler
from dsv4_jax.serving.engine.step import StepPlan
from tests.serving.engine.device import FakeDevice, solo


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def small_config(**changes) -> SchedulerConfig:
    sizes = {
        "num_slots": 4,
        "max_len": 4096,
        "decode_batches": (1, 2, 4),
        "chunk_sizes": (128, 256),
        "prefill_batches": (1, 2),
        "step_tokens": 512,
        "checkpoint_every": 512,
        "reserve_tokens": 64,
        "quantum": 256,
    }
    return SchedulerConfig(**(sizes | changes))  # pyright: ignore[reportArgumentType]


class Engine:
    """The loop of a real engine, step by step: `launch` plans and runs, `land` brings results."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        num_pages: int = 65,
        page_tokens: int = 128,
        checkpoints: int = 32,
        host: bool = False,
        look_ahead: int = 2,
    ) -> None:
        self.look_ahead = look_ahead
        self.clock = Clock()
        self.config = config or small_config()
        self.pages = PageAllocator(num_pages, page_tokens)
        self.pool = CheckpointPool(checkpoints)
        self.device = FakeDevice(self.config, page_tokens)
        self.cache = PrefixCache(self.pages, self.pool, "model", self.device if host else None)
        self.scheduler = Scheduler(self.config, self.cache, self.device, self.clock)
        self.finished: list[Request] = []
        self.plans: list[StepPlan] = []
        self.delivered: dict[Request, int] = {}
        self._results: deque[tuple[int, dict[int, list[int]], set[int]]] = deque()

    def submit(self, *requests: Request) -> None:
        for request in requests:
            assert self.scheduler.submit(request) is None

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
            self._results.append((plan.step, *self.device.run(plan, self.scheduler)))
        else:
            assert self._results or not self.scheduler.has_work, "work is left and nothing is done"
        self._collect()
        return plan

    def land(self) -> list[Delivery]:
        step, sampled, failed = self._results.popleft()
        deliveries = self.scheduler.complete(step, sampled, failed)
        for delivery in deliveries:
            assert delivery.index == self.delivered.setdefault(delivery.request, 0)
            self.delivered[delivery.request] += len(delivery.tokens)
        self._collect()
        return deliveries

    def step(self, seconds: float = 0.01) -> list[Delivery]:
        """One turn of the loop, which plans ahead of the results."""
        self.clock.now += seconds
        launched = self.launch() if len(self._results) < self.look_ahead else None
        if self._results and (launched is None or len(self._results) == self.look_ahead):
            return self.land()
        return []

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def check(self) -> None:
        self.scheduler.check()
        assert set(self.device.parked) <= set(self.scheduler.preempted)
        assert sorted(self.scheduler.checkpoints()) == sorted(self.pool.taken)

    def check_idle(self) -> None:
        """Nothing is held but the cache, and the cache lets go of everything."""
        self.check()
        assert not self.scheduler.has_work and not self.pages.num_held
        assert not self.device.parked
        self.cache.flush()
        assert self.pages.num_free == self.pages.num_usable and not self.pool.taken
        assert not self.cache.nodes

    def _collect(self) -> None:
        for request in self.scheduler.take_finished():
            self.finished.append(request)
            check_output(request)


def check_output(request: Request) -> None:
    """What was generated is what the request would have generated alone."""
    generated, expected = request.tokens[len(request.prompt) :], solo(request)
    if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        assert generated == expected
    else:
        assert generated == expected[: len(generated)]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that begin alike for equal seeds, whatever their number."""
    return [(index * 31 + seed * 101 + index * index % 7) % 1000 for index in range(length)]

"""What the scheduler counts and times, in Prometheus' text form."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dsv4_jax.serving.engine.request import FinishReason, Request, Status, Times

disable_created_metrics()  # a time stamp beside every series is of no use to anyone

# fmt: off
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    20, 40, 80, 160, 640, 2560,
)
PER_TOKEN_S = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    20, 40, 80,
)
STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)
REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
# fmt: on
GAUGES = {
    "num_requests_running": "Requests that have a slot.",
    "num_requests_waiting": "Requests in the queue.",
    "num_requests_preempted": "Requests that lost their slot and will go on.",
    "kv_cache_usage_perc": "Share of pages in use by requests, 0 to 1.",
    "slot_usage_perc": "Share of slots in use, 0 to 1.",
    "disk_cache_bytes": "Size of the files of the prefix cache.",
    "host_cache_usage_perc": "Share of the host memory of the prefix cache in use, 0 to 1.",
}
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompt_tokens": ("Prompt tokens of requests that started.", ()),
    "generation_tokens": ("Tokens generated.", ()),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", ()),
    "prefix_cache_hits": ("Prompt tokens restored from the prefix cache.", ()),
    "prefix_cache_replayed_tokens": ("Cached prompt tokens computed again for their state.", ()),
    "prefix_cache_evictions": ("Pages and checkpoints evicted.", ("tier",)),
    "disk_cache_events": (
        "Files of the prefix cache: write, evict, corrupt, refuse, error; requests: hit, miss.",
        ("event",),
    ),
    "num_preemptions": ("Requests that lost their slot because pages ran out.", ()),
    "request_success": ("Requests that ended as they should.", ("finished_reason",)),
    "request_aborts": ("Requests that ended early.", ("phase",)),
    "admission_rejections": ("Requests turned away.", ("reason",)),
    "nan_logits": ("Rows whose results were not finite.", ()),
    "grammar_errors": ("Requests whose guide failed or refused a token.", ()),
    "spec_decode_num_drafts": ("Rows of which guesses were verified.", ()),
    "spec_decode_num_draft_tokens": ("Guesses that were verified.", ()),
    "spec_decode_num_accepted_tokens": ("Guesses that stood.", ()),
    "spec_decode_num_accepted_tokens_per_pos": ("The same by place in the row.", ("position",)),
    "compilations_after_ready": ("Programs compiled while requests were served.", ()),
}
PHASES = {
    Status.WAITING: "queue",
    Status.PREFILL: "prefill",
    Status.RUNNING: "decode",
    Status.PREEMPTED: "preempted",
}


def token_buckets(most: int) -> list[int]:
    """1, 2, 5, 10, … up to `most`."""
    sizes = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
    return [size for size in sizes if size <= most]


class Tally(Collector):
    """A histogram that takes equal values at once: its library's own costs more than a token may.

    One thread adds, any may collect.
    """

    def __init__(
        self, name: str, text: str, labels: Mapping[str, str], bounds: Sequence[float]
    ) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int) -> None:
        """Counts `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The family as the registry's text form wants it."""
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        ends = [*(floatToGoString(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class Metrics:
    """One engine's counters, gauges and histograms.

    Args:
        model_name: Label of every series, as is `engine`.
        max_len: Context length, where the histograms of tokens end.
        prefix: Stands in front of every name.
    """

    def __init__(
        self,
        model_name: str = "",
        max_len: int = 1 << 20,
        prefix: str = "dsv4:",
        engine: str = "0",
    ) -> None:
        self.registry = CollectorRegistry()
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": engine}
        self._counters = {
            name: self._make(Counter, name, text, labels)
            for name, (text, labels) in COUNTERS.items()
        }
        tokens = token_buckets(max_len)
        histograms = {
            "time_to_first_token_seconds": FIRST_TOKEN_S,
            "request_time_per_output_token_seconds": PER_TOKEN_S,
            "e2e_request_latency_seconds": REQUEST_S,
            "request_queue_time_seconds": REQUEST_S,
            "request_prefill_time_seconds": REQUEST_S,
            "request_decode_time_seconds": REQUEST_S,
            "request_inference_time_seconds": REQUEST_S,
            "iteration_tokens_total": tokens,
            "request_prompt_tokens": tokens,
            "request_generation_tokens": tokens,
            "request_params_max_tokens": tokens,
            "grammar_mask_seconds": STEP_S,
        }
        self._histograms = {
            name: self._make(Histogram, name, name.replace("_", " "), (), buckets=buckets)
            for name, buckets in histograms.items()
        }
        text = "From the launch of a program to its results on the host."
        name = "step_duration_seconds"
        self._step_seconds = self._make(Histogram, name, text, ("program",), buckets=STEP_S)
        text = "Between tokens; those that come at once share the time since the ones before."
        name = prefix + "inter_token_latency_seconds"
        self._gaps = Tally(name, text, self._labels, PER_TOKEN_S)
        self.registry.register(self._gaps)

    def _make(
        self, kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **extra: Any
    ) -> Any:
        names = (*self._labels, *labels)
        metric = kind(self._prefix + name, text, names, registry=self.registry, **extra)
        return metric if labels else metric.labels(**self._labels)

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Makes a gauge call `read`, from any thread, whenever it is asked for."""
        self._make(Gauge, name, GAUGES[name]).set_function(read)

    def describe(self, name: str, text: str, **facts: object) -> None:
        """Adds a series of value 1 whose labels are the facts."""
        labels = {key: str(value) for key, value in facts.items()}
        self._make(Gauge, name, text, tuple(labels)).labels(**self._labels, **labels).set(1)

    def step(self, program: str, seconds: float) -> None:
        """Records a program that ran."""
        self._step_seconds.labels(**self._labels, program=program).observe(seconds)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        counter = self._counters[name]
        (counter.labels(**self._labels, **labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def text(self) -> bytes:
        """The exposition of everything."""
        return generate_latest(self.registry)

    # What happens to requests.

    def started(self, request: Request, matched: int = 0) -> None:
        """Records the first admission; so many tokens of the prompt were in the cache."""
        self.count("prompt_tokens", len(request.prompt))
        if request.reuse_prefix:
            self.count("prefix_cache_queries", len(request.prompt))
            self.count("prefix_cache_hits", request.cached_tokens)
            self.count("prefix_cache_replayed_tokens", max(matched - request.cached_tokens, 0))
        self.observe("request_queue_time_seconds", _between(request, "arrived", "started"))

    def tokens(self, times: Times, now: float, count: int) -> None:
        """Records that so many tokens came, before the request's times take note of them."""
        if times.last_token is None:
            self.observe("time_to_first_token_seconds", now - times.arrived)
            self._gaps.add(0.0, count - 1)
        else:
            self._gaps.add((now - times.last_token) / count, count)

    def guessed(self, guesses: int, taken: int) -> None:
        """Records that so many guesses of a row were verified, of which the first so many stood."""
        self.count("spec_decode_num_drafts")
        self.count("spec_decode_num_draft_tokens", guesses)
        self.count("spec_decode_num_accepted_tokens", taken)
        for place in range(taken):
            self.count("spec_decode_num_accepted_tokens_per_pos", position=str(place))

    def finished(self, request: Request, was: Status) -> None:
        """Records the end of a request that was in the given state."""
        assert request.finish_reason is not None
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            self.count("request_aborts", phase=PHASES[was])
            return
        self.count("request_success", finished_reason=request.finish_reason.value)
        self.observe("e2e_request_latency_seconds", _between(request, "arrived", "finished"))
        self.observe("request_inference_time_seconds", _between(request, "started", "finished"))
        self.observe("request_prompt_tokens", len(request.prompt))
        self.observe("request_generation_tokens", request.num_generated)
        self.observe("request_params_max_tokens", request.max_tokens)
        if request.times.first_token is None:
            return
        decode_s = _between(request, "first_token", "last_token")
        self.observe("request_prefill_time_seconds", _between(request, "started", "first_token"))
        self.observe("request_decode_time_seconds", decode_s)
        if request.num_generated > 1:
            per_token_s = decode_s / (request.num_generated - 1)
            self.observe("request_time_per_output_token_seconds", per_token_s)


def _between(request: Request, start: str, end: str) -> float:
    return getattr(request.times, end) - getattr(request.times, start)

"""What the HTTP layer counts, in Prometheus' text form; the engine has its own numbers."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

HTTP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7680)


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


BUILD = {name: version_of(name) for name in ("dsv4_jax", "jax", "jaxlib")}


class Counters:
    """Counters of one server; safe to use from several threads.

    Args:
        prefix: Stands in front of every name.
        model_name: Label of every series, as is `engine`: the same as those of the engine.
    """

    def __init__(self, prefix: str = "dsv4:", model_name: str = "", engine: str = "0") -> None:
        self._registry = CollectorRegistry()
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": engine}
        make = self._make
        self._answers = make(Counter, "answers", "Answers, by how they ended.", ("reason",))
        text = "Times a guard changed the course of an answer."
        self._guards = make(Counter, "guard_interventions", text, ("guard",))
        text = "Things the parser of completions put right."
        self._repairs = make(Counter, "parser_recoveries", text, ("kind",))
        self._errors = make(Counter, "request_errors", "Error replies, by code.", ("code",))
        text = "Earlier answers put into prompts as the model said them, reasoning included."
        self._restored = make(Counter, "reasoning_restored", text)
        self._reasoning = make(Counter, "reasoning_tokens", "Tokens of reasoning in answers.")
        text = "Answers that ended by themselves without text or a call."
        self._empty = make(Counter, "empty_completions", text)
        text, sizes = "Answers that requests ask for.", (1, 2, 4, 8, 16)
        self._choices = make(Histogram, "request_params_n", text, buckets=sizes)
        self._phase = make(Gauge, "engine_phase", "1 for what the server is doing.", ("phase",))
        build = make(Gauge, "build_info", "Versions.", tuple(BUILD))
        self._labelled(build, **BUILD).set(1)
        text, labels = "Time from request to end of reply.", ("path", "status")
        name = "http_request_duration_seconds"
        self._seconds = make(Histogram, name, text, labels, buckets=HTTP_S)

    def _make(
        self, kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **extra: Any
    ) -> Any:
        names = (*self._labels, *labels)
        metric = kind(self._prefix + name, text, names, registry=self._registry, **extra)
        return metric if labels else metric.labels(**self._labels)

    def _labelled(self, metric: Any, **labels: str) -> Any:
        return metric.labels(**self._labels, **labels)

    def request(
        self,
        reasons: Sequence[str],
        repairs: Mapping[str, int],
        guards: Mapping[str, int],
        empty: int = 0,
        reasoning: int = 0,
    ) -> None:
        """Counts the answers of one request, how many hold nothing, and tokens of reasoning."""
        self._reasoning.inc(reasoning)
        self._choices.observe(len(reasons))
        self._empty.inc(empty)
        for reason in reasons:
            self._labelled(self._answers, reason=reason).inc()
        for kind, count in repairs.items():
            self._labelled(self._repairs, kind=kind).inc(count)
        for guard, count in guards.items():
            self._labelled(self._guards, guard=guard).inc(count)

    def error(self, code: str) -> None:
        self._labelled(self._errors, code=code).inc()

    def restored(self, count: int) -> None:
        self._restored.inc(count)

    def http(self, path: str, status: int, seconds: float) -> None:
        self._labelled(self._seconds, path=path, status=str(status)).observe(seconds)

    def text(self, phase: str) -> bytes:
        """The exposition of everything, while the server is in a phase."""
        self._phase.clear()
        self._labelled(self._phase, phase=phase).set(1)
        return generate_latest(self._registry)

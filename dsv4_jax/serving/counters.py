"""What the HTTP layer counts, in Prometheus' text form; the engine has its own numbers."""

from collections.abc import Mapping, Sequence
from importlib import metadata

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
    """Counters of one server; safe to use from several threads."""

    def __init__(self, prefix: str = "dsv4:") -> None:
        self._registry = CollectorRegistry()
        self._answers = self._counter(prefix, "answers", "Answers, by how they ended.", "reason")
        self._guards = self._counter(
            prefix, "guard_interventions", "Times a guard changed the course of an answer.", "guard"
        )
        self._repairs = self._counter(
            prefix, "parser_recoveries", "Things the parser of completions put right.", "kind"
        )
        self._errors = self._counter(prefix, "request_errors", "Error replies, by code.", "code")
        self._restored = Counter(
            f"{prefix}reasoning_restored",
            "Earlier answers put into prompts as the model said them, reasoning included.",
            registry=self._registry,
        )
        self._reasoning = Counter(
            f"{prefix}reasoning_tokens", "Tokens of reasoning in answers.", registry=self._registry
        )
        self._empty = Counter(
            f"{prefix}empty_completions",
            "Answers that ended by themselves without text or a call.",
            registry=self._registry,
        )
        self._choices = Histogram(
            f"{prefix}request_params_n",
            "Answers that requests ask for.",
            buckets=(1, 2, 4, 8, 16),
            registry=self._registry,
        )
        self._phase = Gauge(
            f"{prefix}engine_phase",
            "1 for what the server is doing.",
            ("phase",),
            registry=self._registry,
        )
        build = Gauge(f"{prefix}build_info", "Versions.", tuple(BUILD), registry=self._registry)
        build.labels(**BUILD).set(1)
        self._seconds = Histogram(
            f"{prefix}http_request_duration_seconds",
            "Time from request to end of reply.",
            ("path", "status"),
            buckets=HTTP_S,
            registry=self._registry,
        )

    def _counter(self, prefix: str, name: str, text: str, label: str) -> Counter:
        return Counter(prefix + name, text, (label,), registry=self._registry)

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
            self._answers.labels(reason).inc()
        for counter, counts in ((self._repairs, repairs), (self._guards, guards)):
            for kind, count in counts.items():
                counter.labels(kind).inc(count)

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def restored(self, count: int) -> None:
        self._restored.inc(count)

    def http(self, path: str, status: int, seconds: float) -> None:
        self._seconds.labels(path, str(status)).observe(seconds)

    def text(self, phase: str) -> bytes:
        """The exposition of everything, while the server is in a phase."""
        self._phase.clear()
        self._phase.labels(phase).set(1)
        return generate_latest(self._registry)

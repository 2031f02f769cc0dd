"""What the server needs of a model."""

from collections.abc import Generator, Sequence
from typing import Protocol

from dsv4_jax.sampling import SamplingParams


class Exposition(Protocol):
    """Numbers for Prometheus."""

    def text(self) -> bytes:
        """All of them in its text format."""
        ...


class TokenModel(Protocol):
    """A model that continues token sequences; streams may be read from several threads."""

    max_len: int  # the context limit in tokens
    failure: BaseException | None  # what stopped it for good

    @property
    def metrics(self) -> Exposition:
        """Its counters and gauges."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Generator[int]:
        """Yields sampled ids, the final stop id included; closing the iterator stops the work."""
        ...

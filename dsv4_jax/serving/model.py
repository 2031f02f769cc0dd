"""What the server needs of a model."""

from collections.abc import Generator, Sequence
from typing import Protocol

from dsv4_jax.sampling import SamplingParams


class TokenModel(Protocol):
    """A model that continues token sequences, one at a time."""

    max_len: int  # the context limit in tokens

    def stream(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Generator[int]:
        """Yields sampled ids, the final stop id included; closing the iterator stops the work."""
        ...

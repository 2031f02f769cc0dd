"""What the server needs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dsv4_jax.sampling import SamplingParams


class Exposition(Protocol):
    """Numbers for Prometheus."""

    def text(self) -> bytes:
        """All of them in its text format."""
        ...

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Adds to one of the counters."""
        ...


class Token(NamedTuple):
    """A token with its natural log-probability and the most likely (id, log-probability) pairs.

    Both are of the model's own distribution, and there only if asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Allowed:
    """Tokens that may be drawn whatever was drawn before; words as in `TokenGuide.fill`.

    words_W: for every token; ids behind the last word may not be drawn. early_W: instead of it
    for the first `early` tokens of a stream.
    """

    words_W: np.ndarray
    early_W: np.ndarray | None = None
    early: int = 0


class TokenGuide(Protocol):
    """Says which tokens may come next. Called by the model, on a thread of its own."""

    def fill(self, words_W: np.ndarray) -> bool:
        """Writes the allowed ids of the next token: bit i % 32 of uint32 word i // 32 is id i.

        Returns:
            False: anything goes now, and the words were left alone.
        """
        ...

    def advance(self, token: int) -> None:
        """Takes the token that was drawn: once per token, in order, before the next `fill`."""
        ...


class TokenStream(Iterator[Token], Protocol):
    """Tokens of one request as they come, the final stop id included.

    `cached_tokens` of the prompt were not computed again. `prompt_logprobs`, if asked for, has an
    entry for each token of the prompt, None for the first. Both are known once a token is there
    (or the end, if there are none). Until then `prompt_done` tells how many of its tokens are
    computed; it may be read from any thread.
    """

    @property
    def prompt_done(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    @property
    def prompt_logprobs(self) -> Sequence[Token | None] | None: ...

    def close(self) -> None:
        """Stops the work; from any thread, any number of times."""
        ...


class TokenModel(Protocol):
    """A model that continues token sequences; streams may be read from several threads."""

    max_len: int  # the context limit in tokens
    failure: BaseException | None  # what stopped it for good

    @property
    def busy_s(self) -> float:
        """Seconds since it last showed that it works; 0 while it has nothing to do."""
        ...

    @property
    def metrics(self) -> Exposition:
        """Its counters and gauges."""
        ...

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
    ) -> TokenStream:
        """Continues a prompt.

        Args:
            prompt_ids: At least one token.
            sampling: How tokens are drawn.
            stop_ids: Tokens that end the stream.
            tenant: Whose turn it takes, and whose cached prefixes it may use.
            request_id: For logs.
            guide: Restricts what may be drawn.
            after: A stream of the same prompt, whose work on it this one waits for and shares.
            keep_output: A later prompt is likely to contain this one and its output as they are.
            checkpoints: Positions of the prompt at which later ones are likely to leave it.
            allowed: Restricts what may be drawn, beside `guide`.
            priority: Within the tenant, larger ones go first.
            continues: The answer has begun, so it is not refused for want of room.
        """
        ...

    def flush_cache(self) -> int:
        """Forgets cached prompts that nobody uses; returns how many tokens that were."""
        ...

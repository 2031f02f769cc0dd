"""What the server needs of a model."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dsv4_jax.sampling import SamplingParams


class Exposition(Protocol):
    """Numbers for Prometheus."""

    def text(self) -> bytes:
        """All of them in its text format."""
        ...


class Token(NamedTuple):
    """A token that was drawn (or stood in the prompt).

    `logprob` and `top`, the best ids with theirs (best first), are natural logarithms of what the
    unmodified logits give; there when the request asked for them.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenGuide(Protocol):
    """Says which tokens may come next; called on the engine's thread."""

    def fill(self, words_W: np.ndarray) -> bool:
        """Writes the allowed ids as bits (uint32, bit i%32 of word i//32 = id i).

        False: anything goes now, and the words were left alone.
        """
        ...

    def advance(self, token: int) -> None:
        """Takes the token that was drawn; once per token in order, before the next `fill`."""
        ...


class TokenStream(Iterator[Token], Protocol):
    """Tokens of one request as they are drawn.

    `cached_tokens` of the prompt were not computed (0 before the first token);
    `prompt_logprobs` holds a token per prompt position, None at the first, once asked for and
    after the first token.
    """

    cached_tokens: int
    prompt_logprobs: Sequence[Token | None] | None

    def close(self) -> None:
        """Cancels the request; does nothing if it has ended."""
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
    ) -> TokenStream:
        """Yields sampled tokens, the final stop id included; closing the stream stops the work.

        Args:
            after: a stream of the same prompt whose cached prefix this one waits for.
            keep_output: the next request will contain the output as it is.
            checkpoints: prompt positions at which others are likely to go on.
        """
        ...

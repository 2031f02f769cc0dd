"""The client's end of a request: tokens as they come, and a way to stop them."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dsv4_jax.sampling import Logprobs, SamplingParams
from dsv4_jax.serving.engine.request import FinishReason, Request
from dsv4_jax.serving.engine.step import PrefillRow
from dsv4_jax.serving.model import Allowed, Token, TokenGuide

HAND_OUT_S = 0.02  # a reader is woken no more often: each time costs tens of microseconds
MAX_UNREAD = 200_000  # ids and log-probabilities of a stream that nobody has read


class SlowReader(RuntimeError):
    """A stream is read more slowly than it grows."""


class EngineError(RuntimeError):
    """A request that the engine could not finish; `reason` is how it ended."""

    def __init__(self, message: str, reason: FinishReason = FinishReason.ERROR) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(eq=False)
class Payload:
    """What the engine keeps of a request: how it samples, and where its tokens go.

    `error` says why the request failed. `scores` are the prompt's log-probabilities so far. The
    words of `allowed` are as many as the model's vocabulary takes. Tokens are `ready` until the
    reader is woken, who gets all of them at once.
    """

    sampling: SamplingParams
    guide: TokenGuide | None
    key_2: np.ndarray
    out: queue.SimpleQueue[list[Token] | FinishReason] = field(default_factory=queue.SimpleQueue)
    error: BaseException | None = None
    allowed: Allowed | None = None
    scores: list[Token | None] = field(default_factory=lambda: [None])
    ready: list[Token] = field(default_factory=list)
    handed_s: float = float("-inf")
    given: int = 0  # numbers, written by the engine
    taken: int = 0  # and by the reader

    @property
    def has_early(self) -> bool:
        """Whether its first tokens have a mask of their own."""
        return self.allowed is not None and self.allowed.early_W is not None

    @property
    def is_behind(self) -> bool:
        """Whether the reader leaves too much to wait for him."""
        return self.given - self.taken > MAX_UNREAD

    def hand_out(self, now_s: float) -> bool:
        """Gives the reader what is ready, unless he was woken a moment ago."""
        if now_s - self.handed_s < HAND_OUT_S:
            return False
        self.handed_s = now_s
        self._put_ready()
        return True

    def end(self, reason: FinishReason) -> None:
        """Gives the reader the rest, and how it ended."""
        self._put_ready()
        self.out.put(reason)

    def _put_ready(self) -> None:
        if self.ready:
            self.given += size_of(self.ready)
            self.out.put(self.ready)
            self.ready = []

    def add_scores(self, row: PrefillRow, scores: Logprobs, index: int) -> None:
        """Takes the log-probabilities of row `index` of a step: those behind each of its tokens."""
        prompt, best = row.request.prompt, self.sampling.prompt_logprobs
        for i in range(len(row.tokens)):
            if (position := row.start + i + 1) < len(prompt):
                self.scores.append(token_of(prompt[position], scores, (index, i), best))


def size_of(tokens: Sequence[Token]) -> int:
    """Numbers that tokens hold, about."""
    return sum(1 + len(token.top) for token in tokens)


def token_of(
    token: int, logprobs: Logprobs | None, index: tuple[int, int], best: int | None
) -> Token:
    """A token with what was computed about it, if that was asked for."""
    if best is None or logprobs is None:
        return Token(token)
    ids, values = logprobs.top_ids[index][:best], logprobs.top[index][:best]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(logprobs.chosen[index]), top)


class RequestStream:
    """A `TokenStream` of one request of the engine; read it from one thread.

    Raises:
        EngineError: while reading, if the request could not be finished.
    """

    def __init__(self, request: Request, payload: Payload) -> None:
        self.request = request
        self._payload = payload
        self._here: deque[Token] = deque()
        self._end: FinishReason | None = None
        self._is_closed = False

    def __iter__(self) -> RequestStream:
        return self

    def __next__(self) -> Token:
        while not self._here and self._end is None:
            item = self._payload.out.get()
            if isinstance(item, FinishReason):
                self._end = item
            else:
                self._payload.taken += size_of(item)
                self._here.extend(item)
        if self._here:
            return self._here.popleft()
        assert self._end is not None
        if not self._is_closed and self._end not in (FinishReason.STOP, FinishReason.LENGTH):
            problem = f"the request ended early: {self._end}"
            raise EngineError(problem, self._end) from self._payload.error
        raise StopIteration

    @property
    def cached_tokens(self) -> int:
        return self.request.cached_tokens

    @property
    def prompt_done(self) -> int:
        request, size = self.request, len(self.request.prompt)
        return size if request.num_generated else min(request.committed, size)

    @property
    def prompt_logprobs(self) -> Sequence[Token | None] | None:
        if self._payload.sampling.prompt_logprobs is None:
            return None
        return self._payload.scores

    def close(self) -> None:
        """Stops the work; a reader sees the end. From any thread, any number of times."""
        self._is_closed = True
        self.request.cancel()

    def __del__(self) -> None:
        """A stream that nobody reads any more must not go on."""
        self.request.cancel()

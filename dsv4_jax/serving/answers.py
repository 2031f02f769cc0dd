"""From a plan to a reply: starts the answers of a request, sends them, and logs how it went."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4_jax.serving.choices import Choices
from dsv4_jax.serving.engine.loop import EngineFull
from dsv4_jax.serving.engine.request import FinishReason
from dsv4_jax.serving.engine.stream import EngineError, SlowReader
from dsv4_jax.serving.errors import (
    ApiError,
    cancelled,
    not_ready,
    queue_full,
    slow_reader,
    tenant_limit,
)
from dsv4_jax.serving.events import Event, Finish, Progress, Reasoning
from dsv4_jax.serving.leader import Cancelled
from dsv4_jax.serving.service import Service
from dsv4_jax.serving.streams import Encoder, EventStream, unless_disconnected

_log = logging.getLogger(__name__)
_TRY_LATER = {FinishReason.QUEUE_TIMEOUT: "queue_timeout", FinishReason.SHUTDOWN: "draining"}
Item = Event | Finish | Progress
Answers = Sequence[tuple[Sequence[Event], Finish]]


class AnyTurn(Protocol):
    """One answer in the making, as the log and the worker see it."""

    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int | None
    guards: Counter[str]

    @property
    def repairs(self) -> Counter[str]: ...

    @property
    def prompt_done(self) -> int: ...

    def __iter__(self) -> Iterator[Event | Finish]: ...

    def close(self) -> None: ...


MakeTurn = Callable[[Callable[[], bool]], AnyTurn]


@dataclass
class Facts:
    """What the log says of a request, beside what its answers tell."""

    request_id: str
    path: str
    tenant: str
    prompt_tokens: int
    mode: str
    start: float = field(default_factory=time.monotonic)


class _Choice:
    """One answer as work for a model thread."""

    def __init__(self, make: MakeTurn, service: Service, tells_progress: bool = False) -> None:
        self.turn: AnyTurn | None = None
        self.reason = "unstarted"
        self.first_token: float | None = None
        self.is_empty = True  # no content, no calls
        self._make = make
        self._tells_progress = tells_progress
        self._service = service

    def __call__(self, is_cancelled: Callable[[], bool]) -> Iterator[Item]:
        self.turn = turn = self._make(is_cancelled)
        self.reason = "error"
        try:
            for item in turn:
                self.first_token = self.first_token or time.monotonic()
                self.reason = item.reason if isinstance(item, Finish) else self.reason
                self.is_empty &= isinstance(item, Finish | Reasoning)
                if self._tells_progress and not isinstance(item, Finish):
                    counts = turn.completion_tokens, turn.reasoning_tokens
                    yield Progress(*counts, turn.cached_tokens or 0)
                yield item
        except Cancelled:
            if self._service.has_failed:
                raise not_ready("engine_unhealthy") from None
            self.reason = "cancelled"
            raise cancelled() if self._service.is_open else not_ready("draining") from None
        except EngineFull as error:
            self.reason = error.reason
            raise _refusal(error) from error
        except Exception as error:
            if self._service.has_failed:
                raise not_ready("engine_unhealthy") from error
            if isinstance(error, EngineError) and error.reason in _TRY_LATER:
                self.reason = _TRY_LATER[error.reason]
                raise not_ready(self.reason) from error
            if isinstance(error.__cause__, SlowReader):
                self.reason = "slow_reader"
                raise slow_reader() from error
            raise

    def close(self) -> None:
        if self.turn is not None:
            self.turn.close()


def _refusal(error: EngineFull) -> ApiError:
    match error.reason:
        case "tenant_limit":
            return tenant_limit(error.retry_after_s)
        case "draining":
            return not_ready("draining", error.retry_after_s)
    return queue_full(error.retry_after_s)


class Reply(Protocol):
    """How the answers of one endpoint look."""

    id: str

    def completion(self, answers: Answers) -> dict[str, Any]: ...

    def encoder(self, count: int) -> Encoder: ...


@dataclass
class Answering:
    """One request being answered. `makers` make its answers, in order."""

    service: Service
    request: Request
    facts: Facts
    makers: Sequence[MakeTurn]
    reply: Reply
    headers: dict[str, str] = field(default_factory=dict)
    tells_progress: bool = False  # in the chunks of a stream

    def __post_init__(self) -> None:
        self._choices = [_Choice(make, self.service, self.tells_progress) for make in self.makers]

    async def respond(self, is_stream: bool) -> Response | ASGIApp:
        """Returns the reply; as a stream, one that is still to be sent.

        Raises:
            ApiError: 429 or 503, no room; whatever ended the answers early.
        """
        jobs = self._admitted()
        names = {self.facts.request_id, self.reply.id}
        self.service.register(self.request.scope["dsv4.tenant"], names, jobs)
        if is_stream:
            settings = self.service.settings
            encoder = self.reply.encoder(len(self._choices))
            times = (settings.hold_headers_s, settings.keep_alive_s)
            request_id = self.facts.request_id
            stream = EventStream(jobs, encoder, request_id, *times, self.headers, self._how_far)
            return _Watched(stream, lambda: self._end(jobs, stream.was_left))
        was_left = False
        try:
            answer = await unless_disconnected(self.request.receive, self._whole(jobs))
            was_left = answer is None
        finally:
            self._end(jobs, was_left)
        return answer or Response(status_code=499)

    def _admitted(self) -> Choices[Item]:
        self.service.check_room()
        enqueue = self.service.thread.enqueue
        return Choices([enqueue(choice, choice.close) for choice in self._choices])

    def _how_far(self) -> str:
        """What a stream tells while it has nothing to say: of the prompt, until an answer begins.

        Answers of one request share its prompt, and the first one computes it.
        """
        choice = self._choices[0]
        if choice.first_token is not None:
            return ""
        done = 0 if choice.turn is None else choice.turn.prompt_done
        return f"{done:,} of {self.facts.prompt_tokens:,} tokens of the prompt are computed"

    async def _whole(self, jobs: Choices[Item]) -> Response:
        events: list[list[Event]] = [[] for _ in self._choices]
        finishes: list[Finish | None] = [None] * len(events)
        while (items := await jobs.next()) is not None:
            for index, item in items:
                if isinstance(item, Finish):
                    finishes[index] = item
                elif not isinstance(item, Progress):
                    events[index].append(item)
        ends = [finish for finish in finishes if finish is not None]
        answers = list(zip(events, ends, strict=True))
        return JSONResponse(self.reply.completion(answers), headers=self.headers)

    def _end(self, jobs: Choices[Item], was_left: bool) -> None:
        self.service.unregister(jobs)
        was_left = was_left or any(choice.reason == "slow_reader" for choice in self._choices)
        aborted_by = "request" if jobs.was_cancelled else "client" if was_left else "-"
        jobs.cancel()
        self._log_line(aborted_by)

    def _log_line(self, aborted_by: str) -> None:
        facts, choices = self.facts, self._choices
        turns = [choice.turn for choice in choices if choice.turn is not None]
        repairs = sum((turn.repairs for turn in turns), Counter[str]())
        guards = sum((turn.guards for turn in turns), Counter[str]())
        firsts = [choice.first_token for choice in choices if choice.first_token is not None]
        tenant = sha256(facts.tenant.encode()).hexdigest()[:8]
        finish = ",".join(choice.reason for choice in choices)
        empty = sum(choice.is_empty and choice.reason == "stop" for choice in choices)
        reasoning = sum(turn.reasoning_tokens for turn in turns)
        reasons = [choice.reason for choice in choices]
        self.service.counters.request(reasons, repairs, guards, empty, reasoning)
        _log.info(
            "id=%s path=%s tenant=%s mode=%s n=%d prompt=%d cached=%d completion=%d reasoning=%d "
            "first_s=%s seconds=%.3f finish=%s aborted_by=%s repairs=%s guards=%s",
            facts.request_id,
            facts.path,
            tenant,
            facts.mode,
            len(choices),
            facts.prompt_tokens,
            (turns[0].cached_tokens or 0) if turns else 0,
            sum(turn.completion_tokens for turn in turns),
            reasoning,
            f"{min(firsts) - facts.start:.3f}" if firsts else "-",
            time.monotonic() - facts.start,
            finish,
            aborted_by,
            _pairs(repairs),
            _pairs(guards),
        )


def _pairs(counts: Counter[str]) -> str:
    return ",".join(f"{kind}:{count}" for kind, count in sorted(counts.items()) if count) or "-"


@dataclass
class _Watched:
    """A stream, and what is to be done when it has been sent."""

    stream: EventStream[tuple[int, Item]]
    end: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream(scope, receive, send)
        finally:
            self.end()


def headers_of(service: Service, warning: str | None) -> dict[str, str]:
    if warning is None:
        return {}
    service.warn_once(warning)
    return {"x-dsv4-warning": warning}

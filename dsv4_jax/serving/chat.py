"""POST /v1/chat/completions."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from dsv4_jax.serving.body import read_json
from dsv4_jax.serving.errors import not_ready
from dsv4_jax.serving.events import Event, Finish, merge
from dsv4_jax.serving.plan import PromptPlan
from dsv4_jax.serving.reply import Reply, server_sent
from dsv4_jax.serving.schema import read_chat_request
from dsv4_jax.serving.service import Loaded, Service
from dsv4_jax.serving.streams import EventStream, unless_disconnected
from dsv4_jax.serving.turn import Cancelled, Turn
from dsv4_jax.serving.worker import Job, Work

_log = logging.getLogger(__name__)
Answer = Job[Event | Finish]


async def chat_completions(service: Service, request: Request) -> Response | ASGIApp:
    """Answers one chat request, whole or as a stream."""
    settings = service.settings
    loaded = service.loaded()
    ask = read_chat_request(
        await read_json(request, settings.max_body_bytes, settings.body_timeout_s)
    )
    name = service.model_name(ask.model)
    service.thread.check_room()  # before the work of tokenising
    async with service.planning:
        plan = await asyncio.to_thread(loaded.planner.plan, ask)
    request_id = request.scope["dsv4.request_id"]
    job = service.thread.admit(_work(loaded, plan, request_id))
    reply = Reply(name, loaded.fingerprint, len(plan.prompt_ids), ask.include_usage)
    headers = {"x-dsv4-warning": plan.warning} if plan.warning else {}
    if plan.warning:
        service.warn_once(plan.warning)
    if ask.stream:
        return EventStream(
            job,
            _Chunks(reply).encode,
            request_id,
            settings.hold_headers_s,
            settings.keep_alive_s,
            headers,
        )
    try:
        answer = await unless_disconnected(request.receive, _whole(job, reply, headers))
    finally:
        job.cancel()
    return answer or Response(status_code=499)


def _work(loaded: Loaded, plan: PromptPlan, request_id: str) -> Work[Event | Finish]:
    """Returns the work of the model thread: the turn, with one log line at its end."""

    def work(is_cancelled: Callable[[], bool]) -> Iterator[Event | Finish]:
        start = time.monotonic()
        turn = Turn(plan, loaded.planner, loaded.model, is_cancelled)
        reason = "error"
        try:
            for event in turn:
                reason = event.reason if isinstance(event, Finish) else reason
                yield event
        except Cancelled:
            reason = "cancelled"
            raise not_ready("draining") from None
        finally:
            _log_turn(request_id, turn, reason, time.monotonic() - start)

    return work


def _log_turn(request_id: str, turn: Turn, reason: str, seconds: float) -> None:
    repairs = {kind: count for kind, count in turn.repairs.items() if count}
    _log.info(
        "%s finish=%s prompt=%d completion=%d reasoning=%d seconds=%.2f thinking=%s repairs=%s",
        request_id,
        reason,
        len(turn.plan.prompt_ids),
        turn.completion_tokens,
        turn.reasoning_tokens,
        seconds,
        turn.plan.effort or turn.plan.thinking,
        repairs,
    )


async def _whole(job: Answer, reply: Reply, headers: dict[str, str]) -> Response:
    events: list[Event] = []
    while (items := await job.next()) is not None:
        for item in items:
            if isinstance(item, Finish):
                return JSONResponse(reply.completion(events, item), headers=headers)
            events.append(item)
    raise AssertionError("an answer ended without a finish")


@dataclass
class _Chunks:
    """Turns events into server-sent events, beginning with the role."""

    reply: Reply
    _has_begun: bool = field(default=False, init=False)

    def encode(self, items: list[Event | Finish]) -> bytes:
        chunks = [] if self._has_begun else [self.reply.first_chunk()]
        self._has_begun = True
        chunks += map(self.reply.chunk, merge([e for e in items if not isinstance(e, Finish)]))
        if isinstance(items[-1], Finish):
            chunks += self.reply.last_chunks(items[-1])
        return b"".join(map(server_sent, chunks))

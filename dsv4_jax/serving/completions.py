"""POST /v1/completions."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from dsv4_jax.serving.answers import Answering, Answers, Facts, MakeTurn
from dsv4_jax.serving.completion_schema import read_completion_request
from dsv4_jax.serving.errors import ApiError
from dsv4_jax.serving.events import Content, Event, Finish, Progress, merge, random_id
from dsv4_jax.serving.leader import Leader
from dsv4_jax.serving.logprobs import TokenBytes, legacy_logprobs
from dsv4_jax.serving.raw import RawPlan, RawTurn, raw_plan
from dsv4_jax.serving.reply import DONE, KEEP_ALIVE, server_sent, taken, usage_of
from dsv4_jax.serving.service import Loaded, Service


async def completions(service: Service, request: Request) -> Response | ASGIApp:
    """Answers one completion request, whole or as a stream."""
    loaded = service.loaded()
    ask = await service.read(request, read_completion_request)
    name = service.model_name(ask.model)
    service.check_room()
    tenant = request.scope["dsv4.tenant"]
    async with service.planning:
        plans = [
            await asyncio.to_thread(raw_plan, loaded.planner, ask, prompt, tenant)
            for prompt in ask.prompts
        ]
    tokens = sum(len(plan.prompt_ids) for plan in plans)
    token_bytes = None if ask.logprobs is None else loaded.planner.tokenizer.token_bytes
    shown = ask.include_usage, token_bytes, ask.continuous_usage
    reply = CompletionReply(name, loaded.fingerprint, tokens, *shown)
    request_id = request.scope["dsv4.request_id"]
    for plan in plans:
        service.log_prompt(request_id, plan.prompt_ids)
    unique = f"{request_id}#{secrets.token_hex(3)}"  # clients may send the same id twice
    facts = Facts(request_id, request.url.path, plans[0].tenant, tokens, "raw")
    makers = [
        maker
        for index, plan in enumerate(plans)
        for maker in _makers(loaded, plan, ask.n, f"{unique}/{index}")
    ]
    tells = ask.stream and ask.continuous_usage
    answering = Answering(service, request, facts, makers, reply, tells_progress=tells)
    return await answering.respond(ask.stream)


def _makers(loaded: Loaded, plan: RawPlan, n: int, request_id: str) -> list[MakeTurn]:
    leader = Leader() if n > 1 else None

    def make(index: int, is_cancelled: Callable[[], bool]) -> RawTurn:
        return RawTurn(
            plan.choice(index),
            loaded.planner,
            loaded.model,
            is_cancelled,
            request_id=f"{request_id}.{index}",
            leads=leader if index == 0 else None,
            follows=leader if index else None,
        )

    return [partial(make, index) for index in range(n)]


@dataclass
class CompletionReply:
    """What the parts of one answer have in common; as `reply.Reply`."""

    model: str
    fingerprint: str
    prompt_tokens: int
    include_usage: bool = False
    token_bytes: TokenBytes | None = None
    continuous_usage: bool = False
    id: str = field(default_factory=lambda: random_id("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answers: Answers) -> dict[str, Any]:
        choices = []
        for index, (events, finish) in enumerate(answers):
            pieces = [event for event in events if isinstance(event, Content)]
            whole = Content(
                "".join(piece.text for piece in pieces),
                tuple(token for piece in pieces for token in piece.tokens),
            )
            choices.append(self.choice(index, whole, finish.reason))
        usage = usage_of(self.prompt_tokens, [finish for _, finish in answers])
        return {**self._head(), "choices": choices, "usage": usage}

    def encoder(self, count: int) -> "CompletionEncoder":
        return CompletionEncoder(self, count)

    def choice(
        self, index: int, piece: Content, reason: str | None = None, start: int = 0
    ) -> dict[str, Any]:
        """Returns one piece of an answer that begins at character `start`."""
        logprobs = None
        if self.token_bytes is not None:
            logprobs = legacy_logprobs(piece.tokens, start, self.token_bytes)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head(), "choices": list(choices)}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class CompletionEncoder:
    """Numbered pieces of several completions as chunks."""

    done = DONE
    beat = KEEP_ALIVE

    def __init__(self, reply: CompletionReply, count: int) -> None:
        self._reply = reply
        self._lengths = [0] * count
        self._finishes: list[Finish | None] = [None] * count
        self._progress: list[Finish | Progress] = [Progress(0, 0)] * count

    def encode(self, items: Sequence[tuple[int, Event | Finish | Progress]]) -> bytes:
        chunks: list[dict[str, Any]] = []
        items = taken(items, self._progress)
        for index in sorted({index for index, _ in items}):
            own = [item for number, item in items if number == index]
            for event in merge([item for item in own if isinstance(item, Content)]):
                assert isinstance(event, Content)
                choice = self._reply.choice(index, event, start=self._lengths[index])
                self._lengths[index] += len(event.text)
                chunks.append(self._reply.chunk([choice]))
            if isinstance(end := own[-1], Finish):
                self._finishes[index] = end
                last = self._reply.choice(index, Content(""), end.reason, self._lengths[index])
                chunks.append(self._reply.chunk([last]))
        if self._reply.continuous_usage:
            usage = usage_of(self._reply.prompt_tokens, self._progress)
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        ends = [finish for finish in self._finishes if finish is not None]
        if len(ends) == len(self._finishes) and self._reply.include_usage:
            usage = usage_of(self._reply.prompt_tokens, ends)
            chunks.append({**self._reply.chunk([]), "usage": usage})
        return b"".join(map(server_sent, chunks))

    def error(self, error: ApiError) -> bytes:
        return server_sent(error.body())

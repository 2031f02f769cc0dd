"""POST /v1/chat/completions."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from dsv4_jax.serving.answers import Answering, Facts, MakeTurn, headers_of
from dsv4_jax.serving.leader import Leader
from dsv4_jax.serving.plan import PromptPlan
from dsv4_jax.serving.reply import Reply
from dsv4_jax.serving.schema import ChatRequest, read_chat_request
from dsv4_jax.serving.service import Loaded, Service
from dsv4_jax.serving.turn import Turn


async def chat_completions(service: Service, request: Request) -> Response | ASGIApp:
    """Answers one chat request, whole or as a stream."""
    loaded = service.loaded()
    ask = await service.read(request, read_chat_request)
    name = service.model_name(ask.model)
    asks = [replace(ask, extracted_urls=(url,)) for url in ask.extracted_urls] or [ask]
    plans = [await planned(service, loaded, request, one) for one in asks]
    tokens = sum(len(plan.prompt_ids) for plan in plans)
    reply = Reply(
        name,
        loaded.fingerprint,
        tokens,
        ask.include_usage,
        None if ask.logprobs is None else loaded.planner.tokenizer.token_bytes,
        ask.continuous_usage,
        service.settings.reasoning_fields,
    )
    answering = Answering(
        service,
        request,
        facts_of(request, plans[0], tokens),
        [
            maker
            for plan in plans
            for maker in turn_makers(service, loaded, plan, request.scope["dsv4.request_id"])
        ],
        reply,
        headers_of(service, plans[0].warning),
        ask.stream and ask.continuous_usage,
    )
    return await answering.respond(ask.stream)


async def planned(
    service: Service, loaded: Loaded, request: Request, ask: ChatRequest
) -> PromptPlan:
    """Renders and tokenises off the event loop.

    Raises:
        ApiError: 400, the request cannot be rendered; 429 or 503, there is no room.
    """
    service.check_room()  # before the work of tokenising
    async with service.planning:
        tenant = request.scope["dsv4.tenant"]
        draft = await asyncio.to_thread(loaded.planner.draft, ask, tenant, service.replay)
    if draft.needs_grammar:  # may take a while: others go on
        loop = asyncio.get_running_loop()
        plan = await loop.run_in_executor(service.finishing, loaded.planner.finished, draft)
    else:
        plan = loaded.planner.finished(draft)
    service.counters.restored(plan.restored)
    service.log_prompt(request.scope["dsv4.request_id"], plan.prompt_ids)
    return plan


def facts_of(request: Request, plan: PromptPlan, prompt_tokens: int) -> Facts:
    return Facts(
        request.scope["dsv4.request_id"],
        request.url.path,
        plan.tenant,
        prompt_tokens,
        f"thinking:{plan.effort or 'default'}" if plan.thinking else "chat",
    )


def turn_makers(
    service: Service, loaded: Loaded, plan: PromptPlan, request_id: str
) -> list[MakeTurn]:
    """Returns what makes the answers; those after the first wait for its cached prompt."""
    leader = Leader() if plan.n > 1 else None
    name = f"{request_id}#{secrets.token_hex(3)}"  # clients may send the same id twice

    def make(index: int, is_cancelled: Callable[[], bool]) -> Turn:
        return Turn(
            plan.choice(index),
            loaded.planner,
            loaded.model,
            is_cancelled,
            request_id=f"{name}.{index}",
            leads=leader if index == 0 else None,
            follows=leader if index else None,
            replay=service.replay,
        )

    return [partial(make, index) for index in range(plan.n)]

"""POST /v1/messages and /v1/messages/count_tokens."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from dsv4_jax.serving.answers import Answering, headers_of
from dsv4_jax.serving.anthropic.reply import MessageReply
from dsv4_jax.serving.anthropic.request import read_messages_request
from dsv4_jax.serving.chat import facts_of, planned, turn_makers
from dsv4_jax.serving.schema import ChatRequest
from dsv4_jax.serving.service import Service


async def messages(service: Service, request: Request) -> Response | ASGIApp:
    """Answers one message request, whole or as a stream of events."""
    loaded = service.loaded()
    ask = await _read(service, request, needs_limit=True)
    name = service.model_name(ask.model)
    plan = await planned(service, loaded, request, ask)
    answering = Answering(
        service,
        request,
        facts_of(request, plan, len(plan.prompt_ids)),
        turn_makers(service, loaded, plan, request.scope["dsv4.request_id"]),
        MessageReply(name, len(plan.prompt_ids)),
        headers_of(service, plan.warning),
    )
    return await answering.respond(ask.stream)


async def count_tokens(service: Service, request: Request) -> Response:
    """Says how many tokens a message request's prompt has."""
    loaded = service.loaded()
    ask = await _read(service, request, needs_limit=False)
    service.model_name(ask.model)
    plan = await planned(service, loaded, request, ask)
    return JSONResponse({"input_tokens": len(plan.prompt_ids)})


async def _read(service: Service, request: Request, needs_limit: bool) -> ChatRequest:
    return await service.read(
        request, lambda body, strict: read_messages_request(body, needs_limit, strict)
    )

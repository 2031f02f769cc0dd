"""Looking at prompts: POST /tokenize, /detokenize and /v1/chat/render."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv4_jax.encoding import render_raw
from dsv4_jax.serving.chat import planned
from dsv4_jax.serving.completion_schema import read_token_ids
from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.fields import Fields
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.schema import read_chat_request
from dsv4_jax.serving.service import Service


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text (`prompt`) or of a chat request (`messages`, …)."""
    loaded = service.loaded()
    body = await _object(service, request)
    service.model_name(Fields(body).text("model"))
    tokenizer = loaded.planner.tokenizer
    if "messages" in body:
        ask = await asyncio.to_thread(read_chat_request, body)
        plan = await planned(service, loaded, request, ask)
        ids = list(plan.prompt_ids)
    else:
        async with service.planning:
            ids = await asyncio.to_thread(_text_ids, loaded.planner, Fields(body))
    reply: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": loaded.planner.max_len,
        "tokens": ids,
    }
    if Fields(body).boolean("return_token_strs"):
        reply["token_strs"] = [tokenizer.decode([token]) for token in ids]
    return JSONResponse(reply)


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids (`tokens`)."""
    tokenizer = service.loaded().planner.tokenizer
    body = await _object(service, request)
    service.model_name(Fields(body).text("model"))

    def text() -> str:
        ids = read_token_ids(body.get("tokens"), "tokens")
        if any(token >= tokenizer.vocab_size for token in ids):
            raise invalid("tokens", "holds ids that are not tokens of this model")
        return tokenizer.decode(ids)

    return JSONResponse({"prompt": await asyncio.to_thread(text)})


async def render(service: Service, request: Request) -> Response:
    """What a chat request becomes: prompt, ids, and what was decided about it."""
    loaded = service.loaded()
    ask = await service.read(request, read_chat_request)
    service.model_name(ask.model)
    plan = await planned(service, loaded, request, ask)
    facts = {
        "thinking": plan.thinking,
        "effort": plan.effort,
        "profile": loaded.planner.profile,
        "starts_in_reasoning": plan.starts_in_reasoning,
        "tools": sorted(plan.tool_names),
        "max_tokens": plan.max_tokens,
        "n": plan.n,
        "stop": list(plan.stop),
        "thinking_budget": plan.thinking_budget,
        "content_grammar": plan.constraints.content is not None,
        "tool_grammar": plan.constraints.calls is not None,
        "warning": plan.warning,
    }
    text = await asyncio.to_thread(loaded.planner.tokenizer.decode, plan.prompt_ids)
    return JSONResponse(
        {"prompt": text, "tokens": list(plan.prompt_ids), "count": len(plan.prompt_ids)}
        | {"plan": facts}
    )


async def _object(service: Service, request: Request) -> dict[str, Any]:
    return await service.read(request, lambda body, _: _checked(body))


def _checked(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise invalid(None, "The request body must be a JSON object.", "invalid_json")
    return body


def _text_ids(planner: Planner, fields: Fields) -> list[int]:
    text = fields.text("prompt")
    if text is None:
        raise invalid("prompt", "is required, or messages")
    add_bos = any([fields.boolean(name) for name in ("add_special_tokens", "add_bos")])
    return planner.encoded("prompt", render_raw(text, add_bos))

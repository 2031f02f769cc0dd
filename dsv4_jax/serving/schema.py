"""The fields of a chat request: checked, typed, and refused where we cannot honour them."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from dsv4_jax.serving.errors import invalid, unsupported
from dsv4_jax.serving.fields import Fields

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_USER_BYTES = 512
ANY_COUNT = 10**15  # larger counts are typing errors; smaller ones meet the context limit

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_log = logging.getLogger(__name__)

# Fields whose effect is not there yet, with the values that ask for nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "grammar": (),
    "regex": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "stop_token_ids": ([],),
    "stop_in_reasoning": (False,),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "task": (),
    "extracted_urls": ([],),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
}
_KNOWN = {
    *("model", "messages", "thinking", "reasoning_effort", "chat_template_kwargs", "stop"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stream"),
    *("stream_options", "tools", "tool_choice", "user", "user_id", "metadata", "priority"),
    *("continue_final_message", *_NOT_YET),
}


@dataclass(frozen=True)
class ChatRequest:
    """A chat request as the client wrote it; None means not given.

    `thinking` is the field of that name; `template_thinking` and `template_effort` come from
    `chat_template_kwargs`. `tools` are as received.
    """

    messages: list[Any]
    model: str | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    effort: str | None = None
    template_thinking: bool | None = None
    template_effort: str | None = None
    drop_thinking: bool | None = None
    continue_final_message: bool = False
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    stream: bool = False
    include_usage: bool = False


def read_chat_request(body: object) -> ChatRequest:
    """Reads the JSON body of a chat request.

    Raises:
        ApiError: 400, naming the field that is wrong or not supported.
    """
    if not isinstance(body, dict):
        raise invalid(None, "The request body must be a JSON object.", "invalid_json")
    fields = Fields(body)
    _refuse_unsupported(fields)
    if "messages" not in body:
        raise invalid("messages", "is required")
    _check_user_fields(fields)
    thinking, budget = _thinking(fields)
    template = fields.mapping("chat_template_kwargs")
    on = template.boolean("thinking")
    options = fields.mapping("stream_options")
    if options.boolean("continuous_usage_stats"):
        raise unsupported("stream_options.continuous_usage_stats", "is not supported")
    return ChatRequest(
        messages=fields.array("messages", ANY_COUNT) or [],
        model=fields.text("model"),
        thinking=thinking,
        thinking_budget=budget,
        effort=fields.text("reasoning_effort", EFFORTS),
        template_thinking=on if on is not None else template.boolean("enable_thinking"),
        template_effort=template.text("reasoning_effort", EFFORTS),
        drop_thinking=template.boolean("drop_thinking"),
        continue_final_message=fields.boolean("continue_final_message") or False,
        max_tokens=_max_tokens(fields),
        **_sampling(fields),
        stop=_stop(fields),
        tools=_tools(fields),
        tool_choice=_tool_choice(fields),
        stream=fields.boolean("stream") or False,
        include_usage=options.boolean("include_usage") or False,
    )


def _refuse_unsupported(fields: Fields) -> None:
    for name, harmless in _NOT_YET.items():
        value = fields.values.get(name)
        if value is not None and value not in harmless:
            raise unsupported(name, "is not supported by this server; leave it out")
    unknown = [name for name in fields.values if name not in _KNOWN]
    if unknown:
        _log.debug("ignored unknown request fields: %.200s", ascii(unknown))


def _check_user_fields(fields: Fields) -> None:
    """Fields that are accepted and mean nothing while requests run one at a time."""
    for name in ("user", "user_id"):
        value = fields.text(name)
        if value is not None and len(value.encode("utf-8", "replace")) > MAX_USER_BYTES:
            raise invalid(name, f"must not exceed {MAX_USER_BYTES} bytes")
    fields.mapping("metadata")
    fields.integer("priority", -(2**31), 2**31 - 1)


def _thinking(fields: Fields) -> tuple[bool | None, int | None]:
    thinking = fields.mapping("thinking")
    budget = thinking.integer("budget_tokens", 1, ANY_COUNT)
    if fields.values.get("thinking") is None:
        return None, None
    kind = thinking.text("type", ("enabled", "disabled"))
    if kind is None:
        raise invalid("thinking.type", "is required: enabled or disabled")
    return kind == "enabled", budget


def _max_tokens(fields: Fields) -> int | None:
    names = ("max_completion_tokens", "max_tokens")
    given = [fields.integer(name, 1, ANY_COUNT) for name in names]
    return min((value for value in given if value is not None), default=None)


def _sampling(fields: Fields) -> dict[str, Any]:
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    values = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, low_is_out=True),
        "top_k": max(top_k, 0) if top_k is not None else None,
        "seed": fields.integer("seed", -(2**63), 2**63 - 1),
    }
    return {name: value for name, value in values.items() if value is not None}


def _stop(fields: Fields) -> tuple[str, ...]:
    if isinstance(fields.values.get("stop"), str):
        stops = [fields.values["stop"]]
    else:
        stops = fields.array("stop", MAX_STOPS) or []
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise invalid("stop", f"must be strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    tools = fields.array("tools", MAX_TOOLS) or []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            raise invalid(where, 'must be an object with "type": "function"')
        function = Fields(tool, where).mapping("function")
        name = function.text("name")
        if name is None or not _TOOL_NAME.fullmatch(name):
            problem = "must be 1 to 64 letters, digits, underscores or hyphens"
            raise invalid(f"{where}.function.name", problem)
        function.text("description")
        function.mapping("parameters")
        if function.boolean("strict"):
            raise unsupported(f"{where}.function.strict", "is not supported by this server")
    return tuple(tools)


def _tool_choice(fields: Fields) -> str:
    choice = fields.values.get("tool_choice")
    if choice is None:
        return "auto"
    if choice == "required" or isinstance(choice, dict):
        raise unsupported("tool_choice", "only none and auto are supported by this server")
    return fields.text("tool_choice", ("none", "auto")) or "auto"

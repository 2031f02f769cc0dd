"""The fields of a chat request: checked, typed, and refused where we cannot honour them."""

from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.encoding.constants import TASK_TOKENS
from dsv4_jax.serving.errors import invalid, unsupported
from dsv4_jax.serving.fields import Fields, check_known
from dsv4_jax.serving.message_fields import check_messages
from dsv4_jax.serving.sampling_fields import (
    ANY_COUNT,
    MAX_CHOICES,
    read_choices,
    read_end,
    read_max_tokens,
    read_priority,
    read_sampling,
    read_stop,
    read_stop_ids,
    read_stream_options,
    read_top_logprobs,
    read_user,
)
from dsv4_jax.serving.tool_fields import (
    ReplyFormat,
    ToolChoice,
    read_reply_format,
    read_tool_choice,
    read_tools,
)

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")

# Fields whose effect is not there yet, with the values that ask for nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}
_KNOWN = {
    *("model", "messages", "thinking", "reasoning_effort", "chat_template_kwargs", "stop"),
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "n", "best_of"),
    *("logprobs", "top_logprobs", "stop_token_ids", "stop_in_reasoning", "stream", "store"),
    *("include_stop_str_in_output", "stream_options", "tools", "tool_choice", "response_format"),
    *("parallel_tool_calls", "user", "user_id", "metadata", "priority", "continue_final_message"),
    *("task", "extracted_urls", "ignore_eos", "min_tokens"),
    *_NOT_YET,
}


@dataclass(frozen=True)
class ChatRequest:
    """A chat request as the client wrote it; None means not given.

    `thinking` is the field of that name; `template_thinking` and `template_effort` come from
    `chat_template_kwargs`. `sampling` are arguments of `SamplingParams`; `logprobs` is how many
    best tokens to report beside each one; `tools` are as received; `user` is who asks; `task` is a
    quick instruction, `extracted_urls` what the task read_url is about, each for itself. Of one
    user, requests of lower `priority` start first; an answer does not end before `min_tokens`, and
    with `ignore_eos` not by itself.
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
    sampling: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    stop_in_reasoning: bool = False
    keep_stop: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_calls: bool = True
    reply_format: ReplyFormat | None = None
    task: str | None = None
    extracted_urls: tuple[str, ...] = ()
    user: str = ""
    priority: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


def read_chat_request(body: object, refuses_unknown: bool = False) -> ChatRequest:
    """Reads the JSON body of a chat request.

    Args:
        refuses_unknown: fields that mean nothing here are an error.

    Raises:
        ApiError: 400, naming the field that is wrong or not supported.
    """
    if not isinstance(body, dict):
        raise invalid(None, "The request body must be a JSON object.", "invalid_json")
    fields = Fields(body)
    _refuse_unsupported(fields)
    check_known(body, _KNOWN, refuses_unknown)
    if "messages" not in body:
        raise invalid("messages", "is required")
    messages = fields.array("messages", ANY_COUNT) or []
    check_messages(messages)
    thinking, budget = _thinking(fields)
    template = fields.mapping("chat_template_kwargs")
    on = [template.boolean(name) for name in ("thinking", "enable_thinking")]
    limit, count = read_max_tokens(fields), read_choices(fields)
    return ChatRequest(
        messages=messages,
        model=fields.text("model"),
        thinking=thinking,
        thinking_budget=budget,
        effort=fields.text("reasoning_effort", EFFORTS),
        template_thinking=on[0] if on[0] is not None else on[1],
        template_effort=template.text("reasoning_effort", EFFORTS),
        drop_thinking=template.boolean("drop_thinking"),
        continue_final_message=fields.boolean("continue_final_message") or False,
        max_tokens=limit,
        sampling=read_sampling(fields),
        n=count,
        logprobs=_logprobs(fields),
        stop=read_stop(fields),
        stop_ids=read_stop_ids(fields),
        stop_in_reasoning=fields.boolean("stop_in_reasoning") or False,
        keep_stop=fields.boolean("include_stop_str_in_output") or False,
        tools=read_tools(fields),
        tool_choice=read_tool_choice(fields),
        parallel_calls=fields.boolean("parallel_tool_calls") is not False,
        reply_format=read_reply_format(fields),
        task=fields.text("task", tuple(TASK_TOKENS)),
        extracted_urls=_extracted_urls(fields, count),
        user=read_user(fields),
        priority=read_priority(fields),
        stream=fields.boolean("stream") or False,
        **read_end(fields, limit),
        **read_stream_options(fields),
    )


def _refuse_unsupported(fields: Fields) -> None:
    for name, harmless in _NOT_YET.items():
        value = fields.values.get(name)
        if value is not None and value not in harmless:
            raise unsupported(name, "is not supported by this server; leave it out")


def _thinking(fields: Fields) -> tuple[bool | None, int | None]:
    thinking = fields.mapping("thinking")
    budget = thinking.integer("budget_tokens", 1, ANY_COUNT)
    if fields.values.get("thinking") is None:
        return None, None
    kind = thinking.text("type", ("enabled", "disabled"))
    if kind is None:
        raise invalid("thinking.type", "is required: enabled or disabled")
    return kind == "enabled", budget


def _extracted_urls(fields: Fields, n: int) -> tuple[str, ...]:
    urls = fields.array("extracted_urls", ANY_COUNT) or []
    if not all(isinstance(url, str) and url for url in urls):
        raise invalid("extracted_urls", "must be texts")
    if len(urls) * n > MAX_CHOICES:
        raise invalid("extracted_urls", f"must ask for at most {MAX_CHOICES} answers, n to each")
    if urls and fields.values.get("task") != "read_url":
        raise invalid("extracted_urls", "is for the task read_url")
    return tuple(urls)


def _logprobs(fields: Fields) -> int | None:
    top = read_top_logprobs(fields, "top_logprobs")
    if not fields.boolean("logprobs"):
        if top:
            raise invalid("top_logprobs", "needs logprobs: true")
        return None
    return top or 0

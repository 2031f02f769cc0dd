"""The fields of a plain completion request."""

from dataclasses import dataclass, field
from typing import Any

from dsv4_jax.serving.errors import invalid, unsupported
from dsv4_jax.serving.fields import Fields, check_known
from dsv4_jax.serving.sampling_fields import (
    ANY_COUNT,
    read_choices,
    read_end,
    read_priority,
    read_sampling,
    read_stop,
    read_stop_ids,
    read_stream_options,
    read_top_logprobs,
    read_user,
)

MAX_PROMPTS = 64
DEFAULT_TOKENS = 16  # as clients of this endpoint expect
_ANY_ID = 2**31 - 1
Prompt = str | tuple[int, ...]
_KNOWN = {
    *("prompt", "model", "suffix", "add_bos", "echo", "logprobs", "n", "best_of", "max_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed"),
    *("repetition_penalty", "logit_bias", "stop", "stop_token_ids", "include_stop_str_in_output"),
    *("user", "user_id", "metadata", "priority", "min_tokens", "ignore_eos", "stream"),
    *("stream_options", "response_format", "tools", "store"),
}


@dataclass(frozen=True)
class CompletionRequest:
    """A completion request as the client wrote it. `n` answers are made to every prompt."""

    prompts: tuple[Prompt, ...]
    model: str | None = None
    suffix: str | None = None
    add_bos: bool | None = None
    echo: bool = False
    logprobs: int | None = None
    n: int = 1
    max_tokens: int = DEFAULT_TOKENS
    sampling: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    keep_stop: bool = False
    user: str = ""
    priority: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


def read_completion_request(body: object, refuses_unknown: bool = False) -> CompletionRequest:
    """Reads the JSON body of a completion request.

    Args:
        refuses_unknown: fields that mean nothing here are an error.

    Raises:
        ApiError: 400, naming the field that is wrong or not supported.
    """
    if not isinstance(body, dict):
        raise invalid(None, "The request body must be a JSON object.", "invalid_json")
    fields = Fields(body)
    for name in ("response_format", "tools"):
        if body.get(name):
            raise unsupported(name, "is not supported by this endpoint; leave it out")
    check_known(body, _KNOWN, refuses_unknown)
    asked = fields.integer("max_tokens", 0, ANY_COUNT)
    max_tokens = DEFAULT_TOKENS if asked is None else asked
    return CompletionRequest(
        prompts=_prompts(fields),
        model=fields.text("model"),
        suffix=fields.text("suffix"),
        add_bos=fields.boolean("add_bos"),
        echo=fields.boolean("echo") or False,
        logprobs=read_top_logprobs(fields, "logprobs"),
        n=read_choices(fields),
        max_tokens=max_tokens,
        sampling=read_sampling(fields),
        stop=read_stop(fields),
        stop_ids=read_stop_ids(fields),
        keep_stop=fields.boolean("include_stop_str_in_output") or False,
        user=read_user(fields),
        priority=read_priority(fields),
        stream=fields.boolean("stream") or False,
        **read_end(fields, max_tokens),
        **read_stream_options(fields),
    )


def read_token_ids(value: object, where: str) -> tuple[int, ...]:
    """Checks a list of token ids.

    Raises:
        ApiError: 400.
    """
    if not isinstance(value, list):
        raise invalid(where, "must be a list of token ids")
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _ANY_ID:
            raise invalid(f"{where}[{index}]", "must be a token id")
    return tuple(value)


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.values.get("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise invalid("prompt", "must be text, token ids, or a list of either; it is required")
    if isinstance(value[0], int):
        return (read_token_ids(value, "prompt"),)
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"has {len(value)} items, at most {MAX_PROMPTS} are allowed")
    return tuple(
        item if isinstance(item, str) else read_token_ids(item, f"prompt[{index}]")
        for index, item in enumerate(value)
    )

"""Schemas of what the server answers."""

from dsv4_jax.serving.openapi.terms import (
    BOOLEAN,
    COUNT,
    INTEGER,
    NUMBER,
    OBJECT,
    TEXT,
    Schema,
    either,
    list_of,
    maybe,
    one_of,
    ref,
    reply,
)

_CACHED = reply({"cached_tokens": COUNT})
_USAGE = reply(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": _CACHED,
        "completion_tokens_details": reply({"reasoning_tokens": COUNT}),
        "prompt_cache_hit_tokens": COUNT,
        "prompt_cache_miss_tokens": COUNT,
    }
)
_CALL = reply(
    {
        "id": TEXT,
        "type": one_of("function"),
        "function": reply({"name": TEXT, "arguments": TEXT}),
    }
)
_ANSWER = reply(
    {"role": one_of("assistant"), "content": maybe(TEXT)},
    {"reasoning_content": TEXT, "reasoning": TEXT, "tool_calls": list_of(_CALL)},
)
_BYTES = list_of({"type": "integer", "minimum": 0, "maximum": 255})
_BEST = reply({"token": TEXT, "logprob": NUMBER, "bytes": _BYTES})
_ENTRY = reply({"token": TEXT, "logprob": NUMBER, "bytes": _BYTES, "top_logprobs": list_of(_BEST)})
_LOGPROBS = reply(
    {
        "content": list_of(_ENTRY),
        "refusal": {"type": "null"},
        "reasoning_content": list_of(_ENTRY),
    }
)
_END = one_of("stop", "length", "tool_calls")


def _head(kind: str) -> dict[str, Schema]:
    return {
        "id": TEXT,
        "object": one_of(kind),
        "created": INTEGER,
        "model": TEXT,
        "system_fingerprint": TEXT,
    }


_CHAT_CHOICE = reply(
    {"index": COUNT, "message": _ANSWER, "logprobs": maybe(_LOGPROBS), "finish_reason": _END}
)
_LEGACY_LOGPROBS = reply(
    {
        "tokens": list_of(TEXT),
        "token_logprobs": list_of(maybe(NUMBER)),
        "top_logprobs": list_of(maybe(OBJECT)),
        "text_offset": list_of(COUNT),
    }
)
_TEXT_CHOICE = reply(
    {
        "index": COUNT,
        "text": TEXT,
        "logprobs": maybe(_LEGACY_LOGPROBS),
        "finish_reason": one_of("stop", "length"),
    }
)
_BLOCK = either(
    reply({"type": one_of("thinking"), "thinking": TEXT, "signature": TEXT}),
    reply({"type": one_of("text"), "text": TEXT, "citations": {"type": "null"}}),
    reply({"type": one_of("tool_use"), "id": TEXT, "name": TEXT, "input": OBJECT}),
)
_MESSAGE_USAGE = reply(
    dict.fromkeys(
        (
            "input_tokens",
            "cache_creation_input_tokens",
            "cache_read_input_tokens",
            "output_tokens",
        ),
        COUNT,
    )
)
_MODEL = reply(
    {
        "id": TEXT,
        "object": one_of("model"),
        "created": INTEGER,
        "owned_by": TEXT,
        "max_model_len": COUNT,
    }
)
_ERROR = reply(
    {
        "error": reply(
            {"message": TEXT, "type": TEXT, "param": maybe(TEXT), "code": TEXT},
        )
    }
)
_MESSAGE_ERROR = reply(
    {"type": one_of("error"), "error": reply({"type": TEXT, "message": TEXT}), "request_id": TEXT}
)

SCHEMAS: dict[str, Schema] = {
    "Chat": reply({**_head("chat.completion"), "choices": list_of(_CHAT_CHOICE), "usage": _USAGE}),
    "Completion": reply(
        {**_head("text_completion"), "choices": list_of(_TEXT_CHOICE), "usage": _USAGE}
    ),
    "Message": reply(
        {
            "id": TEXT,
            "type": one_of("message"),
            "role": one_of("assistant"),
            "model": TEXT,
            "content": list_of(_BLOCK),
            "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
            "stop_sequence": maybe(TEXT),
            "usage": _MESSAGE_USAGE,
        }
    ),
    "Count": reply({"input_tokens": COUNT}),
    "Tokens": reply(
        {"count": COUNT, "max_model_len": COUNT, "tokens": list_of(COUNT)},
        {"token_strs": list_of(TEXT)},
    ),
    "Text": reply({"prompt": TEXT}),
    "Rendered": reply({"prompt": TEXT, "tokens": list_of(COUNT), "count": COUNT, "plan": OBJECT}),
    "Cancelled": reply({"id": TEXT, "cancelled": BOOLEAN}),
    "Draining": reply({"phase": TEXT, "unfinished": COUNT}),
    "Flushed": reply({"forgotten_tokens": COUNT}),
    "Model": _MODEL,
    "Models": reply({"object": one_of("list"), "data": list_of(ref("Model"))}),
    "ServerInfo": reply(
        {
            "version": TEXT,
            "models": list_of(TEXT),
            "max_model_len": COUNT,
            "prompt_profile": TEXT,
            "default_effort": TEXT,
            "loop_guard": BOOLEAN,
            "replay_tokens": COUNT,
            "system_fingerprint": TEXT,
            "tokenizer_sha256": TEXT,
        }
    ),
    "Health": reply({"status": TEXT}, {"reason": TEXT}),
    "Ready": reply(
        {"phase": TEXT, "percent": COUNT, "notice": maybe(TEXT), "examples": list_of(TEXT)}
    ),
    "Version": reply({"version": TEXT}),
    "Error": _ERROR,
    "MessageError": _MESSAGE_ERROR,
}

"""Schemas of what clients send."""

from dsv4_jax.encoding.constants import TASK_TOKENS
from dsv4_jax.serving.anthropic.request import EFFORTS as MESSAGE_EFFORTS
from dsv4_jax.serving.completion_schema import MAX_PROMPTS
from dsv4_jax.serving.openapi.terms import (
    BOOLEAN,
    OBJECT,
    TEXT,
    Schema,
    asked,
    either,
    integer,
    list_of,
    maybe,
    number,
    one_of,
    ref,
)
from dsv4_jax.serving.sampling_fields import (
    ANY_COUNT,
    MAX_BIAS,
    MAX_BIASED,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOPS,
)
from dsv4_jax.serving.schema import EFFORTS
from dsv4_jax.serving.tool_fields import FORMATS, MAX_GRAMMAR_CHARS, MAX_TOOLS

_INT32 = 2**31 - 1
_LIMIT = integer(1, ANY_COUNT)
_TOP_P = number(0, 1, is_open=True)
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOPS = either(_STOP, list_of(_STOP, MAX_STOPS))
_TOKEN = integer(0, _INT32)
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_USAGE = asked({"include_usage": BOOLEAN, "continuous_usage_stats": BOOLEAN}, ())

_SHARED: dict[str, Schema] = {
    "model": TEXT,
    "temperature": number(0, 2),
    "top_p": _TOP_P,
    "top_k": integer(-1, _INT32),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2, is_open=True),
    "logit_bias": {
        "type": "object",
        "additionalProperties": maybe(number(-MAX_BIAS, MAX_BIAS)),
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "maxProperties": MAX_BIASED,
    },
    "seed": integer(-(2**63), 2**63 - 1),
    "n": integer(1, MAX_CHOICES),
    "best_of": integer(1, MAX_CHOICES),
    "stop": _STOPS,
    "stop_token_ids": list_of(_TOKEN, MAX_STOPS),
    "include_stop_str_in_output": BOOLEAN,
    "stream": BOOLEAN,
    "stream_options": _USAGE,
    "user": TEXT,
    "user_id": TEXT,
    "metadata": OBJECT,
    "priority": integer(-(2**31), _INT32),
    "min_tokens": integer(0, ANY_COUNT),
    "ignore_eos": BOOLEAN,
}
_PART = asked({"type": one_of("text"), "text": TEXT}, ("type",))
_CONTENT = either(TEXT, list_of(_PART))
_CALL = asked(
    {
        "id": TEXT,
        "type": one_of("function"),
        "function": asked({"name": TEXT, "arguments": either(TEXT, OBJECT)}, ("name",)),
    },
    ("function",),
)
_MESSAGE = asked(
    {
        "role": one_of("system", "developer", "user", "assistant", "tool"),
        "content": _CONTENT,
        "reasoning_content": TEXT,
        "reasoning": TEXT,
        "tool_calls": list_of(_CALL),
        "tool_call_id": TEXT,
        "prefix": BOOLEAN,
    },
    ("role",),
)
_TOOL = asked(
    {
        "type": one_of("function"),
        "function": asked(
            {"name": _NAME, "description": TEXT, "parameters": OBJECT, "strict": BOOLEAN},
            ("name",),
        ),
    },
    ("function",),
)
_CHOICE = either(
    one_of("none", "auto", "required"),
    asked(
        {"type": one_of("function"), "function": asked({"name": TEXT}, ("name",))},
        ("type", "function"),
    ),
)
_FORMAT = asked(
    {
        "type": one_of(*FORMATS),
        "json_schema": asked({"name": TEXT, "schema": OBJECT, "strict": BOOLEAN}, ()),
        "regex": {"type": "string", "maxLength": MAX_GRAMMAR_CHARS},
        "grammar": {"type": "string", "maxLength": MAX_GRAMMAR_CHARS},
    },
    ("type",),
)
CHAT = asked(
    _SHARED
    | {
        "messages": list_of(_MESSAGE),
        "thinking": asked(
            {"type": one_of("enabled", "disabled"), "budget_tokens": _LIMIT}, ("type",)
        ),
        "reasoning_effort": one_of(*EFFORTS),
        "chat_template_kwargs": asked(
            {
                "thinking": BOOLEAN,
                "enable_thinking": BOOLEAN,
                "reasoning_effort": one_of(*EFFORTS),
                "drop_thinking": BOOLEAN,
            },
            (),
        ),
        "max_tokens": _LIMIT,
        "max_completion_tokens": _LIMIT,
        "stop_in_reasoning": BOOLEAN,
        "tools": list_of(_TOOL, MAX_TOOLS),
        "tool_choice": _CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "response_format": _FORMAT,
        "logprobs": BOOLEAN,
        "top_logprobs": integer(0, MAX_LOGPROBS),
        "continue_final_message": BOOLEAN,
        "task": one_of(*TASK_TOKENS),
        "extracted_urls": list_of(TEXT, MAX_CHOICES),
    },
    ("messages",),
)
COMPLETION = asked(
    _SHARED
    | {
        "prompt": either(
            TEXT,
            {**list_of(_TOKEN), "minItems": 1},
            {**list_of(either(TEXT, list_of(_TOKEN)), MAX_PROMPTS), "minItems": 1},
        ),
        "suffix": TEXT,
        "max_tokens": integer(0, ANY_COUNT),
        "echo": BOOLEAN,
        "logprobs": integer(0, MAX_LOGPROBS),
        "add_bos": BOOLEAN,
    },
    ("prompt",),
)

_BLOCK = either(
    asked({"type": one_of("text"), "text": TEXT}, ("type", "text")),
    asked({"type": one_of("thinking"), "thinking": TEXT, "signature": TEXT}, ("type", "thinking")),
    asked({"type": one_of("redacted_thinking"), "data": TEXT}, ("type",)),
    asked(
        {"type": one_of("tool_use"), "id": TEXT, "name": TEXT, "input": OBJECT},
        ("type", "id", "name", "input"),
    ),
    asked(
        {
            "type": one_of("tool_result"),
            "tool_use_id": TEXT,
            "content": _CONTENT,
            "is_error": BOOLEAN,
        },
        ("type", "tool_use_id"),
    ),
)
_TURN = asked(
    {
        "role": one_of("user", "assistant", "system"),
        "content": either(TEXT, list_of(_BLOCK)),
    },
    ("role", "content"),
)
_USED_TOOL = asked(
    {
        "type": one_of("custom"),
        "name": _NAME,
        "description": TEXT,
        "input_schema": OBJECT,
        "strict": BOOLEAN,
    },
    ("name", "input_schema"),
)
_SCHEMA_FORMAT = asked({"type": one_of("json_schema"), "schema": OBJECT}, ("type", "schema"))
MESSAGES = asked(
    {
        "model": TEXT,
        "messages": list_of(_TURN),
        "system": _CONTENT,
        "max_tokens": _LIMIT,
        "temperature": number(0, 1),
        "top_p": _TOP_P,
        "top_k": integer(0, _INT32),
        "stop_sequences": _STOPS,
        "stream": BOOLEAN,
        "metadata": asked({"user_id": TEXT}, ()),
        "tools": list_of(_USED_TOOL, MAX_TOOLS),
        "tool_choice": asked(
            {
                "type": one_of("auto", "any", "tool", "none"),
                "name": TEXT,
                "disable_parallel_tool_use": BOOLEAN,
            },
            ("type",),
        ),
        "thinking": asked(
            {"type": one_of("enabled", "disabled", "adaptive"), "budget_tokens": _LIMIT},
            ("type",),
        ),
        "output_config": asked({"effort": one_of(*MESSAGE_EFFORTS), "format": _SCHEMA_FORMAT}, ()),
        "output_format": _SCHEMA_FORMAT,
    },
    ("messages", "max_tokens"),
)
COUNTED = {**MESSAGES, "required": ["messages"]}
TOKENIZE = either(
    asked(
        {
            "prompt": TEXT,
            "model": TEXT,
            "add_special_tokens": BOOLEAN,
            "add_bos": BOOLEAN,
            "return_token_strs": BOOLEAN,
        },
        ("prompt",),
    ),
    ref("ChatRequest"),
)
DETOKENIZE = asked({"tokens": list_of(_TOKEN), "model": TEXT}, ("tokens",))

SCHEMAS: dict[str, Schema] = {
    "ChatRequest": CHAT,
    "CompletionRequest": COMPLETION,
    "MessageRequest": MESSAGES,
    "CountRequest": COUNTED,
    "TokenizeRequest": TOKENIZE,
    "DetokenizeRequest": DETOKENIZE,
}

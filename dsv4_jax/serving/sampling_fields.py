"""Fields that several endpoints share: how to sample, when to stop, who asks."""

from typing import Any

from dsv4_jax.serving.errors import invalid
from dsv4_jax.serving.fields import Fields

MAX_CHOICES = 16
MAX_BIASED = 1024  # as in dsv4_jax.sampling, which needs the device library
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_USER_BYTES = 512
MAX_BIAS = 100
ANY_COUNT = 10**15  # larger counts are typing errors; smaller ones meet the context limit
_INT32 = 2**31 - 1


def read_sampling(fields: Fields) -> dict[str, Any]:
    """Returns the arguments of `SamplingParams` that the request names, without `max_tokens`."""
    top_k = fields.integer("top_k", -1, _INT32)
    values = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, low_is_out=True),
        "top_k": max(top_k, 0) if top_k is not None else None,
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 0, 2, low_is_out=True),
        "seed": fields.integer("seed", -(2**63), 2**63 - 1),
        "logit_bias": _logit_bias(fields),
    }
    return {name: value for name, value in values.items() if value is not None}


def read_choices(fields: Fields) -> int:
    """Returns how many answers are wanted."""
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, n):
        raise invalid("best_of", "must equal n: answers are not ranked here", "unsupported_value")
    return n


def read_top_logprobs(fields: Fields, name: str) -> int | None:
    """Returns how many best tokens to report beside each one, None if not asked."""
    return fields.integer(name, 0, MAX_LOGPROBS)


def read_max_tokens(fields: Fields) -> int | None:
    names = ("max_completion_tokens", "max_tokens")
    given = [fields.integer(name, 1, ANY_COUNT) for name in names]
    return min((value for value in given if value is not None), default=None)


def read_stop(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    if isinstance(fields.values.get(name), str):
        stops = [fields.values[name]]
    else:
        stops = fields.array(name, MAX_STOPS) or []
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise invalid(name, f"must be strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def read_stop_ids(fields: Fields) -> frozenset[int]:
    ids = fields.array("stop_token_ids", MAX_STOPS) or []
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= _INT32 for i in ids):
        raise invalid("stop_token_ids", "must be token ids")
    return frozenset(ids)


def read_end(fields: Fields, limit: int | None) -> dict[str, Any]:
    """Returns `min_tokens` and `ignore_eos`, by these names.

    Args:
        limit: Tokens the answer may have, None for as many as fit.
    """
    least = fields.integer("min_tokens", 0, ANY_COUNT) or 0
    if limit is not None and least > limit:
        raise invalid("min_tokens", f"{least} must not exceed the limit of {limit} tokens")
    return {"min_tokens": least, "ignore_eos": fields.boolean("ignore_eos") or False}


def read_priority(fields: Fields) -> int:
    """Returns whose turn is earlier, lower ones first."""
    return fields.integer("priority", -(2**31), _INT32) or 0


def read_stream_options(fields: Fields) -> dict[str, bool]:
    """Returns which chunks tell token counts: the one at the end, and all of them."""
    options = fields.mapping("stream_options")
    at_end = options.boolean("include_usage") or False
    always = options.boolean("continuous_usage_stats") or False
    if always and not at_end:
        raise invalid("stream_options.continuous_usage_stats", "needs include_usage: true")
    return {"include_usage": at_end, "continuous_usage": always}


def read_user(fields: Fields) -> str:
    """Returns who asks, as the client says it; checks the other fields that only describe."""
    given = [fields.text(name) for name in ("user_id", "user")]
    for name, value in zip(("user_id", "user"), given, strict=True):
        if value is not None and len(value.encode("utf-8", "replace")) > MAX_USER_BYTES:
            raise invalid(name, f"must not exceed {MAX_USER_BYTES} bytes")
    fields.mapping("metadata")
    return given[0] or given[1] or ""


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...] | None:
    bias = fields.mapping("logit_bias")
    if not bias.values:
        return None
    if len(bias.values) > MAX_BIASED:
        raise invalid("logit_bias", f"has more than {MAX_BIASED} entries")
    for key in bias.values:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise invalid("logit_bias", f"{ascii(key[:20])} is not a token id")
    given = {int(key): bias.number(key, -MAX_BIAS, MAX_BIAS) for key in bias.values}
    return tuple((index, value) for index, value in given.items() if value is not None)

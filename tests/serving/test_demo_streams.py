"""The demo that ships with the project, over HTTP: a stream's text does not depend on company."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax
import pytest

from checkpoints.convert import convert
from checkpoints.load import load_checkpoint
from checkpoints.progress import Progress
from dsv4_jax.encoding import detect_profile_in
from dsv4_jax.numerics import Numerics
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import plan_sizes
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.service import Service, Settings
from dsv4_jax.tokenizer import Tokenizer
from scripts.serve import DEMO
from tests.serving.engine.conftest import metric
from tests.serving.fakes import PATIENCE_S
from tests.serving.live import serving

pytestmark = pytest.mark.slow
STREAMS, SLOTS, MAX_LEN, NEW = 64, 12, 3072, 24
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add", "strict": True, "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def engine_and_planner(tmp_path_factory) -> Iterator[tuple[Engine, Planner]]:
    folder = tmp_path_factory.mktemp("demo")
    convert(DEMO, folder, progress=Progress("convert", quiet=True))
    cfg, params = load_checkpoint(folder)
    scheduling, sizes = plan_sizes(cfg, MAX_LEN, SLOTS, 6 * MAX_LEN)
    engine = Engine(cfg, Numerics(), jax.device_put(params, jax.devices()[0]), scheduling, sizes)
    engine.warm_up()
    engine.start()
    yield engine, Planner(Tokenizer.from_dir(folder), detect_profile_in(folder), MAX_LEN)
    engine.stop()


def asked(index: int) -> tuple[str, dict[str, Any]]:
    """Path and body of request `index`: all kinds, half of them with a long common beginning."""
    words = f"Question {index}: " + "what is this? " * (index % 9)
    shared = "You answer in one word. " * 8 if index % 2 else "Be brief."
    drawn = {"temperature": 0} if index % 4 < 2 else {"temperature": 1.0, "seed": index}
    body = {"max_tokens": NEW, "stream": True, **drawn}
    if index % 8 == 7:
        return "/v1/completions", body | {"prompt": shared + words, "logprobs": 1}
    messages = [{"role": "system", "content": shared}, {"role": "user", "content": words}]
    thinking = {"type": "enabled", "budget_tokens": 8} if index % 3 else {"type": "disabled"}
    kinds: list[dict[str, Any]] = [
        {},
        {"tools": [TOOL], "tool_choice": "required", "max_tokens": 80},
        {"response_format": FORMAT, "max_tokens": 80},
        {"tools": [TOOL]},
        {"presence_penalty": 0.5, "logprobs": True, "top_logprobs": 2},
        {"top_p": 0.9, "top_k": 40, "n": 2},
    ]
    return "/v1/chat/completions", body | {
        "messages": messages,
        "thinking": thinking,
        **kinds[index % len(kinds)],
    }


def said(address: str, index: int) -> list[Any]:
    """All that an answer tells, without its random names and where its pieces end."""
    path, body = asked(index)
    texts: dict[tuple[Any, ...], str] = {}
    ends: list[Any] = []
    with httpx.stream("POST", address + path, json=body, timeout=10 * PATIENCE_S) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                for name, text in pieces(choice):
                    key = choice["index"], *name
                    texts[key] = texts.get(key, "") + text
                if choice["finish_reason"]:
                    ends.append((choice["index"], choice["finish_reason"]))
    return [sorted(texts.items()), sorted(ends)]


def pieces(choice: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    delta = choice.get("delta", {"content": choice.get("text")})
    for name in ("reasoning_content", "content"):
        if text := delta.get(name):
            yield (name,), text
    for call in delta.get("tool_calls", ()):
        function = call["function"]
        yield ("call", call["index"]), function.get("name", "") + function["arguments"]
    logprobs = choice["logprobs"] or {}
    for entry in logprobs.get("content") or ():
        yield ("logprobs",), f"{entry['token']}{entry['logprob']}"
    for value in logprobs.get("token_logprobs") or ():
        yield ("logprobs",), str(value)


def test_sixty_four_streams_say_what_each_says_alone(engine_and_planner):
    engine, planner = engine_and_planner
    service = Service(Settings(("demo",), parallel=2 * STREAMS))
    service.ready(planner, engine, "fp")
    with serving(service) as address, ThreadPoolExecutor(STREAMS) as clients:
        alone = [said(address, index) for index in range(STREAMS)]
        start = threading.Barrier(STREAMS)

        def together(index: int) -> list[Any]:
            start.wait(PATIENCE_S)
            return said(address, index)

        assert list(clients.map(together, range(STREAMS))) == alone
    calls = [texts for texts, _ in alone if any("call" in key for key, _ in texts)]
    assert len(calls) >= 8 and all(ends for _, ends in alone)
    assert metric(engine, "compilations_after_ready_total") == 0
    with engine._lock:
        assert not engine.scheduler.slots.live
        engine.scheduler.check()

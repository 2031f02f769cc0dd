"""The load client and the overhead figure; what they measure is not judged here."""

import json
import threading

import pytest

from dsv4_jax import presets
from dsv4_jax.bench import serve, turns
from dsv4_jax.bench.serve import Answer, Load
from scripts import bench
from tests.serving.fakes import FakeModel, chat_answer, make_service
from tests.serving.live import serving


@pytest.mark.parametrize("loop", [["--clients", "3"], ["--rate", "200"]])
def test_load_on_a_server(loop, capsys):
    service = make_service(FakeModel(chat_answer("hello there")), parallel=4, max_waiting=100)
    with serving(service) as url:
        command = ["serve", "--url", url, "--requests", "9", "--prompt-chars", "40", *loop]
        assert bench.main([*command, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert bench.main(command) == 0
        shown = capsys.readouterr().out
    assert figures["outcomes"] == {"ok": 9}
    assert figures["output_tokens_per_s"] > figures["requests_per_s"] > 0
    assert 0 < figures["first_token_ms"]["p50"] <= figures["request_ms"]["p99"]
    assert "| first token |" in shown and "9 ok in" in shown


def test_refusals_are_counted_and_not_timed(capsys):
    gate = threading.Semaphore(0)
    service = make_service(FakeModel(chat_answer("hi"), gate=gate), parallel=1, max_waiting=0)
    with serving(service) as url:
        threading.Timer(0.5, gate.release, (1000,)).start()
        load = Load(url, requests=3, clients=3)
        figures = serve.summary(load, *serve.run(load))
    assert figures["outcomes"].get("status 429", 0) + figures["outcomes"]["ok"] == 3


def test_percentiles_of_known_answers():
    answers = [
        Answer(due=0.0, events=[0.1 * n, 0.1 * n + 0.02], end=1.0, tokens=2) for n in range(1, 12)
    ]
    answers += [Answer(due=0.0, outcome="status 429", end=9.0)]
    figures = serve.summary(Load("http://x"), answers, took_s=2.0)
    assert figures["first_token_ms"]["p50"] == pytest.approx(600)
    assert figures["inter_token_ms"]["p99"] == pytest.approx(20)
    assert figures["request_ms"] == pytest.approx({"p50": 1000, "p90": 1000, "p99": 1000})
    assert figures["output_tokens_per_s"] == 11
    empty = serve.summary(Load("http://x"), answers[-1:], took_s=1.0)
    assert empty["first_token_ms"] is None and "| first token | – |" in serve.table(empty)


def test_prompts_differ_from_the_start():
    load = Load("http://x", prompt_chars=50)
    prompts = {serve.make_prompt(load, n) for n in range(100)}
    assert len({text[:20] for text in prompts}) == 100
    assert {len(text) for text in prompts} == {50}


@pytest.mark.parametrize(
    "flags", [["--requests", "0"], ["--rate", "-1"], ["--url", "ftp://x"], ["--url", "http://"]]
)
def test_what_is_wrong_is_said(flags, capsys):
    assert bench.main(["serve", "--url", "http://127.0.0.1:1", *flags]) == 1
    assert flags[0].strip("-") in capsys.readouterr().err


def test_a_server_that_is_not_there():
    load = Load("http://127.0.0.1:1", requests=2)
    assert serve.summary(load, *serve.run(load))["outcomes"] == {"ConnectionRefusedError": 2}


def test_two_turns_on_a_server():
    model = FakeModel(chat_answer("hello"))
    model.cached_tokens = 128
    with serving(make_service(model)) as url:
        figures = turns.measure(url, tokens=500, repeats=2)
        with pytest.raises(ValueError, match="status 400"):
            turns.measure(url, tokens=99_999, repeats=1)
    with pytest.raises(ValueError, match="repeats=0"):
        turns.measure(url, tokens=500, repeats=0)
    assert figures["ratio"] > 0 and 500 <= figures["prompt_tokens"] < 600
    second = model.prompts[1]
    assert second[:500] == model.prompts[0][:500], "the chat goes on"
    assert figures["cached_share"] == pytest.approx(128 / len(second), rel=0.05)
    assert "in the second turn after" in turns.line(figures)


@pytest.mark.slow
def test_the_second_turn_of_a_long_chat_is_cached(capsys):
    """Nearly nothing of its prompt is computed again; how fast that is, is printed."""
    assert bench.main(["turns", "--tokens", "4096", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["prompt_tokens"] >= 3900 and figures["cached_share"] > 0.95


@pytest.mark.slow
def test_the_overhead_figure(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(presets.tiny().to_hf()))
    flags = ["--config", str(config), "--batches", "2", "--tokens", "40", "--repeats", "1"]
    assert bench.main(["engine", *flags]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| 2 | 4 | ") and len(row.split("|")) == 9

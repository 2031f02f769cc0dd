"""The soak: its traffic, what it watches, and that it fails when it should."""

import os
import random
from dataclasses import replace

import pytest

from dsv4_jax.serving.client import Client
from dsv4_jax.serving.soak.run import Soak
from dsv4_jax.serving.soak.traffic import Traffic, Unexpected
from dsv4_jax.serving.soak.watch import Bounds, Held, growth, held
from scripts.soak import main
from tests.serving.fakes import MAX_LEN, FakeModel, answer, make_service
from tests.serving.live import serving

HELD = Held(100.0, 10, 20, 5, 0, 0, 0.0, 0.0)
GAUGES = ("num_requests_running", "num_requests_waiting", "slot_usage_perc", "kv_cache_usage_perc")


@pytest.fixture
def served():
    """A client of a live server, and its model."""
    model = FakeModel(answer("hello " * 20))
    for name in GAUGES:
        model.metrics.watch(name, lambda: 0)
    with serving(make_service(model, parallel=4)) as url:
        yield Client(url), model


@pytest.mark.parametrize(
    "kind", ["short", "whole", "long", "turns", "tools", "leave", "drop", "bad"]
)
def test_every_kind_of_request_is_answered(served, kind):
    client, _ = served
    for seed in range(20 if kind == "bad" else 1):
        getattr(Traffic(client, MAX_LEN), kind)(random.Random(seed))


def test_a_failing_model_is_noticed(served):
    client, model = served
    model.fails_after = 0
    traffic = Traffic(client, MAX_LEN)
    with pytest.raises(Unexpected, match="status 500"):
        traffic.whole(random.Random(0))
    outcomes = []
    for seed in range(12):
        try:
            outcomes.append(traffic.one(random.Random(seed)))
        except Unexpected as error:
            outcomes.append(str(error))
    assert any(": 500 " in outcome for outcome in outcomes)


def test_what_this_process_holds(served):
    client, _ = served
    now = held(client, os.getpid())
    assert now.memory_mib > 1 and now.threads > 1 and now.files > 2 and now.tasks > 0
    assert now.is_idle
    with pytest.raises(ValueError, match="pid 999999999"):
        held(client, 999999999)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"memory_mib": 165.0}, "memory_mib grew from 100.0 to 165.0, allowed is 64"),
        ({"threads": 15}, "threads grew"),
        ({"files": 25}, "files grew"),
        ({"tasks": 8}, "tasks grew"),
        ({"running": 1}, "not idle"),
        ({"pages": 0.1}, "not idle"),
    ],
)
def test_growth_is_told(change, problem):
    found = growth(HELD, replace(HELD, **change), Bounds())
    assert len(found) == 1 and problem in found[0]


def test_staying_within_the_bounds_is_fine():
    after = replace(HELD, memory_mib=164.0, threads=14, files=24, tasks=None)
    assert growth(HELD, after, Bounds()) == []


def test_a_short_soak_looks_more_than_once(served):
    client, _ = served
    lines: list[str] = []
    soak = Soak(client, os.getpid(), 0.02, workers=4, every_s=0.3, report=lines.append)
    assert soak.run() == []
    assert len(soak.looks) >= 2 and soak.done.total() > 0
    assert len(lines) == 1 + len(soak.looks)


def test_a_soak_of_a_broken_server_ends_early_and_says_why(served):
    client, model = served
    model.fails_after = 0
    soak = Soak(client, os.getpid(), minutes=60, workers=4, report=lambda _: None)
    assert any("internal" in problem for problem in soak.run())


@pytest.mark.parametrize(
    "args", [["--url", "http://127.0.0.1:1"], ["--pid", "1"], ["--minutes", "0"]]
)
def test_usage(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "soak.py: error:" in capsys.readouterr().err

"""Phases, rates, guards and overrides: plain data, no arrays."""

import math

import pytest

from dsv4_jax.training.guard import Guard, GuardConfig
from dsv4_jax.training.run import load_run
from dsv4_jax.training.schedules import Phase, Plan, Schedule

SCHEDULE = Schedule(lr=1.0, end_lr=0.1, warmup_steps=4, decay_from=0.75)


def plan():
    phases = (
        Phase("a", 64 * 20, 16, 8, ((2, 64), (4, 128)), attention="dense", learn="trunk"),
        Phase("b", 128 * 3, 16, 8, attention="dense", learn="indexer", lr=7.0),
        Phase("c", 64 * 14, 32, 2),
    )
    return Plan(phases, SCHEDULE)


def test_stages_follow_each_other():
    p = plan()
    assert [(s.phase.name, s.rows, s.first_step, s.steps) for s in p.stages] == [
        ("a", 2, 0, 2),
        ("a", 4, 2, 2),
        ("a", 8, 4, 9),
        ("b", 8, 13, 3),
        ("c", 2, 16, 14),
    ]
    assert p.steps == 30 and p.borders() == [2, 4, 13, 16]
    moments = [p.at(i) for i in range(p.steps)]
    for now, then in zip(moments, moments[1:], strict=False):
        assert then.tokens - now.tokens == now.stage.rows * now.stage.phase.seq_len
        same = now.stage.phase.seq_len == then.stage.phase.seq_len
        assert then.first_row == (now.first_row + now.stage.rows if same else 0)
    assert p.tokens == moments[-1].tokens + 64


def test_rates():
    p = plan()
    rates = [p.at(i).lr for i in range(p.steps)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[13:16] == [7.0] * 3
    start = 0.75 * p.tokens
    for i in range(16, 30):
        moment = p.at(i)
        if moment.tokens < start:
            assert (moment.lr, moment.mtp) == (1.0, 0.3)
        else:
            part = (moment.tokens - start) / (p.tokens - start)
            assert moment.lr == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * part)))
            assert moment.mtp == 0.1
    with pytest.raises(ValueError, match="step 30"):
        p.at(30)


def test_biases_may_freeze():
    p = Plan((Phase("a", 100, 10, 1),), Schedule(bias_freeze_from=0.5))
    assert [p.at(i).bias_speed for i in (4, 5)] == [1e-3, 0.0]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"tokens": 0}, "tokens=0"),
        ({"attention": "full"}, "attention='full'"),
        ({"learn": "nothing"}, "learn='nothing'"),
        ({"learn": "indexer"}, "attention='dense'"),
        ({"learn": "trunk"}, "indexers that learn"),
        ({"ramp": ((1, 1000),)}, "ramp"),
    ],
)
def test_impossible_phases(fields, said):
    with pytest.raises(ValueError, match=said):
        Phase(**({"name": "p", "tokens": 100, "seq_len": 10, "rows": 1} | fields))


def test_guard_needs_a_full_window_and_then_limits():
    guard = Guard(GuardConfig("skip", window=4, sigmas=2.0))
    for value in (1.0, 2.0, 1.0):
        guard.record(value, 10 * value)
        assert guard.limits() == (math.inf, math.inf)
    guard.record(2.0, 20.0)
    assert guard.limits() == (pytest.approx(2.5), pytest.approx(25.0))
    other = Guard(guard.config)
    other.restore(guard.state())
    assert other.limits() == guard.limits()
    guard.record(5.0, 5.0)
    assert guard.losses == [2.0, 1.0, 2.0, 5.0]


def test_overrides():
    run = load_run("tiny", ["schedule.lr=0.5", "phases.long.rows=2", "data.train=x", "seed=3"])
    assert (run.schedule.lr, run.phases[3].rows, run.seed) == (0.5, 2, 3)
    assert run.data["train"][0].path == "x"


@pytest.mark.parametrize(
    "change, said",
    [
        ("schedule.speed=1", "no such field"),
        ("phases.none.rows=1", "no phase 'none'"),
        ("seed", "key=value"),
        ("schedule.lr=-1", "schedule.lr=-1"),
        ("phases.long.seq_len=99999", "exceeds the model's"),
        ("data.train=3", "path of its packed rows"),
    ],
)
def test_bad_overrides(change, said):
    with pytest.raises(ValueError, match=said):
        load_run("tiny", [change])


def test_unknown_configuration_lists_known_ones():
    with pytest.raises(ValueError, match="configurations here: .*tiny"):
        load_run("nothing", [])

"""What the model tests share: loaded fixture checkpoints, their runs, and a table of worst errors.

`DSV4_EXACTNESS=1 pytest tests/model` prints the table; with a path instead of 1, the rows between
the markers of that document are replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from dsv4_jax.numerics import Numerics
from tests.model.support import (
    CHUNKS,
    PLAIN,
    REFERENCE,
    Model,
    Run,
    Runner,
    load_model,
    with_lengths,
)

MANY = 20  # tests that need runs, from which on all usual ones are prepared at once
EVERY_DAY = (
    ("checkpoint", PLAIN),
    ("checkpoint", REFERENCE),
    ("checkpoint_base", PLAIN),
    ("checkpoint_base", REFERENCE),
)
BEGIN, END = "<!-- exactness: begin -->", "<!-- exactness: end -->"
_ROWS: dict[str, tuple[float, float]] = {}

Check = Callable[[str, float, float], None]
Runs = Callable[[str, Numerics, int], Run]


@pytest.fixture(scope="package", autouse=True)
def strict_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="package")
def within() -> Check:
    """Asserts that an error keeps its bar, and notes the worst one of every case."""

    def check(case: str, error: float, bar: float) -> None:
        worst = _ROWS.get(case, (0.0, bar))[0]
        _ROWS[case] = (max(float(error), worst), bar)
        assert error <= bar, f"{case}: {error:.3g} exceeds {bar:.3g}"

    return check


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Fixture checkpoints by folder name, loaded once."""
    loaded: dict[str, Model] = {}

    def get(folder: str) -> Model:
        if folder not in loaded:
            loaded[folder] = load_model(folder, tmp_path_factory.mktemp("converted") / folder)
        return loaded[folder]

    return get


@pytest.fixture(scope="package")
def model(models: Callable[[str], Model]) -> Model:
    """The checkpoint with every layer kind."""
    return models("checkpoint")


@pytest.fixture(scope="package")
def runners(
    models: Callable[[str], Model], request: pytest.FixtureRequest
) -> Iterator[Callable[[str, Numerics], Runner]]:
    """One runner per checkpoint and numerics: its compiled steps are reused by all tests."""
    made: dict[tuple[str, Numerics], Runner] = {}
    pool = ThreadPoolExecutor(2)  # compiling takes most of the time, and one core each

    def get(folder: str, num: Numerics) -> Runner:
        if (folder, num) not in made:
            model = models(folder)
            more = folder == "checkpoint" and not num.rounds
            prompts = with_lengths(model.prompts) if more else model.prompts
            runner = made[folder, num] = Runner(model, num, prompts)
            chunks = () if num.rounds else [c for c in CHUNKS if c <= runner.longest]
            for width in (runner.longest, 1, *chunks):
                runner.prepare(width, pool)
        return made[folder, num]

    if sum("runs" in item.fixturenames for item in request.session.items) > MANY:
        for folder, num in EVERY_DAY:
            get(folder, num)
    yield get
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="package", autouse=True)
def compile_early(runners: Callable[[str, Numerics], Runner]) -> None:
    """Compiling begins with the first test, beside tests that need none of it."""


@pytest.fixture(scope="package")
def runs(runners: Callable[[str, Numerics], Runner]) -> Runs:
    """All prompts in chunks of some length (0: each in one piece, then decoding)."""
    done: dict[tuple[str, Numerics, int], Run] = {}

    def get(folder: str, num: Numerics, chunk: int = 0) -> Run:
        if (folder, num, chunk) not in done:
            runner = runners(folder, num)
            done[folder, num, chunk] = runner.run(chunk or runner.longest, decode=not chunk)
        return done[folder, num, chunk]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    wanted = os.environ.get("DSV4_EXACTNESS")
    if not wanted or not _ROWS:
        return
    for case, (worst, bar) in sorted(_ROWS.items()):
        terminalreporter.write_line(f"exactness | {case} | {worst:.2g} | {bar:.2g}")
    if wanted != "1":
        _rewrite(Path(wanted))


def _rewrite(path: Path) -> None:
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    lines = [
        f"| {case} | {worst:.2g} | {bar:.2g} |" for case, (worst, bar) in sorted(_ROWS.items())
    ]
    table = "\n".join(["| case | worst | bar |", "| --- | --- | --- |", *lines])
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")

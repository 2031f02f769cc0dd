"""The training loop: batches in, checkpoints and metrics out; resumes bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv4_jax.training.batch import Batch
from dsv4_jax.training.checkpoint import Checkpoints
from dsv4_jax.training.data.source import Prefetch, Rows
from dsv4_jax.training.grpo import Grpo
from dsv4_jax.training.guard import Guard
from dsv4_jax.training.halo import check_length
from dsv4_jax.training.init import init_params
from dsv4_jax.training.metrics import Reporter, Silence
from dsv4_jax.training.placing import (
    make_shards,
    place_rows,
    placed_routes,
    placed_shapes,
    rows_here,
)
from dsv4_jax.training.restore import MODEL_FILE, Load, first_params
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Moment
from dsv4_jax.training.step import Knobs, TrainState, init_state, make_step, routing_pass

OF_GRPO = ("kl", "clipped", "masked")  # metrics that other objectives do not have


class Trainer:
    """One run in one directory.

    load: reads converted checkpoints, which a run may start from (`load_checkpoint`).

    Raises:
        ValueError: the directory belongs to a run with another model or seed, or data or devices
            do not fit the configuration.
    """

    def __init__(
        self,
        run: RunConfig,
        run_dir: str | Path,
        out: TextIO | None = None,
        load: Load | None = None,
    ) -> None:
        self._load = load
        self.run, self.dir, self.plan = run, Path(run_dir), run.plan()
        self.shards = make_shards(run.mesh)
        self._check_batches()
        self.rows = self._open_data()
        self.dir.mkdir(parents=True, exist_ok=True)
        permanent = frozenset([*self.plan.borders(), self.plan.steps])
        self.checkpoints = Checkpoints(self.dir, run.keep, permanent)
        self.guard = Guard(run.guard)
        self.pending: dict[int, Any] = {}  # step: experts chosen for it by earlier parameters
        self.state, self.step = self._begin()
        self.others = [self._read(source) for source in run.others()]
        self.reporter: Reporter | Silence = Silence()
        if jax.process_index() == 0:
            self.reporter = Reporter(self.dir, self.step, run.log_every, out)
        self._prefetch, self._stopping = Prefetch(), False
        self._steps = lru_cache(maxsize=None)(self._make_step)
        self._routers = lru_cache(maxsize=None)(self._make_router)

    def train(self, until: int | None = None) -> bool:
        """Runs to step `until`, or the end; returns whether the run is complete.

        SIGTERM (and the first Ctrl-C) saves after the current step and returns early; of several
        processes, it is enough that one is told.
        """
        last = self.plan.steps if until is None else min(until, self.plan.steps)
        borders = set(self.plan.borders())
        with self._signals():
            while self.step < last and not self._stopping:
                self._advance()
                self._stopping = _any_process(self._stopping)
                due = self.step % self.run.checkpoint_every == 0 or self.step in borders
                if due or self.step == last or self._stopping:
                    self._save()
        self.checkpoints.wait()
        if self._stopping:
            self.reporter.say(f"stopped at step {self.step}; run the same command to go on")
        return self.step == self.plan.steps

    def close(self) -> None:
        self.checkpoints.close()
        self.reporter.close()
        self._prefetch.close()

    def _advance(self) -> None:
        """One step, from reading its batch to reporting it."""
        started = time.perf_counter()
        moment = self.plan.at(self.step)
        self._route_ahead(moment)
        batch = self._batch(moment, prefetch=True)
        loss_limit, norm_limit = self.guard.limits()
        rates = (moment.lr, moment.mtp, moment.balance, moment.indexer, moment.bias_speed)
        numbers: list[Any] = [np.float32(x) for x in (*rates, loss_limit, norm_limit)]
        step, routes = self._steps(moment.stage.phase), self.pending.pop(self.step, None)
        self.state, found = step(self.state, batch, Knobs(*numbers), routes, self.others)
        values = {k: float(v) for k, v in zip(found._fields, jax.device_get(found), strict=True)}
        if math.isnan(values["recall"]):  # nothing to tell, and no JSON
            del values["recall"]
        if not isinstance(self.run.objective, Grpo):
            values = {k: v for k, v in values.items() if k not in OF_GRPO}
        tokens = moment.stage.rows * moment.stage.phase.seq_len
        line = {"step": self.step, "phase": moment.stage.phase.name, "tokens": moment.tokens}
        line |= {"lr": moment.lr} | values
        line["tokens_s"] = tokens / (time.perf_counter() - started)
        self.reporter.step(line)
        self.step += 1
        if values["applied"]:
            self.guard.record(values["loss"], _norm(values))
        else:
            self._spike(line)

    def _spike(self, line: dict[str, Any]) -> None:
        """Says that an update was left out and, if so configured, goes back."""
        at, config = line["step"], self.run.guard
        self.reporter.say(f"step {at} left out: loss {line['loss']:.4g}, norm {_norm(line):.4g}")
        if config.policy != "rollback" or at < self.guard.ahead_until:
            return
        self.checkpoints.wait()
        old = [step for step in self.checkpoints.steps() if step <= at - config.back]
        if not old:
            return
        self._restore(old[-1])
        self.guard.ahead_until = at + config.duration
        self.reporter.rewind(self.step)
        self.reporter.say(f"back to step {self.step}, choosing experts {config.ahead} steps early")

    def _route_ahead(self, moment: Moment) -> None:
        """Chooses experts for a coming batch with today's parameters, while that is wanted."""
        ahead = moment.stage.phase.route_ahead
        if self.step < self.guard.ahead_until:
            ahead = self.run.guard.ahead
        target = self.step + ahead
        if not ahead or target >= moment.stage.first_step + moment.stage.steps:
            return
        batch = self._batch(self.plan.at(target))
        self.pending[target] = self._routers(moment.stage.phase)(self.state.params, batch)

    def _make_step(self, phase: Any) -> Any:
        program = self.run.program(phase, self.shards)
        return make_step(program, self.run.optimizer, phase.learn)

    def _make_router(self, phase: Any) -> Any:
        program = self.run.program(phase, self.shards)
        return jax.jit(lambda params, batch: routing_pass(program, params, batch))

    def _batch(self, moment: Moment, prefetch: bool = False) -> Batch:
        """The batch of a moment on its devices: `[microbatches, B, T]`."""
        stage, first = moment.stage, moment.first_row
        rows = self.rows[stage.phase.data, stage.phase.seq_len]
        micro = self.run.microbatches(stage.rows, self.shards.count("batch"))
        which = rows_here(self.shards, micro, stage.rows)
        if prefetch:
            found = self._prefetch.get(rows, first, stage.rows, which.tolist())
        else:
            found = rows.batch(first, which)
        return place_rows(self.shards, micro, stage.rows, found)

    def _begin(self) -> tuple[TrainState, int]:
        """The newest checkpoint's state, or a new one."""
        step = self.checkpoints.latest()
        if step is not None:
            self.state = self._like()
            self._restore(step)
            return self.state, self.step
        if jax.process_index() == 0:
            (self.dir / MODEL_FILE).write_text(json.dumps(self.run.model.to_hf(), indent=2))
            (self.dir / "run.txt").write_text(f"{self.run!r}\n")
        return self._new_state(), 0

    def _new_state(self) -> TrainState:
        """First parameters and empty slots, made where they will lie."""
        run, args = self.run, ()
        make: Callable[..., TrainState] = self._random_state
        if run.start_from:
            make = self._with_slots
            args = (self._read(run.start_from),)
        if self.shards.mesh is None:
            return make(*args)
        where = jax.tree.map(lambda shape: shape.sharding, self._like())
        donated = tuple(range(len(args)))  # parameters never lie there twice
        return jax.jit(make, out_shardings=where, donate_argnums=donated)(*args)

    def _read(self, source: str) -> Any:
        """Parameters of a run or converted checkpoint, where this run's lie."""
        return first_params(source, self.run.model, self.run.scan, self.shards, self._load)

    def _random_state(self) -> TrainState:
        key = jax.random.key(self.run.seed)
        return self._with_slots(init_params(self.run.model, self.run.init, key, self.run.scan))

    def _with_slots(self, params: Any) -> TrainState:
        return init_state(self.run.program(self.run.phases[0]), self.run.optimizer, params)

    def _like(self) -> TrainState:
        """Shapes of the state where it lies."""
        shapes = jax.eval_shape(self._random_state)
        return placed_shapes(self.run.model, shapes, self.shards, self.run.scan)

    def _save(self) -> None:
        meta = {
            "step": self.step,
            "guard": self.guard.state(),
            "pending": sorted(self.pending),
            "identity": identity(self.run),
            "scan": self.run.scan,
            "versions": {"jax": jax.__version__},
        }
        routes = {str(step): found for step, found in self.pending.items()}
        self.checkpoints.save(self.step, self.state, meta, routes)

    def _restore(self, step: int) -> None:
        state, meta = self.checkpoints.restore(step, self.state)
        if meta["identity"] != identity(self.run):
            raise ValueError(
                f"{self.dir} belongs to a run with another model, seed or optimizer: choose "
                "another --run-dir"
            )
        self.state, self.step, self.pending = state, meta["step"], {}
        self.guard.restore(meta["guard"])
        if meta["pending"]:
            self.pending = self._restore_routes(step, meta["pending"])

    def _restore_routes(self, step: int, wanted: list[int]) -> dict[int, Any]:
        moment = self.plan.at(step)
        program = self.run.program(moment.stage.phase)
        batch = self._batch(moment)
        like = jax.eval_shape(lambda p, b: routing_pass(program, p, b), self.state.params, batch)
        like = placed_routes(self.shards, like)
        found = self.checkpoints.restore_routes(step, {str(s): like for s in wanted})
        return {s: found[str(s)] for s in wanted}

    def _open_data(self) -> dict[tuple[str, int], Rows]:
        wanted = {(p.data, p.seq_len) for p in self.run.phases}
        vocab = self.run.model.vocab_size
        found = {
            (name, length): Rows(self.run.data[name], length, self.run.seed, vocab)
            for name, length in sorted(wanted)
        }
        for (name, _), rows in found.items():
            self._check_kind(name, rows.kind)
        return found

    def _check_kind(self, name: str, kind: str) -> None:
        objective = self.run.objective
        if objective is None and kind == "rollouts":
            raise ValueError(
                f"data {name!r} holds rollouts: they are for objective=Grpo(…) or Distill(…)"
            )
        if isinstance(objective, Grpo) and kind != "rollouts":
            raise ValueError(
                f"data {name!r} holds {kind}: objective=Grpo(…) learns from rollouts, which "
                "prepare_data.py --rollouts packs"
            )

    def _check_batches(self) -> None:
        for stage in self.plan.stages:
            self.run.microbatches(stage.rows, self.shards.count("batch"))
            check_length(self.run.model, self.shards, stage.phase.seq_len)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, _frame: Any) -> None:
            if number == signal.SIGINT and self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        try:
            old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever runs us handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process: all must stop after the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def identity(run: RunConfig) -> str:
    """What must not change between a checkpoint and its continuation, as a checksum."""
    parts = (run.model, run.optimizer, run.seed, run.scan)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _norm(values: dict[str, Any]) -> float:
    return float(np.hypot(values["grad_norm"], values["index_norm"]))

"""What each part of the recipe does: the same run with one thing changed at a time.

Variants are changes of a configuration, as on the command line of `train.py`; each is a run of its
own that goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.training.batch import Batch
from dsv4_jax.training.data.prepare import MANIFEST, folder_of, prepare
from dsv4_jax.training.data.source import Rows, Source
from dsv4_jax.training.evaluate import batches, evaluate, scorer
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.losses import Metrics, Weights, count, objective
from dsv4_jax.training.metrics import read
from dsv4_jax.training.precision import Precision, round_weights
from dsv4_jax.training.program import Program
from dsv4_jax.training.run import RunConfig

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "muon": (),
    "adamw": ("optimizer.matrices=adamw",),
    "adamw ÷ 3": ("optimizer.matrices=adamw", "schedule.lr=3e-3", "schedule.end_lr=3e-4"),
    "optax.contrib.muon": ("optimizer.matrices=optax_muon",),
}
PARTS: dict[str, tuple[str, ...]] = {
    "everything": (),
    "one stream": ("model.hc_mult=1",),
    "no MTP": ("schedule.mtp=0.0", "schedule.mtp_decayed=0.0"),
    "no balancing": ("schedule.bias_speed=0.0", "schedule.balance=0.0"),
    "no indexer loss": ("schedule.indexer=0.0",),
    "no QAT": ("phases.decay.quantise=False",),
}
STUDIES = {"optimizers": OPTIMIZERS, "parts": PARTS}
HELD_OUT = 8  # one file of this many is never learnt
LAST = 20  # steps that figures of training are averaged over


class Result(NamedTuple):
    """What became of a variant.

    loss: of held-out text in nats, with the trained weights as they are. exported: the same as the
    FP4 export serves it. drafts: share of MTP guesses that the main model makes as well.
    load: tokens of the busiest expert over the mean, worst layer; mean of the last `LAST` steps.
    recall, captured: of indexers, see `StepMetrics`, where held-out text attends to every row.
    """

    name: str
    loss: float
    exported: float
    drafts: float
    load: float
    recall: float
    captured: float

    @property
    def gap(self) -> float:
        """Nats that are lost by exporting."""
        return self.exported - self.loss


def prepare_texts(sources: Sequence[Path], target: Path, tokenizer: Any, length: int) -> None:
    """Packs files of text, one document each, into `target`/train and /held-out; once.

    A hash of the name decides where a file goes.

    Raises:
        ValueError: there are too few files.
    """
    parts: dict[str, list[str]] = {"train": [], "held-out": []}
    for path in sources:
        part = "train" if crc32(path.name.encode()) % HELD_OUT else "held-out"
        parts[part].append(json.dumps({"text": path.read_text(encoding="utf-8")}))
    for name, lines in parts.items():
        if (folder_of(target / name, length) / MANIFEST).exists():
            continue
        if not lines:
            raise ValueError(f"{len(sources)} files are too few to hold some out")
        target.mkdir(parents=True, exist_ok=True)
        file = target / f"{name}.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        prepare([file], target / name, tokenizer, [length], lambda _: None)


def run_variant(run: RunConfig, name: str, folder: Path, rows: int, out: TextIO) -> Result:
    """Trains a variant to its end, in `folder`, and evaluates it.

    run: with its changes made; held-out/ lies beside its data. rows: of held-out text.

    Raises:
        ValueError: the folder belongs to another run, or training was interrupted.
    """
    trainer = Trainer(run, folder, out)
    try:
        if not trainer.train():
            raise ValueError(f"variant {name!r} was stopped at step {trainer.step}")
        params = trainer.state.params
    finally:
        trainer.close()
    held = Path(run.data["train"][0].path).parent / "held-out"
    lines = read(folder)[-LAST:]
    plain = held_out(run, run.precision, params, held, rows)
    rounded = held_out(run, run.qat, params, held, rows)
    load = float(np.mean([line["load"] for line in lines]))
    found = plain["loss"], rounded["loss"], plain.get("agrees", 0.0), load
    return Result(name, *found, *indexers(run, params, held, rows))


def held_out(
    run: RunConfig, precision: Precision, params: Any, data: Path, rows: int
) -> dict[str, Any]:
    """Losses of held-out rows, with everything rounded as `precision` says."""
    program = Program(run.model, precision, index_loss=False, mtp=run.model.num_mtp_layers > 0)
    weights = round_weights(params, run.model, precision)
    return evaluate(scorer(program), weights, _batches(run, data, rows))


def indexers(run: RunConfig, params: Any, data: Path, rows: int) -> tuple[float, float]:
    """Recall and captured share of held-out rows under dense attention, which is what to find."""
    program = Program(run.model, run.precision, sparse=False, index_only=True, mtp=False)
    nothing = Weights(*(jnp.zeros(()) for _ in Weights._fields))

    @jax.jit
    def measure(params: Any, batch: Batch) -> tuple[Metrics, jax.Array]:
        counts = count(batch)
        return objective(program, nothing, counts, params, batch)[1].metrics, counts.queries

    hits = wanted = kl = uniform = 0.0
    for batch in _batches(run, data, rows):
        m, queries = measure(params, batch)
        hits, wanted = hits + float(m.hits), wanted + float(m.wanted)
        kl, uniform = kl + float(m.indexer * queries), uniform + float(m.index_uniform * queries)
    return hits / max(wanted, 1.0), 1 - kl / max(uniform, 1e-9)


def _batches(run: RunConfig, data: Path, rows: int) -> Any:
    found = Rows((Source(str(data)),), run.phases[-1].seq_len, 0, run.model.vocab_size)
    return batches(found, rows, min(rows, 8))


def table(results: Sequence[Result]) -> str:
    """A Markdown table, one line per variant."""
    heads = "variant|held-out loss|FP4 export|export gap|drafts|load|recall|captured".split("|")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for r in results:
        cells = [r.name, f"{r.loss:.3f}", f"{r.exported:.3f}", f"{r.gap:+.4f}"]
        cells += [f"{r.drafts:.1%}", f"{r.load:.2f}", f"{r.recall:.3f}", f"{r.captured:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

"""A small V4 learns bytes of text: the loss falls in every phase of the recipe."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.prepare import prepare
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.run import load_run
from tests.training.runs import lines_of

ROOT = Path(__file__).parents[2]
CONFIG_FILE = """
from dsv4_jax import presets
from dsv4_jax.config import CSA, SWA
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

STEP = 8 * 256

RUN = RunConfig(
    name="bytes",
    model=presets.tiny().replace(
        num_layers=3, compress_ratios=(SWA, CSA, 128, SWA), num_experts=48, expert_dim=128
    ),
    data={"train": (Source(DATA),)},
    phases=(
        Phase("dense", 50 * STEP, 256, 8, ((4, 10 * STEP),), attention="dense", learn="trunk"),
        Phase("warm-up", 12 * STEP, 256, 8, attention="dense", learn="indexer", lr=1e-2),
        Phase("sparse", 30 * STEP, 256, 8),
        Phase("long", 30 * STEP, 512, 4),
        Phase("decay", 30 * STEP, 512, 4, quantise=True),
    ),
    schedule=Schedule(lr=1e-2, end_lr=1e-3, warmup_steps=10, decay_from=0.8),
    scan=False,
    checkpoint_every=1000,
    log_every=1,
)
"""


@pytest.mark.slow
def test_loss_falls_in_every_phase(tmp_path):
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "dsv4_jax").rglob("*.py"))]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": page.read_text()}) for page in pages))
    tokenizer = Tokenizer(build_byte_tokenizer().to_str())
    prepare([corpus], tmp_path / "data", tokenizer, [256, 512], lambda _: None)
    path = tmp_path / "bytes.py"
    path.write_text(CONFIG_FILE.replace("DATA", repr(str(tmp_path / "data"))))
    trainer = Trainer(load_run(str(path), []), tmp_path / "run", out=io.StringIO())
    assert 9e6 < sum(x.size for x in jax.tree.leaves(trainer.state.params)) < 12e6
    assert trainer.train()
    trainer.close()
    lines = lines_of(tmp_path / "run")
    assert len(lines) == trainer.plan.steps and all(line["applied"] == 1 for line in lines)
    for phase in trainer.run.phases:
        # the trunk is frozen while indexers warm up
        what = "indexer" if phase.learn == "indexer" else "loss"
        found = np.array([line[what] for line in lines if line["phase"] == phase.name])
        assert np.isfinite(found).all(), phase.name
        third = len(found) // 3
        assert found[-third:].mean() < found[:third].mean(), (phase.name, found)
    captured = [line["captured"] for line in lines if line["phase"] == "warm-up"]
    assert captured[-1] > captured[0] + 0.1

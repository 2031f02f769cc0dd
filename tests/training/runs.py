"""A run small enough for tests: every kind of phase border within two dozen steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.prepare import prepare
from dsv4_jax.training.metrics import read

CONFIG_FILE = """
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.guard import GuardConfig
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule
from tests.training.support import CONFIG

RUN = RunConfig(
    name="small",
    model=CONFIG.replace(vocab_size=320, MODEL),
    data={"train": (Source(DATA),)},
    phases=PHASES,
    schedule=Schedule(lr=5e-3, end_lr=5e-4, warmup_steps=3, decay_from=0.7),
    scan=False,
    checkpoint_every=3,
    log_every=1,
)
"""

EVERY_BORDER = """(
    Phase("dense", 9 * 8 * 32, 32, 8, ((4, 3 * 4 * 32),), attention="dense", learn="trunk"),
    Phase("warm-up", 3 * 8 * 32, 32, 8, attention="dense", learn="indexer", lr=1e-2),
    Phase("sparse", 4 * 8 * 32, 32, 8),
    Phase("long", 4 * 8 * 32, 64, 4),
    Phase("ahead", 6 * 8 * 32, 64, 4, route_ahead=2),
    Phase("decay", 5 * 8 * 32, 64, 4, quantise=True),
)"""
SPARSE_ONLY = """(Phase("sparse", 10 * 8 * 32, 32, 8),)"""


TWO_LAYERS = "num_layers=2, compress_ratios=(4, 8, 0)"
ONE_LAYER = "num_layers=1, compress_ratios=(4,), num_hash_layers=0, num_mtp_layers=0"


def write_config(folder: Path, phases: str, mesh: str = "", model: str = TWO_LAYERS) -> Path:
    """Prepared data and a configuration file in `folder`."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(20)]
    lines = [{"text": " ".join(rng.choice(words, rng.integers(1, 20)))} for _ in range(100)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = Tokenizer(build_byte_tokenizer().to_str())
    prepare([folder / "text.jsonl"], folder / "data", tokenizer, [32, 64], lambda _: None)
    text = (
        CONFIG_FILE.replace("DATA", repr(str(folder / "data")))
        .replace("PHASES", phases)
        .replace("MODEL", model)
    )
    path = folder / "small.py"
    path.write_text(text.replace("scan=False", f"scan=False, mesh={mesh!r}"))
    return path


def lines_of(run_dir: Path) -> list[dict]:
    """Reported metrics without timings."""
    return [{k: v for k, v in line.items() if k != "tokens_s"} for line in read(run_dir)]

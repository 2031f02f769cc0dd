"""Prompts of up to a million tokens against an oracle without chunks or caches."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.model import long_oracle
from tests.model.long_context import STEPS, ends, narrow_config, token_ids
from tests.model.long_oracle import LongOracle
from tests.model.oracle import Oracle
from tests.model.support import random_units, relative

ROOT = Path(__file__).parents[2]
PROBES = 24  # ends of chunks, beside all decoded tokens
MAX_RELATIVE = 1e-5
MAX_BYTES = 8e9
SEEN = 5e-3  # what forgetting rows changes at least, relative: far above any error


def test_the_oracle_of_long_prompts_is_the_other_one():
    """Rows in blocks that end inside windows; more of them than are kept."""
    tokens = 130
    cfg = narrow_config(tokens).replace(index_topk=9, compress_ratios=(0, 16, 4, 0))
    units, ids = random_units(cfg), token_ids(cfg)[: tokens + 1]
    slow = Oracle(cfg, units)
    with mock.patch.object(long_oracle, "BLOCK", 50):
        got = LongOracle(cfg, units, ids).answer(np.arange(tokens))
    assert relative(got.main, slow.logits(ids)[:-1]) < 1e-12
    assert relative(got.mtp, slow.mtp_logits(ids)) < 1e-12


def probes(tokens: int) -> np.ndarray:
    """Places among the ends of chunks (spread evenly, the last among them) and decoded tokens."""
    count = len(ends(tokens))
    some = np.linspace(0, count - 1, PROBES).round().astype(int)
    return np.unique(np.concatenate([some, np.arange(count, count + STEPS)]))


@pytest.mark.slow
@pytest.mark.parametrize("tokens, cache", [(65_536, "own"), (65_536, "pages"), (1_048_576, "own")])
def test_a_long_prompt(tokens, cache, within, tmp_path):
    """Prefill in chunks, 16 decoded tokens, bounded memory; logits as the oracle's.

    Thousands of rows compete for each choice; one that is kept in place of another would show.
    """
    target = tmp_path / "logits.npz"
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.long_context", str(tokens), str(target), cache],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"long context | {cache} | {result}")
    assert result["peak_bytes"] <= MAX_BYTES
    cfg, here = narrow_config(tokens), probes(tokens)
    with np.load(target) as file:
        at, main, mtp = (file[name][here] for name in ("positions", "main", "mtp"))
    oracle = LongOracle(cfg, random_units(cfg), token_ids(cfg))
    want = oracle.answer(at)
    case = f"state: {tokens:,} tokens in chunks vs plain memory"
    within(f"{case}, main logits, relative", relative(main, want.main), MAX_RELATIVE)
    within(f"{case}, MTP logits, relative", relative(mtp, want.mtp), MAX_RELATIVE)
    oracle.forget = tokens // 2
    for name, value in oracle.answer(at[-STEPS:])._asdict().items():
        changed = np.abs(value - getattr(want, name)[-STEPS:]).max(axis=1)
        print(f"long context | {name}, without the older half of rows | {changed.min():.2g}")
        assert (changed >= SEEN * np.abs(value).max()).all()

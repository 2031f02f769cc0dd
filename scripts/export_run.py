"""Writes a training run's newest parameters as an official-layout checkpoint.

    python scripts/export_run.py runs/tiny DST --tokenizer DIR [--format fp4|fp8|bf16]
    python scripts/export_run.py runs/tuned DST --average runs/before …

The result converts, serves, and loads in other programs like a published checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

FORMATS = {"fp4": ("fp8", "fp4"), "fp8": ("fp8", "fp8"), "bf16": (None, None)}


def export_run(
    run_dir: str, dst: str, tokenizer: str | None, fmt: str, average: str | None = None
) -> None:
    """Quantises, writes units, and exports them.

    average: a run or converted checkpoint; the mean of its parameters and the run's is exported.

    Raises:
        ValueError: the run has no checkpoint, the other has other weights, or DST is refused.
    """
    import shutil

    from checkpoints.export import export
    from checkpoints.load import load_checkpoint
    from checkpoints.store import save_checkpoint
    from dsv4_jax.model import is_scanned
    from dsv4_jax.training.restore import (
        export_units,
        first_params,
        mean_params,
        model_of,
        newest_params,
    )
    from sharding.shards import SINGLE

    cfg = model_of(run_dir)
    params = newest_params(run_dir, cfg)
    if average is not None:
        other = first_params(average, cfg, is_scanned(cfg, params), SINGLE, load_checkpoint)
        params = mean_params(params, other)
    dense, experts = FORMATS[fmt]
    stored = cfg.replace(dense_format=dense, expert_format=experts)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, stored, export_units(stored, params))
        if tokenizer:
            for path in Path(tokenizer).glob("tokenizer*.json"):
                shutil.copy(path, folder)
        export(folder, dst)


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(
        prog="export_run.py",
        description="Writes a training run's newest parameters as an official-layout checkpoint.",
    )
    ap.add_argument("run", metavar="RUN", help="a run's directory")
    ap.add_argument("dst", metavar="DST", help="directory to write")
    ap.add_argument("--tokenizer", metavar="DIR", help="whose tokenizer files are copied")
    ap.add_argument("--format", choices=FORMATS, default="fp4", help="default: fp4")
    ap.add_argument(
        "--average",
        metavar="DIR",
        help="export the mean of the run's parameters and those of this run or converted "
        "checkpoint, from which it was tuned: forgets less",
    )
    args = ap.parse_args(argv)
    try:
        export_run(args.run, args.dst, args.tokenizer, args.format, args.average)
    except (ValueError, OSError) as error:
        print(f"export_run.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.dst}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes a training run's newest parameters as an official-layout checkpoint.

    python scripts/export_run.py runs/tiny DST --tokenizer DIR [--format fp4|fp8|bf16]

The result converts, serves, and loads in other programs like a published checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

FORMATS = {"fp4": ("fp8", "fp4"), "fp8": ("fp8", "fp8"), "bf16": (None, None)}


def export_run(run_dir: str, dst: str, tokenizer: str | None, fmt: str) -> None:
    """Quantises, writes units, and exports them.

    Raises:
        ValueError: the run has no checkpoint, or DST is refused.
    """
    import shutil

    from checkpoints.export import export
    from checkpoints.store import save_checkpoint
    from dsv4_jax.training.restore import export_units, model_of, newest_params

    cfg = model_of(run_dir)
    params = newest_params(run_dir, cfg)
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
    args = ap.parse_args(argv)
    try:
        export_run(args.run, args.dst, args.tokenizer, args.format)
    except (ValueError, OSError) as error:
        print(f"export_run.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.dst}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

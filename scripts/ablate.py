"""Trains a small run with one part of the recipe changed at a time; a table and curves.

python scripts/ablate.py --out runs/ablation
python scripts/ablate.py --out runs/ablation --study optimizers schedule.lr=5e-3

What is learnt is the text of this repository, byte by byte, one file in eight held out. The same
command goes on after any kind of stop.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("checkpoints", "docs", "dsv4_jax", "pallas_kernels", "scripts", "sharding", "tests")
PANELS = {
    "optimizers": ("loss", "mtp", "update_rms"),
    "parts": ("loss", "mtp", "captured", "recall", "load", "bias"),
}


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="ablate.py",
        description="Trains a small run with one part of the recipe changed at a time.",
    )
    ap.add_argument("--config", default="ablation", metavar="NAME|FILE")
    ap.add_argument("--out", default="runs/ablation", metavar="DIR", help="runs, data and curves")
    ap.add_argument("--study", choices=["optimizers", "parts"], help="default: both")
    ap.add_argument("--rows", type=int, default=64, metavar="N", help="held-out rows; default: 64")
    ap.add_argument("changes", nargs="*", metavar="key=value", help="of every variant")
    return ap


def ablate(args: argparse.Namespace) -> str:
    """Prepares, trains, draws; returns the table.

    Raises:
        ValueError: there are no rows, or a change is refused.
    """
    import jax

    from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
    from dsv4_jax.tokenizer import Tokenizer
    from dsv4_jax.training.ablate import STUDIES, prepare_texts, run_variant, table
    from dsv4_jax.training.plot import draw
    from dsv4_jax.training.run import load_run

    if args.rows < 1:
        raise ValueError(f"--rows {args.rows} must be positive")
    out = Path(args.out)
    changes = [f"data.train={out / 'data' / 'train'}", *args.changes]
    run = load_run(args.config, changes)
    # most variants differ in numbers alone: their programs are compiled once
    jax.config.update("jax_compilation_cache_dir", str((out / "cache").resolve()))
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    texts = [path for path in files if path.suffix in (".py", ".md")]
    tokenizer = Tokenizer(build_byte_tokenizer().to_str())
    for length in sorted({phase.seq_len for phase in run.phases}):
        prepare_texts(texts, out / "data", tokenizer, length)
    tables = []
    for study in [args.study] if args.study else STUDIES:
        results, folders = [], {}
        for name, own in STUDIES[study].items():
            folders[name] = out / ("-".join(own) or "unchanged").replace("=", "_")
            print(f"{name}:", file=sys.stderr)
            variant = load_run(args.config, [*changes, *own])
            results.append(run_variant(variant, name, folders[name], args.rows, sys.stderr))
            print(table(results[-1:]), file=sys.stderr, flush=True)
        (out / f"{study}.svg").write_text(draw(folders, 20, PANELS[study]), encoding="utf-8")
        tables.append(table(results))
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> int:
    try:
        print(ablate(parser().parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draws the metrics of training runs into an SVG file.

python scripts/plot_runs.py muon=runs/a adamw=runs/b --out curves.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from dsv4_jax.training.plot import PANELS, draw

    ap = argparse.ArgumentParser(
        prog="plot_runs.py", description="Draws the metrics of training runs into an SVG file."
    )
    ap.add_argument("runs", nargs="+", metavar="[LABEL=]DIR", help="directories of runs")
    ap.add_argument("--out", required=True, metavar="FILE.svg")
    ap.add_argument("--smooth", type=int, default=10, metavar="STEPS", help="default: 10")
    ap.add_argument(
        "--metrics",
        metavar="NAME,…",
        help=f"panels; default: of {', '.join(PANELS)}, those that are reported",
    )
    args = ap.parse_args(argv)
    runs = {}
    for given in args.runs:
        label, equals, folder = given.partition("=")
        runs[label if equals else Path(given).name] = folder if equals else given
    try:
        if args.smooth < 1:
            raise ValueError(f"--smooth {args.smooth} must be at least 1")
        panels = args.metrics.split(",") if args.metrics else None
        Path(args.out).write_text(draw(runs, args.smooth, panels), "utf-8")
    except (ValueError, OSError) as error:
        print(f"plot_runs.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

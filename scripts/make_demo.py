"""Writes the demo checkpoint that `serve.py` runs without arguments: random weights, real formats.

    python scripts/make_demo.py dsv4_jax/data/demo

Every layer kind of V4 at tiny sizes, FP8 matrices and FP4 experts in the official layout, and a
byte-level tokenizer with the official control tokens. The text it writes is noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

SEED = 20260424


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(prog="make_demo.py", description="Writes the demo checkpoint.")
    ap.add_argument("dst", metavar="DST", help="directory to write; must not exist")
    ap.add_argument("--seed", type=int, default=SEED, help=f"of the weights (default {SEED})")
    args = ap.parse_args(argv)
    if Path(args.dst).exists():
        print(f"make_demo.py: {args.dst} exists already; remove it first", file=sys.stderr)
        return 1
    import jax

    from checkpoints.export import export
    from checkpoints.store import save_checkpoint
    from dsv4_jax import presets
    from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
    from dsv4_jax.params import init_tree, unit_specs

    cfg = presets.tiny()
    units = unit_specs(cfg)
    keys = jax.random.split(jax.random.key(args.seed), len(units))
    trees = ((u, init_tree(k, cfg, units[u])) for u, k in zip(units, keys, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, cfg, trees)
        build_byte_tokenizer().save(str(Path(folder) / "tokenizer.json"))
        export(folder, args.dst)
    print(f"{args.dst}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Held-out loss of a run or of a converted checkpoint on packed rows.

python scripts/evaluate.py runs/tiny --data runs/held-out --length 512 --tokenizer DIR
python scripts/evaluate.py CHECKPOINT --data runs/held-out --length 512 --numerics reference
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Held-out loss of a run or of a converted checkpoint on packed rows.",
    )
    ap.add_argument("model", metavar="DIR", help="a run's directory, or a converted checkpoint")
    ap.add_argument("--data", required=True, metavar="DIR", help="made by prepare_data.py")
    ap.add_argument("--length", type=int, required=True, metavar="N", help="tokens per row")
    ap.add_argument("--rows", type=int, default=64, metavar="N", help="default: 64")
    ap.add_argument("--batch", type=int, default=8, metavar="N", help="rows at a time; default: 8")
    ap.add_argument("--tokenizer", metavar="DIR", help="for bits per byte; default: beside DIR")
    ap.add_argument(
        "--numerics",
        choices=["plain", "reference"],
        default="plain",
        help="reference: as served, with its rounding, document by document (checkpoints only)",
    )
    ap.add_argument("--dense", action="store_true", help="attend to all compressed rows")
    ap.add_argument("--json", action="store_true")
    return ap


def load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Configuration, parameters, and how to score a batch."""
    import jax
    import jax.numpy as jnp

    from checkpoints.load import load_checkpoint
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.training.evaluate import scorer, served_scorer
    from dsv4_jax.training.program import Program
    from dsv4_jax.training.restore import MODEL_FILE, model_of, newest_params

    is_run = (Path(args.model) / MODEL_FILE).is_file()
    if args.numerics == "reference":
        if is_run:
            raise ValueError("--numerics reference is for checkpoints: export and convert the run")
        cfg, params = load_checkpoint(args.model, scan=False)
        return cfg, params, served_scorer(cfg, Numerics("reference", "bfloat16"), args.length)
    if is_run:
        cfg = model_of(args.model)
        params = newest_params(args.model, cfg)
    else:
        cfg, params = load_checkpoint(args.model, dense_dtype=jnp.float32)
        params = jax.tree.map(
            lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, params
        )
    program = Program(cfg, sparse=not args.dense, index_loss=False, mtp=cfg.num_mtp_layers > 0)
    return cfg, params, scorer(program)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from dsv4_jax.tokenizer import Tokenizer
    from dsv4_jax.training.data.source import Rows, Source
    from dsv4_jax.training.evaluate import batches, evaluate

    cfg, params, score = load(args)
    rows = Rows((Source(args.data),), args.length, 0, cfg.vocab_size)
    folder = Path(args.tokenizer or args.model)
    bytes_of = None
    if args.tokenizer or (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_dir(folder)
        sizes = [len(tokenizer.token_bytes(i)) for i in range(cfg.vocab_size)]
        bytes_of = np.array([0 if i in tokenizer.control_ids else n for i, n in enumerate(sizes)])
    return evaluate(score, params, batches(rows, args.rows, args.batch), bytes_of)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        found = run(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:>24}  {value:.4f}" if isinstance(value, float) else f"{name:>24}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Loss and gradients per CPU-second on one core, beside transformers in the same run.

python scripts/bench_train.py --peer PYTHON [--batch 2] [--length 512] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "data" / "bench_config.json"


def measure(command: list[str]) -> dict[str, float]:
    """What a child process prints last.

    Raises:
        ValueError: it failed; what it said is on standard error.
    """
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(
        prog="bench_train.py",
        description="Loss and gradients beside transformers.",
    )
    ap.add_argument("--config", default=str(CONFIG), metavar="FILE", help="config.json to measure")
    ap.add_argument("--batch", type=int, default=2, metavar="B")
    ap.add_argument("--length", type=int, default=512, metavar="N")
    ap.add_argument("--peer", metavar="PYTHON", help="has torch and transformers")
    turns = "of each, one after the other; the ratio is the median of theirs; default: 3"
    ap.add_argument("--turns", type=int, default=3, metavar="N", help=turns)
    args = ap.parse_args(argv)
    for name in ("batch", "length", "turns"):
        if getattr(args, name) < 1:
            ap.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if not Path(args.config).is_file():
        ap.error(f"--config {args.config}: no such file")
    program = shutil.which(args.peer or "")
    if args.peer and not program:
        ap.error(f"--peer {args.peer}: no such program")
    case = [str(Path(args.config).resolve()), str(args.batch), str(args.length)]
    commands = {"ours": [sys.executable, "-m", "dsv4_jax.training.bench", *case]}
    if program:
        peer = str(ROOT / "dsv4_jax" / "training" / "bench_peer.py")
        commands["transformers"] = [str(Path(program).absolute()), peer, *case]
    found: dict[str, Any] = {name: [] for name in commands}
    try:
        for _ in range(args.turns):
            for name, command in commands.items():
                found[name].append(measure(command))
    except ValueError as error:
        print(f"bench_train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if program:
        pairs = zip(found["ours"], found["transformers"], strict=True)
        ratios = [ours["tokens_per_cpu_s"] / theirs["tokens_per_cpu_s"] for ours, theirs in pairs]
        found["ratio"] = {"median": statistics.median(ratios), "turns": ratios}
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

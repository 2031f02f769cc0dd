"""Prints what V4 costs per token beside V3.2: parameters, cache bytes, FLOPs at several contexts.

python scripts/account.py
python scripts/account.py --contexts 8192,131072,1048576 --json
python scripts/account.py --plot docs/accounting.png    needs matplotlib
python scripts/account.py --compiled v4-flash           needs the TPU compiler, and minutes
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dsv4_jax.accounting import MILLION, MODELS

CONTEXTS = (8192, 65536, 262144, MILLION)
SUFFIXES = (".png", ".svg", ".pdf")


def contexts(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be positive whole numbers: 8192,1048576")
    return found


def picture(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(SUFFIXES)}")
    return Path(text)


def compiled(name: str, as_json: bool) -> str:
    from pallas_kernels import aot

    aot.prepare_environment()
    if reason := aot.skip_reason():
        raise ValueError(reason)
    from dsv4_jax.preflight import decode_cost

    cost = decode_cost.compiled_step(name, lambda text: print(text, file=sys.stderr, flush=True))
    return json.dumps(cost.to_json(), indent=1) if as_json else decode_cost.table(cost)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="account.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--contexts", type=contexts, default=CONTEXTS, metavar="N,…", help="tokens in front"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw both curves")
    parser.add_argument(
        "--compiled", choices=MODELS, metavar="MODEL", help="beside FLOPs of a compiled step"
    )
    args = parser.parse_args(argv)
    from dsv4_jax import accounting

    try:
        if args.compiled:
            print(compiled(args.compiled, args.json))
            return 0
        found = accounting.report(args.contexts)
        if args.plot:
            accounting.draw(args.plot)
    except (ImportError, OSError, ValueError) as error:
        print(f"account.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1) if args.json else accounting.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

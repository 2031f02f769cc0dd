"""Converts an official DeepSeek-V4 checkpoint directory into this project's Orbax checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoints.progress import Progress


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_hf.py",
        description=__doc__,
        epilog="Weights are streamed layer by layer and stored bit for bit. Run the same command "
        "again after an interruption and it continues. Exit status: 0 done, 1 failed, 2 usage.",
    )
    parser.add_argument("src", metavar="SRC", help="official directory: config.json, shards, index")
    parser.add_argument("dst", metavar="DST", help="directory to write; new, or to be continued")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--experts",
        choices=("keep", "fp8", "bf16"),
        default="keep",
        help="storage of routed experts: as they are (default), FP4 turned into FP8 without loss, "
        "or dequantised to bfloat16",
    )
    result.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a complete checkpoint at DST, or an unfinished one of another source",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="layers in flight at a time; each takes up to twice its size in memory (default 1)",
    )
    work.add_argument(
        "--verify", action="store_true", help="read everything back and compare checksums"
    )
    work.add_argument(
        "--hosts",
        type=positive,
        default=1,
        metavar="N",
        help="that convert together, each some layers: start the same command on every one, with "
        "a SRC and a DST that all of them share (default 1)",
    )
    work.add_argument(
        "--host-index", type=int, default=0, metavar="I", help="which one this is; host 0 ends it"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # conversion needs no accelerator
    from checkpoints.command import run  # late: --help and usage errors answer at once
    from checkpoints.convert import Host, convert_share

    def work(progress: Progress) -> str:
        manifest = convert_share(
            args.src,
            args.dst,
            Host(args.host_index, args.hosts),
            experts=args.experts,
            workers=args.workers,
            verify=args.verify,
            overwrite=args.overwrite,
            progress=progress,
        )
        if manifest is None:
            return f"{args.dst}: host {args.host_index} has done its share, host 0 ends it"
        size = sum(leaf.nbytes for unit in manifest.units.values() for leaf in unit.values())
        return f"{args.dst}: {len(manifest.units)} units, {size / 1e9:.3f} GB"

    return run("convert_hf.py", "convert", work)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())

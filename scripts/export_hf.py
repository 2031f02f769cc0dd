"""Writes a checkpoint of this project as an official DeepSeek-V4 directory."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoints.progress import Progress


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export_hf.py",
        description=__doc__,
        epilog="The inverse of convert_hf.py: an unmodified conversion gives back every tensor, "
        "the shards and config.json bit for bit. Exit status: 0 done, 1 failed, 2 usage.",
    )
    parser.add_argument(
        "src", metavar="SRC", help="checkpoint written by convert_hf.py or training"
    )
    parser.add_argument("dst", metavar="DST", help="official directory to write")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--format",
        choices=("fp4", "fp8", "bf16"),
        help="fp4: FP8 with FP4 experts; fp8: FP8 throughout; bf16: not quantised. Default: as "
        "stored. FP4 to FP8 is lossless or refused; towards fewer bits values are rounded",
    )
    result.add_argument(
        "--overwrite", action="store_true", help="replace an official checkpoint at DST"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # exporting needs no accelerator
    from checkpoints.command import run  # late: --help and usage errors answer at once
    from checkpoints.export import export

    def work(progress: Progress) -> str:
        shards = export(args.src, args.dst, args.format, args.overwrite, progress)
        return f"{args.dst}: {len(shards)} shards"

    return run("export_hf.py", "export", work)


if __name__ == "__main__":
    sys.exit(main())

"""One ordinary checkpoint of a folder that a run with --fsdp wrote, for every program that reads checkpoints.

    python -m common.run.one_file output/run/checkpoint.dcp checkpoint.pth

The numbers are the same bits. One process does it, in as much memory as the whole checkpoint takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.run.files import check_output, existing_folder
from common.run.flags import make_parser
from common.run.program import get_logger, run

logger = get_logger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="the checkpoint in shards, such as checkpoint.dcp")
    parser.add_argument("file", metavar="FILE", help="the file to write; one that is there is replaced")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Read the folder and write the file; returns its path."""
    args = parse_args(argv)
    folder = existing_folder(args.folder)
    check_output(args.file, inputs=folder.iterdir())
    from common.run.checkpoint.sharded import load_sharded
    from common.run.checkpoint.writing import save_atomic

    path = save_atomic(load_sharded(folder, None), args.file)
    logger.info("%s: %.1f MB, of %s", path, path.stat().st_size / 1e6, folder)
    return path


if __name__ == "__main__":
    run(main)

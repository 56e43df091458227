"""Strip a training file for deployment: the weights alone, without the reverse modules and ``aux_head``.

    python sit/strip.py checkpoint.pth sit_t.pth

What is left is what evaluation uses. The file says that it was stripped, so main.py --eval, export.py and torch.hub
take it; training does not resume from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.run.cli import make_parser
from common.run.files import check_files, check_output
from common.run.program import run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Input and output."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help="what training wrote: a file or URL")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--key", default="model", choices=("model", "model_ema"),
                        help="which weights to take: those trained, or their average (default: model)")  # fmt: skip
    parser.add_argument("--half", action="store_true", help="store the weights in float16, half the size")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Write the file and say what is gone."""
    args = parse_args(argv)
    check_files(args.checkpoint)
    check_output(args.output, inputs=[args.checkpoint])
    from common.run.checkpoint.loading import summarise
    from sit.loading import read_weights, strip

    report = strip(read_weights(args.checkpoint, key=args.key), args.output, half=args.half)
    print(f"removed {summarise(report['removed'])}")
    print(f"written to {args.output}: {report['parameters']:,} numbers, {report['bytes'] / 1e6:.1f} MB")
    return report


if __name__ == "__main__":
    run(main)

"""Linear probing of a frozen network at every width: UCF101 clips, or any data set of images (design; see README).

    python scala/linear_probe.py --data-set ucf101 --data-path DIR --checkpoint CHECKPOINT --output-dir output/ucf101
    python scala/linear_probe.py --data-set CIFAR10 --data-path DIR --checkpoint output/dinov2_b/weights.pth

Clips get one head that is sliced like the backbone, images one per width; --head chooses. Writes last.pth and
best.pth (resumable with --resume auto; --eval --resume FILE only evaluates), log.jsonl, and widths.json with the
accuracy and cost of every width. The last line printed is the accuracy in percent at the largest width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common.data.paths import check_data_path
from common.run import cli
from common.run.files import check_files, check_output
from common.run.flags import add_flags
from common.run.program import run
from common.run.settings import DataSettings, OptimizerSettings, RunSettings, ScheduleSettings
from scala import arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    arguments.add_width_args(add_flags(parser, "frozen network", arguments.CheckpointSettings))
    add_flags(parser, "probe", arguments.ProbeSettings)
    cli.add_data_args(parser, data_set="ucf101", batch_size=32, input_size=None)
    cli.add_optimizer_args(parser, lr=1e-3, weight_decay=0.0, model_ema=False)
    cli.add_schedule_args(parser, epochs=50, warmup_epochs=0, cooldown_epochs=0, min_lr=0.0)
    cli.add_runtime_args(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the probe, or only evaluate it; returns the row of the largest width, all of them under ``widths``."""
    args = parse_args(argv)
    check_data_path(args.data_set, args.data_path)
    check_output(args.output_dir, folder=True)
    check_files(args.checkpoint, args.resume)
    from common.run.build import scaled_lr
    from common.run.checkpoint import read_checkpoint
    from common.run.launch import launch, seed_everything
    from scala.loading import load_trained
    from scala.probing import probe_widths

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    trained = load_trained(
        read_checkpoint(args.checkpoint), args.checkpoint, weights=args.weights, flags=arguments.given(args)
    )
    peak = scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size, reference=256)
    rows = probe_widths(
        world, RunSettings.of(args), DataSettings.of(args, input_size=trained.input_size), trained,
        arguments.ProbeSettings.of(args), OptimizerSettings.of(args, lr=peak), ScheduleSettings.of(args),
        arguments=vars(args),
    )  # fmt: skip
    if world.is_main:
        for row in rows:
            print(f"width {row['ratio']:<8g} {row['gmacs']:10.3f} GMACs  top-1 {row['top1_percent']:.3f} %")
        print(f"{rows[-1]['top1_percent']:.3f}")
    return {**rows[-1], "widths": rows}


if __name__ == "__main__":
    run(main)

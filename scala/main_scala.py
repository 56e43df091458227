"""Train one Vision Transformer that runs at many widths, or evaluate it at any of them.

    torchrun --nproc_per_node=4 scala/main_scala.py --data-path DIR --batch-size 256 --epochs 100 --lr 2e-3 \\
        --model deit_small_distilled_patch16_224_scala --granularity 0.25 --output_dir log/scala_s_x4
    python scala/main_scala.py --eval --data-path DIR --model deit_small_distilled_patch16_224_scala \\
        --resume FILE --eval_ratio all

The commands of record are run.sh and eval.sh. Training writes checkpoint.pth and best_checkpoint.pth (resumable with
--resume auto), log.txt, log.jsonl and, at the end, the accuracy of every width: widths.json, widths.md, widths.png. The
last line printed is the accuracy in percent at the last width named, the largest one with --eval_ratio all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from common.data.paths import check_data_path
from common.run.files import check_files, check_output
from common.run.program import is_main, run
from common.run.settings import DataSettings, OptimizerSettings, RunSettings
from scala import arguments
from scala.arguments import CosineSettings, EvalSettings, LossSettings, NetworkSettings, ScalaAugmentation, StepSettings

parse_args = partial(arguments.parse_args, description=__doc__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or with ``--eval`` evaluate; returns the last width's row, with those of all under ``widths``."""
    args = parse_args(argv)
    check_data_path(args.data_set, args.data_path)
    check_output(args.output_dir, folder=True)
    check_files(args.resume, sharded=args.fsdp and not args.eval)
    check_files(*(file for file in (args.finetune, args.teacher_path) if file != "timm"))
    from common.run.build import scaled_lr
    from common.run.launch import launch, seed_everything
    from scala import sweep, training

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    on_gpu = world.device.type == "cuda"
    settings = RunSettings.of(args, amp=args.amp or ("fp16" if on_gpu else "none"))
    augmentation = ScalaAugmentation.of(args, repeated_aug=args.repeated_aug and world.size > 1)
    even = augmentation.mixes and not args.eval
    batch = training.per_process_batch(args.batch_size, args.global_batch_size, world.size, even=even)
    data = DataSettings.of(args, batch_size=batch, pin_mem=args.pin_mem and on_gpu)
    flags = arguments.given(args)
    if args.eval:
        rows = training.evaluate_checkpoint(
            world, settings, data, EvalSettings.of(args), flags=flags, arguments=vars(args), finetune=args.finetune
        )
    else:
        peak = args.lr if args.unscale_lr else scaled_lr(args.lr, batch_size=batch, world_size=world.size)
        rows = training.train_widths(
            world, settings, data, augmentation, NetworkSettings.of(args, **training.resumed_bound(settings, flags)),
            LossSettings.of(args), StepSettings.of(args), CosineSettings.of(args),
            OptimizerSettings.of(args, lr=peak), classes=args.num_classes, arguments=vars(args),
        )  # fmt: skip
    if is_main():
        print(sweep.table(rows))
        print(f"{rows[-1]['top1_percent']:.3f}")
    return {**rows[-1], "widths": rows}


if __name__ == "__main__":
    run(main)

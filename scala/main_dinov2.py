"""Train a sliced ViT on the features of a foundation model, without labels or cross entropy (design; see README).

    torchrun --nproc_per_node=8 scala/main_dinov2.py --data-path DIR --model deit_base_patch14_224_scala \\
        --teacher-model vit_base_patch14_dinov2.lvd142m --granularity 0.25 --output_dir output/dinov2_b

The step is that of scale coordination (engine_scala.py) with the losses of features.py in all four passes. Writes
last.pth and best.pth (resumable with --resume auto; best by the held-out loss of the largest width), log.jsonl, and
weights.pth: the student alone, for linear_probe.py and export.py. The defaults are Proteus's recipe. The last line
printed is the held-out loss of the largest width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.data.paths import check_data_path
from common.run import cli
from common.run.files import check_files, check_output
from common.run.flags import add_flags
from common.run.program import is_main, run
from common.run.settings import AugmentationSettings, DataSettings, OptimizerSettings, RunSettings, ScheduleSettings
from scala import arguments
from scala.arguments import NetworkSettings, StepSettings


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    group = add_flags(parser, "student and widths", StepSettings)
    add = group.add_argument
    add("--model", default="deit_base_patch14_224_scala", metavar="NAME",
        help="a plain network on the teacher's patches (default: deit_base_patch14_224_scala)")  # fmt: skip
    arguments.add_width_args(group, {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25})
    add("--drop-path", type=cli.fraction, default=0.0, help="stochastic depth of the last block (default: 0)")
    add("--layer-scale", type=cli.positive_float, default=None, metavar="GAMMA",
        help="initial factor of LayerScale, 1 in Proteus (default: no LayerScale)")  # fmt: skip
    teacher = parser.add_argument_group("teacher and losses").add_argument
    teacher("--teacher-model", default="vit_base_patch14_dinov2.lvd142m", metavar="NAME",
            help="a ViT of timm (default: vit_base_patch14_dinov2.lvd142m)")  # fmt: skip
    teacher("--teacher-path", default="", metavar="FILE", help="its weights (default: timm downloads them)")
    teacher("--teacher-classes", type=cli.count, default=None, metavar="K",
            help="classes of the teacher's own head (default: the network's, none for DINOv2)")  # fmt: skip
    for name, default, what in (
        ("token", 1.0, "class tokens"), ("fea", 1.0, "class token and patches"),
        ("patch", 0.0, "masked patches, from one more pass per width"),
        ("logit", 0.0, "logits (KL), where the teacher has a head"),
    ):  # fmt: skip
        teacher(f"--lambda_{name}", type=float, default=default, metavar="W",
                help=f"weight of the loss on {what} (default: {default:g})")  # fmt: skip
    cli.add_data_args(parser)
    cli.add_augmentation_args(parser, repeated_aug=False, mixup=0.0, cutmix=0.0, smoothing=0.0)
    cli.add_optimizer_args(parser, model_ema=False)
    cli.add_schedule_args(parser, cooldown_epochs=0)
    cli.add_runtime_args(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last epoch's numbers."""
    args = parse_args(argv)
    check_data_path(args.data_set, args.data_path)
    check_output(args.output_dir, folder=True)
    check_files(args.resume, args.teacher_path)
    from common.run.build import scaled_lr
    from common.run.launch import launch, seed_everything
    from scala.feature_training import train_features
    from scala.features import FeatureWeights, load_teacher

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    teacher = load_teacher(
        args.teacher_model, args.teacher_path, img_size=args.input_size, num_classes=args.teacher_classes
    )
    row = train_features(
        world, RunSettings.of(args), DataSettings.of(args), AugmentationSettings.of(args), teacher,
        NetworkSettings.of(args, init_values=args.layer_scale),
        FeatureWeights(args.lambda_token, args.lambda_fea, args.lambda_patch, args.lambda_logit), StepSettings.of(args),
        OptimizerSettings.of(args, lr=scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size)),
        ScheduleSettings.of(args), arguments=vars(args),
    )  # fmt: skip
    if is_main() and "loss" in row:  # a run with nothing left to do has no new number
        print(f"held-out loss of the largest width: {row['loss']:.6f}")
    return row


if __name__ == "__main__":
    run(main, expected=(ValueError,))

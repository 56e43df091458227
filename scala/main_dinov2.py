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
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from common.data.loaders import (
    DataError,
    build_dataset,
    eval_loader,
    eval_transform,
    train_loader,
    train_transform,
)
from common.run import cli
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState, save_atomic
from common.run.engine import NonFiniteLoss, autocast, prepare_network, train
from common.run.launch import World, launch, reduce_sums, seed_everything
from common.run.metrics import Record
from common.run.program import get_logger, is_main, run
from scala.engine_scala import TRANSFER_TYPES, ScaleCoordination
from scala.features import FeatureLosses, FeatureStudent, FeatureWeights, build_student, load_teacher
from scala.main_scala import allow_widths
from scala.slicing import check_sampling, make_grid

logger = get_logger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument_group("student and widths").add_argument
    add("--model", default="deit_base_patch14_224_scala", metavar="NAME",
        help="a plain network on the teacher's patches (default: deit_base_patch14_224_scala)")  # fmt: skip
    add("--smallest_ratio", type=float, default=0.25, metavar="S", help="smallest width ratio (default: 0.25)")
    add("--largest_ratio", type=float, default=1.0, metavar="L", help="largest width ratio (default: 1.0)")
    add("--granularity", type=float, default=0.25, metavar="G", help="step of the trained ratios (default: 0.25)")
    add("--full_warm_epoch", type=cli.count, default=10, metavar="N",
        help="epochs that train the largest width alone (default: 10)")  # fmt: skip
    add("--transfer_type", choices=TRANSFER_TYPES, default="progressive",
        help="a slim width learns from the pass before it, or all from the largest (default: progressive)")  # fmt: skip
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
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


@torch.no_grad()
def held_out_losses(
    student: FeatureStudent, losses: FeatureLosses, loader: Any, ratios: Sequence[float], world: World, amp: str
) -> dict[str, float]:
    """Loss of each width against the teacher, mean over the pictures of all ranks; ``loss`` is the last ratio's."""
    student.eval()
    sums = dict.fromkeys([f"loss_{ratio:g}" for ratio in ratios] + ["images"], 0.0)
    for images, targets in loader:
        images = images.to(world.device, non_blocking=True)
        with autocast(amp, world.device):
            for ratio in ratios:
                loss = losses.full(images, student(images, ratio), targets)
                sums[f"loss_{ratio:g}"] += float(loss) * len(images)
        sums["images"] += len(images)
    total = reduce_sums(sums)
    count = total.pop("images")
    means = {name: value / count for name, value in total.items()}
    return means | {"loss": means[f"loss_{ratios[-1]:g}"], "images": count}


def identity_mix(mixup: Mixup | None) -> Any:
    """Mixup of pictures whose labels nobody reads, or None."""
    if mixup is None:
        return None

    def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return mixup(images, torch.zeros_like(targets))

    return mix


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last epoch's numbers."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    grid = make_grid(args.smallest_ratio, args.largest_ratio, args.granularity)
    if args.full_warm_epoch < args.epochs:
        check_sampling(grid)
    weights = FeatureWeights(args.lambda_token, args.lambda_fea, args.lambda_patch, args.lambda_logit)
    teacher = load_teacher(
        args.teacher_model, args.teacher_path, img_size=args.input_size, num_classes=args.teacher_classes
    )
    student: FeatureStudent = build_student(
        args.model, teacher, weights, img_size=args.input_size, smallest_ratio=grid.smallest,
        largest_ratio=grid.largest, drop_path_rate=args.drop_path, init_values=args.layer_scale,
    ).to(world.device)  # fmt: skip
    for ratio in grid.ratios:
        student.check_ratio(ratio)
    losses = FeatureLosses(teacher.to(world.device), weights)

    name, bad = cli.dataset_name(args.data_set), "skip" if args.skip_bad_images else "raise"
    open_split = partial(build_dataset, name, args.data_path, on_bad_image=bad, inat_category=args.inat_category)
    held_out = eval_loader(
        open_split("val", eval_transform(args.input_size, crop_ratio=args.eval_crop_ratio)),
        batch_size=args.batch_size, workers=args.workers, pin_memory=args.pin_mem,
    )  # fmt: skip
    peak = cli.scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size)
    optimizer = cli.build_optimizer(
        student, opt=args.opt, lr=peak, weight_decay=args.weight_decay, eps=args.opt_eps, betas=args.opt_betas,
        momentum=args.momentum,
    )  # fmt: skip
    scheduler, epochs = cli.build_schedule(
        optimizer, epochs=args.epochs, sched=args.sched, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, cooldown_epochs=args.cooldown_epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, patience_epochs=args.patience_epochs, noise=args.lr_noise,
        noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std,
    )  # fmt: skip
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(
            student, args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None
        )
    state = TrainingState(student, optimizer, scheduler, ema=ema, arguments=vars(args), device=world.device)
    folder = Path(args.output_dir) if args.output_dir else None
    manager = CheckpointManager(folder, metric="loss", higher_is_better=False) if folder else None
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)
    test = partial(held_out_losses, student, losses, held_out, [grid.smallest, grid.largest], world, args.amp)
    if args.eval:
        return _report(test())
    picture = train_transform(
        args.input_size, auto_augment=args.aa, color_jitter=args.color_jitter, interpolation=args.train_interpolation,
        erase_probability=args.reprob, erase_mode=args.remode, erase_count=args.recount,
    )  # fmt: skip
    batches = train_loader(
        open_split("train", picture), batch_size=args.batch_size, workers=args.workers, seed=args.seed,
        repeated_aug=args.repeated_aug, pin_memory=args.pin_mem,
    )  # fmt: skip
    mixup = None
    if args.mixup or args.cutmix or args.cutmix_minmax:
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                      args.mixup_mode, num_classes=1)  # fmt: skip
    if args.compile:
        allow_widths(len(grid.ratios))
    network = prepare_network(student, world, compiled=args.compile, find_unused_parameters=not weights.feature)
    step = ScaleCoordination(
        network, losses, grid, lambda: state.progress.epoch, full_warm_epoch=args.full_warm_epoch,
        transfer_type=args.transfer_type, augment=identity_mix(mixup),
    )  # fmt: skip
    boards = folder / "tensorboard" if args.tensorboard and folder else None
    row = train(
        step, state, batches, world=world, epochs=epochs, network=network, amp=args.amp, clip_grad=args.clip_grad,
        own_backward=True, evaluate_fn=test, manager=manager,
        record=Record(folder / "log.jsonl", tensorboard=boards) if folder else None,
        save_every_steps=args.save_every_steps, log_every_steps=args.log_every_steps,
    )  # fmt: skip
    if folder and world.is_main:
        backbone = student.backbone.state_dict()
        save_atomic({"model": {key: value.cpu() for key, value in backbone.items()}, "args": vars(args)},
                    folder / "weights.pth")  # fmt: skip
        logger.info("the student alone, for linear_probe.py and export.py: %s", folder / "weights.pth")
    return _report(row | {name.removeprefix("test_"): value for name, value in row.items() if name[:5] == "test_"})


def _report(row: dict[str, float]) -> dict[str, float]:
    """Print the last line; a run with nothing left to do has no new number."""
    if is_main() and "loss" in row:
        print(f"held-out loss of the largest width: {row['loss']:.6f}")
    return row


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))

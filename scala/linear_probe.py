"""Linear probing of a frozen network at every width: UCF101 clips, or any data set of pictures (design; see README).

    python scala/linear_probe.py --data-set ucf101 --data-path DIR --checkpoint CHECKPOINT --output-dir output/ucf101
    python scala/linear_probe.py --data-set CIFAR10 --data-path DIR --checkpoint output/dinov2_b/weights.pth

Clips get one head that is sliced like the backbone, pictures one per width; --head chooses. Writes last.pth and
best.pth (resumable with --resume auto; --eval --resume FILE only evaluates), log.jsonl, and widths.json with the
accuracy and cost of every width. The last line printed is the accuracy in percent at the largest width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch.utils.data import Dataset

from common.data.datasets import SkipBadPictures
from common.data.loaders import (
    DataError,
    build_dataset,
    eval_loader,
    eval_transform,
    num_classes,
    train_loader,
    train_transform,
)
from common.measure.flops import gmacs
from common.run import cli
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState
from common.run.engine import NonFiniteLoss, evaluate, prepare_network, train
from common.run.files import write_atomic
from common.run.launch import launch, seed_everything
from common.run.metrics import Record
from common.run.program import get_logger, run
from scala.loading import Trained, load_trained
from scala.main_scala import allow_widths
from scala.probing import (
    FrozenFeatures,
    ProbeAtRatio,
    ProbeStep,
    SeparateHeads,
    SlicedHead,
    sampled_widths,
)
from scala.slicing import SliceRule, make_grid
from scala.ucf101 import Clips, clip_transform

logger = get_logger(__name__)

CLIP_SETS = ("ucf101", "clips")


class ProbeError(ValueError):
    """Flags that do not go together; the message says what to change."""


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument_group("frozen network").add_argument
    add("--checkpoint", required=True, metavar="FILE",
        help="of main_scala.py, main_dinov2.py, or a state dict: path or URL")  # fmt: skip
    add("--weights", choices=("model", "model_ema"), default="model", help="which weights of it (default: model)")
    add("--model", default=None, metavar="NAME", help="the network's name (default: the checkpoint's)")
    add("--smallest_ratio", type=float, default=None, metavar="S",
        help="smallest trained ratio (default: the checkpoint's, else 0.25)")  # fmt: skip
    add("--largest_ratio", type=float, default=None, metavar="L",
        help="largest trained ratio (default: the checkpoint's, else 1.0)")  # fmt: skip
    add("--granularity", type=float, default=None, metavar="G",
        help="step of the trained ratios (default: the checkpoint's)")  # fmt: skip
    probe = parser.add_argument_group("probe").add_argument
    probe("--head", choices=("auto", "sliced", "separate"), default="auto",
          help="one head cut like the backbone, or one per width (default: auto: sliced for clips)")  # fmt: skip
    probe("--ratios", type=float, nargs="+", default=None, metavar="R",
          help="widths to evaluate, and to train with --head separate (default: all that were trained)")  # fmt: skip
    probe("--allow-untrained", action=cli.Switch, default=False,
          help="probe widths that the network was not trained at (default: off)")  # fmt: skip
    probe("--frames", type=cli.positive_int, default=8, metavar="T", help="frames of a clip (default: 8)")
    probe("--fold", type=int, choices=(1, 2, 3), default=1, help="which of UCF101's lists (default: 1)")
    probe("--smoothing", type=cli.fraction, default=0.0, help="label smoothing (default: 0)")
    cli.add_data_args(parser, data_set="ucf101", batch_size=32, input_size=None)
    cli.add_optimizer_args(parser, lr=1e-3, weight_decay=0.0, model_ema=False)
    cli.add_schedule_args(parser, epochs=50, warmup_epochs=0, cooldown_epochs=0, min_lr=0.0)
    cli.add_runtime_args(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def open_split(args: argparse.Namespace, split: str, size: int) -> Dataset[Any]:
    """Clips or pictures of a split, cropped and flipped at random in training, without further augmentation."""
    bad = "skip" if args.skip_bad_images else "raise"
    if args.data_set.lower() in CLIP_SETS:
        transform = clip_transform(size, train=split == "train", crop_ratio=args.eval_crop_ratio)
        clips = Clips(args.data_path, split, frames=args.frames, transform=transform, fold=args.fold)
        return SkipBadPictures(clips) if bad == "skip" else clips
    if split == "train":
        picture = train_transform(size, auto_augment="", color_jitter=0.0, erase_probability=0.0)
    else:
        picture = eval_transform(size, crop_ratio=args.eval_crop_ratio)
    name = cli.dataset_name(args.data_set)
    return build_dataset(name, args.data_path, split, picture, on_bad_image=bad, inat_category=args.inat_category)


def choose_ratios(args: argparse.Namespace, trained: Trained) -> list[float]:
    """The widths to probe, ascending.

    Raises:
        ProbeError: one that was not trained, without ``--allow-untrained``; or none is known.
    """
    ratios = args.ratios or trained.ratios
    if not ratios:
        raise ProbeError("the checkpoint does not say which widths were trained: give --granularity or --ratios")
    for ratio in ratios:
        trained.model.check_ratio(ratio)
        problem = trained.untrained(ratio)
        if problem and not args.allow_untrained:
            raise ProbeError(f"{problem.replace('--ratio', '--ratios')}; --allow-untrained probes it all the same")
    return sorted(set(ratios))


def build_probe(
    args: argparse.Namespace, trained: Trained, features: FrozenFeatures, ratios: list[float], classes: int
) -> tuple[Any, Any]:
    """The head, and what gives the widths of a training step."""
    sliced = args.head == "sliced" or (args.head == "auto" and args.data_set.lower() in CLIP_SETS)
    if not sliced:
        return SeparateHeads(features.width, classes, features.tokens, ratios), lambda: ratios
    rule = SliceRule(trained.smallest_ratio, trained.largest_ratio)
    head = SlicedHead(rule, features.width, classes, features.tokens)
    if trained.ratios is None or len(trained.ratios) < 5:
        widths = (trained.ratios or ratios)[::-1]
        return head, lambda: widths
    step = trained.ratios[1] - trained.ratios[0]
    return head, partial(sampled_widths, make_grid(trained.smallest_ratio, trained.largest_ratio, step))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the probe, or only evaluate it; returns the row of the largest width, all of them under ``widths``."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    trained = load_trained(
        args.checkpoint, weights=args.weights, model=args.model, smallest_ratio=args.smallest_ratio,
        largest_ratio=args.largest_ratio, granularity=args.granularity, input_size=args.input_size,
    )  # fmt: skip
    ratios, size = choose_ratios(args, trained), trained.input_size
    held_out = open_split(args, "val", size)
    test_batches = eval_loader(held_out, batch_size=args.batch_size, workers=args.workers, pin_memory=args.pin_mem)
    classes = num_classes(held_out if not isinstance(held_out, SkipBadPictures) else held_out.dataset)
    features = FrozenFeatures(trained.model.to(world.device))
    head, widths = build_probe(args, trained, features, ratios, classes)
    head.to(world.device)
    test = partial(evaluate, loader=test_batches, device=world.device, amp=args.amp)

    peak = cli.scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size, reference=256)
    optimizer = cli.build_optimizer(
        head, opt=args.opt, lr=peak, weight_decay=args.weight_decay, eps=args.opt_eps, betas=args.opt_betas,
        momentum=args.momentum,
    )  # fmt: skip
    scheduler, epochs = cli.build_schedule(
        optimizer, epochs=args.epochs, sched=args.sched, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, cooldown_epochs=args.cooldown_epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, patience_epochs=args.patience_epochs, noise=args.lr_noise,
        noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std,
    )  # fmt: skip
    average = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = ModelEmaV3(head, args.model_ema_decay, device=average) if args.model_ema else None
    state = TrainingState(head, optimizer, scheduler, ema=ema, arguments=vars(args), device=world.device)
    folder = Path(args.output_dir) if args.output_dir else None
    manager = CheckpointManager(folder) if folder else None
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)
    if not args.eval:
        batches = train_loader(
            open_split(args, "train", size), batch_size=args.batch_size, workers=args.workers, seed=args.seed,
            pin_memory=args.pin_mem,
        )  # fmt: skip
        if args.compile:
            allow_widths(len(trained.ratios or ratios))
        network = prepare_network(head, world, compiled=args.compile)
        boards = folder / "tensorboard" if args.tensorboard and folder else None
        train(
            ProbeStep(features, network, widths, args.smoothing), state, batches, world=world, epochs=epochs,
            network=network, amp=args.amp, clip_grad=args.clip_grad, manager=manager,
            evaluate_fn=lambda: test(ProbeAtRatio(features, head, ratios[-1]), show_progress=False),
            record=Record(folder / "log.jsonl", tensorboard=boards) if folder else None,
            save_every_steps=args.save_every_steps, log_every_steps=args.log_every_steps,
        )  # fmt: skip
    frames = args.frames if args.data_set.lower() in CLIP_SETS else 1
    rows = [
        {"ratio": ratio, "gmacs": frames * gmacs(trained.model.count_ops(ratio), "fvcore")}
        | test(ProbeAtRatio(features, head, ratio), title=f"width {ratio:g}")
        for ratio in ratios
    ]
    if world.is_main:
        if folder:
            write_atomic(folder / "widths.json", json.dumps({"arguments": vars(args), "widths": rows}, indent=1) + "\n")
        for row in rows:
            print(f"width {row['ratio']:<8g} {row['gmacs']:10.3f} GMACs  top-1 {row['top1_percent']:.3f} %")
        print(f"{rows[-1]['top1_percent']:.3f}")
    return {**rows[-1], "widths": rows}


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss, ValueError))

"""Train a SWAG-style Vision Transformer from scratch, for instance one that is then made cheaper without fine-tuning.

    python hourglass_swag/train.py -m vit_desk --data-set digits --output-dir output/vit_desk
    torchrun --nproc_per_node=8 hourglass_swag/train.py -m vit_b16_in1k -r 224 --data-path DIR --output-dir output/b16

Writes last.pth and best.pth (resumable with --resume auto), log.jsonl, and weights.pth: the flat state dict that
imagenet_1k_eval.py takes as --weights. The paper trains nothing; the recipe is DeiT's, and the desk network's is ours.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common.data.loaders import DataError, build_dataset, eval_loader, train_loader, train_transform
from common.run import cli
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState, save_atomic
from common.run.engine import NonFiniteLoss, evaluate, prepare_network, train
from common.run.launch import launch, seed_everything
from common.run.metrics import Record
from common.run.program import get_logger, is_main, run
from hourglass_swag.evaluation import swag_eval_transform
from hourglass_swag.models import create
from hourglass_swag.tools.parser import model_choices

logger = get_logger(__name__)

# What a network without DeiT's 300 epochs on ImageNet wants instead of DeiT's defaults; any flag given wins over it.
RECIPES: dict[str, dict[str, Any]] = {
    "vit_desk": {
        "resolution": 32, "batch_size": 32, "workers": 0, "epochs": 36, "warmup_epochs": 3, "cooldown_epochs": 0,
        "lr": 2e-3, "scale_lr": False, "clip_grad": 1.0, "model_ema_decay": 0.99, "repeated_aug": False, "aa": "",
        "color_jitter": 0.0, "hflip": 0.0, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0,
    },
}  # fmt: skip


def build_parser(recipe: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """All flags, with a network's recipe as defaults."""
    parser = cli.make_parser(__doc__)
    network = parser.add_argument_group("network")
    network.add_argument(
        "-m", "--model", required=True, choices=model_choices(), metavar="NAME", help="a name of hubconf.py"
    )
    network.add_argument(
        "-r", "--resolution", type=cli.positive_int, default=224, help="side of the input in pixels (default: 224)"
    )
    network.add_argument(
        "--hflip", type=cli.fraction, default=0.5, help="probability of a horizontal flip (default: 0.5; digits: 0)"
    )
    network.add_argument(
        "--scale-lr", action=cli.Switch, default=True, help="--lr is for 512 pictures per step (default: on)"
    )
    cli.add_data_args(parser)
    cli.add_augmentation_args(parser)
    cli.add_optimizer_args(parser)
    cli.add_schedule_args(parser)
    cli.add_runtime_args(parser)
    parser.set_defaults(**(recipe or {}))
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-m", "--model")
    known, _ = first.parse_known_args(argv)
    return build_parser(RECIPES.get(known.model)).parse_args(argv)


def build_criterion(mixup: Mixup | None, smoothing: float) -> nn.Module:
    """Soft-target cross entropy under mixup, whose targets are smoothed already; else cross entropy with smoothing."""
    if mixup is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def classification_step(
    batch: tuple[Tensor, Tensor], *, network: nn.Module, criterion: nn.Module, mixup: Mixup | None
) -> dict[str, Tensor]:
    """Loss of images (B, 3, height, width) with targets (B,)."""
    images, targets = batch if mixup is None else mixup(*batch)
    return {"loss": criterion(network(images), targets)}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, or with ``--eval`` only evaluate; returns the last epoch's numbers."""
    args = parse_args(argv)
    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    name, bad = cli.dataset_name(args.data_set), "skip" if args.skip_bad_images else "raise"
    open_split = partial(build_dataset, name, args.data_path, on_bad_image=bad, inat_category=args.inat_category)
    held_out = open_split("val", swag_eval_transform(args.resolution))
    test_batches = eval_loader(held_out, batch_size=2 * args.batch_size, workers=args.workers, pin_memory=args.pin_mem)

    model = create(args.model, image_size=args.resolution).to(world.device)
    test = partial(evaluate, device=world.device, amp=args.amp)
    peak = cli.scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size) if args.scale_lr else args.lr
    optimizer = cli.build_optimizer(
        model, opt=args.opt, lr=peak, weight_decay=args.weight_decay, eps=args.opt_eps, betas=args.opt_betas,
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
        ema = ModelEmaV3(model, args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)
    state = TrainingState(model, optimizer, scheduler, ema=ema, arguments=vars(args), device=world.device)
    folder = Path(args.output_dir) if args.output_dir else None
    manager = CheckpointManager(folder) if folder else None
    if args.resume:
        (manager or CheckpointManager(".", metric=None)).resume(state, args.resume)
    if args.eval:
        result = test(model, test_batches)
        logger.info("Acc@1 %.3f Acc@5 %.3f", result["top1_percent"], result["top5_percent"])
        return result

    picture = train_transform(
        args.resolution, auto_augment=args.aa, color_jitter=args.color_jitter, hflip=args.hflip,
        interpolation=args.train_interpolation, erase_probability=args.reprob, erase_mode=args.remode,
        erase_count=args.recount,
    )  # fmt: skip
    batches = train_loader(
        open_split("train", picture), batch_size=args.batch_size, workers=args.workers, seed=args.seed,
        repeated_aug=args.repeated_aug, pin_memory=args.pin_mem,
    )  # fmt: skip
    mixup = None
    if args.mixup or args.cutmix or args.cutmix_minmax:
        mixup = Mixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=int(model.num_classes),  # pyright: ignore[reportArgumentType] - every network of the registry has it
        )  # fmt: skip
    network = prepare_network(model, world, compiled=args.compile)
    step = partial(classification_step, network=network, criterion=build_criterion(mixup, args.smoothing), mixup=mixup)
    boards = folder / "tensorboard" if args.tensorboard and folder else None
    row = train(
        step, state, batches, world=world, epochs=epochs, network=network, amp=args.amp, clip_grad=args.clip_grad,
        evaluate_fn=lambda: test(ema.module if ema else model, test_batches, show_progress=False), manager=manager,
        record=Record(folder / "log.jsonl", tensorboard=boards) if folder else None,
        save_every_steps=args.save_every_steps, log_every_steps=args.log_every_steps,
    )  # fmt: skip
    if folder and is_main():
        kept = ema.module if ema else model
        save_atomic({key: value.to("cpu") for key, value in kept.state_dict().items()}, folder / "weights.pth")
        logger.info("weights for --weights: %s", folder / "weights.pth")
    return row


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), expected=(DataError, CheckpointError, NonFiniteLoss))

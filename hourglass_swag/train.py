"""Train a SWAG-style Vision Transformer from scratch, for instance one that is then made cheaper without fine-tuning.

    python hourglass_swag/train.py -m vit_desk --data-set digits --output-dir output/vit_desk
    torchrun --nproc_per_node=8 hourglass_swag/train.py -m vit_b16_in1k -r 224 --data-path DIR --output-dir output/b16

Writes last.pth and best.pth (resumable with --resume auto), log.jsonl, and weights.pth: the flat state dict that
imagenet_1k_eval.py takes as --weights. The paper trains nothing; the recipe is DeiT's, and the desk network's is ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.paths import check_data_path
from common.run import cli
from common.run.errors import UsageError
from common.run.files import check_files, check_output
from common.run.program import get_logger, is_main, run
from common.run.settings import AugmentationSettings, DataSettings, OptimizerSettings, RunSettings, ScheduleSettings
from hourglass_swag.tools.parser import model_choices

if TYPE_CHECKING:
    from timm.data.mixup import Mixup
    from torch import Tensor, nn

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
        "--scale-lr", action=cli.Switch, default=True, help="--lr is for 512 images per step (default: on)"
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
    from timm.loss.cross_entropy import SoftTargetCrossEntropy
    from torch import nn

    return SoftTargetCrossEntropy() if mixup is not None else nn.CrossEntropyLoss(label_smoothing=smoothing)


def classification_step(
    batch: tuple[Tensor, Tensor], *, network: nn.Module, criterion: nn.Module, mixup: Mixup | None
) -> dict[str, Tensor]:
    """Loss of images (B, 3, height, width) with targets (B,)."""
    images, targets = batch if mixup is None else mixup(*batch)
    return {"loss": criterion(network(images), targets)}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, or with ``--eval`` only evaluate; returns the last epoch's numbers."""
    args = parse_args(argv)
    check_files(args.resume)
    check_output(args.output_dir, folder=True)
    check_data_path(args.data_set, args.data_path)
    from common.data.build import build_loaders, build_mixup
    from common.run.build import build_run, scaled_lr
    from common.run.checkpoint import save_atomic
    from common.run.engine import evaluate
    from common.run.launch import launch, seed_everything
    from hourglass_swag.evaluation import swag_eval_transform
    from hourglass_swag.models import create

    world = launch(args.device, local_rank=args.local_rank)
    seed_everything(args.seed)
    try:
        model = create(args.model, image_size=args.resolution).to(world.device)
    except ValueError as error:
        raise UsageError(f"--model {args.model} --resolution {args.resolution}: {error}") from error
    classes = int(model.num_classes)  # pyright: ignore[reportArgumentType] - every network of the registry has it
    augmentation = AugmentationSettings.of(args)
    batches = build_loaders(
        DataSettings.of(args, input_size=args.resolution), None if args.eval else augmentation, classes=classes,
        eval_batch_size=2 * args.batch_size, held_out=swag_eval_transform(args.resolution),
    )  # fmt: skip
    test = partial(evaluate, device=world.device, amp=args.amp)
    peak = scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size) if args.scale_lr else args.lr
    trainer = build_run(
        model, world, RunSettings.of(args), optimizer=OptimizerSettings.of(args, lr=peak),
        schedule=ScheduleSettings.of(args), arguments=vars(args),
    )  # fmt: skip
    if args.eval:
        result = test(model, batches.held_out)
        logger.info("Acc@1 %.3f Acc@5 %.3f", result["top1_percent"], result["top5_percent"])
        return result
    mixup = build_mixup(augmentation, classes)
    criterion = build_criterion(mixup, args.smoothing)
    assert batches.train is not None
    assert trainer.network is not None
    step = partial(classification_step, network=trainer.network, criterion=criterion, mixup=mixup)
    kept: Any = trainer.state.ema.module if trainer.state.ema else model
    row = trainer.fit(step, batches.train, evaluate_fn=lambda: test(kept, batches.held_out, show_progress=False))
    if args.output_dir and is_main():
        file = Path(args.output_dir) / "weights.pth"
        save_atomic({key: value.to("cpu") for key, value in kept.state_dict().items()}, file)
        logger.info("weights for --weights: %s", file)
    return row


if __name__ == "__main__":
    run(main)

"""What ``main.py`` builds from its flags: network, optimiser, batches, step, record."""

import argparse
import csv
import io
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import nn

from common.data.loaders import build_dataset, eval_loader, eval_transform, train_loader
from common.run import cli
from common.run.checkpoint import TrainingState
from common.run.files import write_atomic
from common.run.metrics import Record
from common.run.program import get_logger
from dvt.augmentation import IMAGENET_MEAN, IMAGENET_STD, make_erasing, make_train_transform
from dvt.checkpoints import load_weights, read
from dvt.engine import CascadeStep, build_criterion
from dvt.models import MODELS, T2T_ViT, create_model

logger = get_logger(__name__)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The network, the same on every rank."""
    options: dict[str, Any] = {
        "num_classes": args.num_classes, "img_size": args.img_size, "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
    }  # fmt: skip
    if MODELS[args.model].stages:
        options |= {"feature_reuse": args.feature_reuse, "relation_reuse": args.relation_reuse}
    torch.manual_seed(args.seed)
    model = create_model(args.model, **options)
    if args.initial_checkpoint:
        load_weights(model, read(args.initial_checkpoint), source=args.initial_checkpoint)
    return model


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser. The published cascades decay their class tokens and position tables; so does this one."""
    groups = None
    if args.no_decay_tokens:
        tokens = [name for name, _ in model.named_parameters() if name.endswith(("cls_token", "pos_embed"))]
        groups = partial(param_groups_weight_decay, weight_decay=args.weight_decay, no_weight_decay_list=tokens)
    return cli.build_optimizer(
        model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, eps=args.opt_eps, betas=args.opt_betas,
        momentum=args.momentum, group_fn=groups,
    )  # fmt: skip


def build_loaders(args: argparse.Namespace) -> tuple[Any, Any]:
    """Batches to train on (None with --eval_checkpoint) and to evaluate on."""
    name, bad = cli.dataset_name(args.data_set), "skip" if args.skip_bad_images else "raise"
    open_split = partial(build_dataset, name, args.data or None, on_bad_image=bad)
    mean, std = args.mean or IMAGENET_MEAN, args.std or IMAGENET_STD
    alone = MODELS[args.model].make is T2T_ViT and not MODELS[args.model].stages
    picture = eval_transform(
        args.img_size, crop_ratio=args.crop_pct or (0.9 if alone else 0.875),
        interpolation=args.interpolation or "bicubic", mean=mean, std=std,
    )  # fmt: skip
    loading = {"workers": args.workers, "pin_memory": args.pin_mem}
    batch = args.batch_size * args.validation_batch_size_multiplier
    pictures = open_split("val", picture)
    warn_of_classes(pictures, args.num_classes)
    held_out = eval_loader(pictures, batch_size=batch, **loading)
    if args.eval_checkpoint:
        return None, held_out
    picture = make_train_transform(
        args.img_size, no_aug=args.no_aug, auto_augment=args.aa, color_jitter=args.color_jitter,
        interpolation=args.train_interpolation, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
        vflip=args.vflip, views=args.aug_splits, mean=mean, std=std,
    )  # fmt: skip
    batches = train_loader(
        open_split("train", picture), batch_size=args.batch_size, seed=args.seed, repeated_aug=args.repeated_aug,
        **loading,
    )  # fmt: skip
    return batches, held_out


def warn_of_classes(dataset: Any, outputs: int) -> None:
    """Say so if a data set has fewer classes than the network; more are an error once such a label turns up."""
    classes = getattr(dataset, "classes", None)
    if classes is not None and len(classes) < outputs:
        logger.warning(
            "the data set has %d classes and the network %d: --num-classes %d was probably meant",
            len(classes), outputs, len(classes),
        )  # fmt: skip


def build_step(args: argparse.Namespace, network: nn.Module, state: TrainingState) -> CascadeStep:
    """What happens with a batch."""
    mixup = None
    if args.mixup or args.cutmix or args.cutmix_minmax:
        mixup = Mixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=args.num_classes,
        )  # fmt: skip
    erasing = make_erasing(
        0.0 if args.no_aug else args.reprob, args.remode, args.recount, device=state.device, views=args.aug_splits,
        clean_first=args.resplit,
    )  # fmt: skip
    criterion = build_criterion(mixup is not None, args.smoothing, jsd_views=args.aug_splits if args.jsd else 0)
    return CascadeStep(
        network, criterion, mixup=mixup, mixup_epochs=args.mixup_off_epoch, erasing=erasing, progress=state.progress
    )


def amp_mode(args: argparse.Namespace, device: torch.device) -> str:
    """``none``, ``fp16`` or ``bf16``."""
    if args.apex_amp:
        logger.warning("--apex-amp: apex is not used; torch's own mixed precision is (--amp)")
    if not (args.amp or args.apex_amp or args.amp_dtype):
        return "none"
    return args.amp_dtype or ("fp16" if device.type == "cuda" else "bf16")


class SummaryRecord(Record):
    """The record of a run, and ``summary.csv`` beside it in the published columns, rewritten after every epoch."""

    def write(self, event: str, row: Mapping[str, Any]) -> None:
        super().write(event, row)
        if event != "epoch" or self.path is None:
            return
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        rows = [line for line in lines if line["event"] == "epoch"]
        names = [name for name in rows[-1] if name.startswith("test_") and name.endswith(("loss", "top1", "top5"))]
        names = [name for name in names if "_raw_" not in name]
        text = io.StringIO()
        table = csv.writer(text, lineterminator=os.linesep)
        table.writerow(["epoch", "train_loss", *(name.replace("test_", "eval_") for name in names)])
        for line in rows:
            table.writerow([line.get(name) for name in ("epoch", "train_loss", *names)])
        write_atomic(Path(self.path).with_name("summary.csv"), text.getvalue())

"""What the flags of ``main_scala.py`` describe: network, teacher, losses, mixup, data, schedule."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import timm
import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import Dataset

from common.data.loaders import (
    DataError,
    build_dataset,
    default_num_classes,
    eval_transform,
    num_classes,
    train_loader,
    train_transform,
)
from common.losses import DistillationLoss
from common.run import cli
from common.run.checkpoint import CheckpointError, load_safely, load_strict, locate, select_state
from common.run.launch import main_process_first
from common.run.program import get_logger
from scala import models_mobilenet, models_scala, models_uniformer
from scala.arguments import DEFAULTS
from scala.engine_scala import CosineCurve
from scala.layers import batch_norms, calibrate_
from scala.losses import TOKENS, CosubLoss, ScalaLosses
from scala.slicing import WidthGrid, check_sampling, find_ratio, make_grid
from scala.weights import load_for_finetuning

logger = get_logger(__name__)

BATCH_NORM_MODELS = ("mobilenet_v2_scala", *models_uniformer.MODELS)
"""Models with batch statistics per trained width, which therefore know the granularity."""
NAMES = (*models_scala.MODELS, *BATCH_NORM_MODELS)
"""Every ``--model``."""
assert models_mobilenet.mobilenet_v2_scala.__name__ in NAMES  # registered by its import


class SettingError(ValueError):
    """Flags that do not go together, or not with a checkpoint; the message says what to change."""


def read_checkpoint(source: str) -> Any:
    """Content of a checkpoint given as a path or URL; one process downloads for all."""
    with main_process_first():
        path = locate(source)
    return load_safely(path)


def trained_arguments(content: Any) -> dict[str, Any]:
    """The flags that a checkpoint was trained with, as far as it says: ours and official files do."""
    found = content.get("args") if isinstance(content, Mapping) else None
    return dict(found if isinstance(found, Mapping) else vars(found) if isinstance(found, argparse.Namespace) else {})


def resolve_grid(args: argparse.Namespace, trained: Mapping[str, Any], source: str) -> WidthGrid:
    """Slicing bound and granularity: of the flags, else of the checkpoint, else the defaults; written into ``args``.

    Raises:
        SettingError: a flag contradicts the checkpoint, which would silently cut the wrong channels.
    """
    for name, default in DEFAULTS.items():
        given, known = getattr(args, name), trained.get(name)
        if given is None:
            setattr(args, name, default if known is None else float(known))
        elif known is not None and float(known) != given:
            raise SettingError(
                f"--{name} {given:g} contradicts {source}, which was trained with {known:g}: bound and granularity "
                f"decide which channels a width uses and which widths there are; leave the flag out or give {known:g}"
            )
    return make_grid(args.smallest_ratio, args.largest_ratio, args.granularity)


def choose_ratios(args: argparse.Namespace, grid: WidthGrid, trained: Mapping[str, Any]) -> list[float]:
    """The widths of ``--eval_ratio``.

    Raises:
        SettingError: one of them was not trained; ``--allow-untrained`` makes it a warning.
    """
    alone = trained.get("full_warm_epoch", 0) >= trained.get("epochs", float("inf"))
    ratios = [grid.largest] if alone else grid.ratios
    if args.eval_ratio == "all":
        return ratios
    chosen = []
    for wanted in args.eval_ratio:
        near = find_ratio(wanted, ratios)
        if near is None:
            known = ", ".join(f"{ratio:g}" for ratio in ratios)
            problem = f"width ratio {wanted:g} was not trained; the trained ones are {known}"
            if not args.allow_untrained:
                raise SettingError(
                    f"{problem}. Its accuracy would be chance; --allow-untrained evaluates it all the same"
                )
            logger.warning("%s: expect the accuracy of chance", problem)
        chosen.append(wanted if near is None else near)
    return chosen


def build_model(args: argparse.Namespace, classes: int) -> Any:
    """The network of ``--model``, with random weights or those of ``--finetune``.

    Raises:
        SettingError: an unknown name, or an override that the model does not take.
    """
    if args.model not in NAMES:
        raise SettingError(f"--model {args.model!r} is no model of this package; they are {', '.join(NAMES)}")
    options: dict[str, Any] = {
        "num_classes": classes, "img_size": args.input_size, "drop_rate": args.drop, "drop_path_rate": args.drop_path,
        "smallest_ratio": args.smallest_ratio, "largest_ratio": args.largest_ratio,
    }  # fmt: skip
    if args.model in BATCH_NORM_MODELS:
        options["granularity"] = args.granularity
    more = {"embed_dim": args.embed_dim, "depth": args.depth, "num_heads": args.num_heads,
            "patch_size": args.patch_size, "init_values": args.init_values,
            "official_layer_scale": args.official_layer_scale or None,
            "official_anchors": args.official_anchors or None}  # fmt: skip
    options |= {name: value for name, value in more.items() if value is not None}
    try:
        model: Any = timm.create_model(args.model, **options)
    except TypeError as error:
        raise SettingError(f"--model {args.model} does not take one of the flags given: {error}") from error
    if args.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise SettingError(f"--model {args.model} has no gradient checkpointing")
        model.set_grad_checkpointing()
    if not args.train_mode and hasattr(model, "pair_outputs"):
        model.pair_outputs = True  # the losses need both heads, in whatever mode
    if args.finetune:
        load_for_finetuning(model, select_state(read_checkpoint(args.finetune)), source=args.finetune)
    if args.attn_only:
        for name, weight in model.named_parameters():
            weight.requires_grad_(".attn." in name or name in ("head.weight", "head.bias", "pos_embed"))
    return model


def build_teacher(args: argparse.Namespace, classes: int) -> nn.Module:
    """The external teacher: a timm model in evaluation mode, its weights loaded strictly.

    Raises:
        SettingError: timm has no such model.
        CheckpointError: the weights do not fit it.
    """
    if not timm.is_model(args.teacher_model):
        raise SettingError(f"--teacher-model {args.teacher_model!r} is no timm model")
    own = args.teacher_path == "timm"
    with main_process_first():
        teacher: Any = timm.create_model(args.teacher_model, pretrained=own, num_classes=classes)
    side = teacher.default_cfg["input_size"][-1]
    if args.input_size != side and isinstance(teacher, VisionTransformer):
        logger.info("the teacher was built for %d pixels: its position embedding is resized in each pass", side)
        teacher = timm.create_model(args.teacher_model, pretrained=own, num_classes=classes, dynamic_img_size=True)
    if not own:
        state = select_state(read_checkpoint(args.teacher_path), source=args.teacher_path)
        load_strict(teacher, state, source=args.teacher_path)
    return teacher.eval().requires_grad_(False)


def build_losses(args: argparse.Namespace, teacher: nn.Module | None, *, mixing: bool) -> ScalaLosses:
    """The losses of the four passes; the labels' criterion is DeiT's choice."""
    if args.bce_loss:
        base: nn.Module = nn.BCEWithLogitsLoss()
    elif mixing:
        base = SoftTargetCrossEntropy()  # the targets are smoothed already
    else:
        base = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    criterion: nn.Module = CosubLoss()
    if not args.cosub:
        criterion = DistillationLoss(
            base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau
        )
    return ScalaLosses(
        criterion, kind=args.distill_type, token=TOKENS[args.token_type], ce_coefficient=args.ce_coefficient,
        ce_type=args.ce_type,
    )  # fmt: skip


def build_mixup(args: argparse.Namespace, classes: int) -> Mixup | None:
    """Mixup and CutMix with label smoothing, or None where both are off."""
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    return Mixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=classes,
    )  # fmt: skip


def open_split(args: argparse.Namespace, split: str, *, augment: bool = True) -> Dataset[Any]:
    """The training or validation pictures with their transform; the other split need not exist."""
    if split == "train" and augment:
        picture = train_transform(
            args.input_size, auto_augment=args.aa, color_jitter=args.color_jitter, hflip=args.hflip,
            interpolation=args.train_interpolation, erase_probability=args.reprob, erase_mode=args.remode,
            erase_count=args.recount, three_augment=args.ThreeAugment, simple_random_crop=args.src,
        )  # fmt: skip
    else:
        picture = eval_transform(args.input_size, crop_ratio=args.eval_crop_ratio)
    name, bad = cli.dataset_name(args.data_set), "skip" if args.skip_bad_images else "raise"
    return build_dataset(
        name, args.data_path, split, picture, on_bad_image=bad, inat_category=args.inat_category,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip


def count_classes(args: argparse.Namespace, dataset: Dataset[Any]) -> int:
    """Classes of the network: as told, else 1000 for ImageNet, else those of the data set.

    Raises:
        SettingError: the data set has more.
    """
    try:
        inside = num_classes(dataset)
    except DataError:
        inside = 0
    if args.num_classes is None:
        try:
            args.num_classes = default_num_classes(cli.dataset_name(args.data_set))
        except DataError:
            args.num_classes = inside or num_classes(dataset)
        if cli.dataset_name(args.data_set).startswith("inat"):  # by --inat-category
            args.num_classes = inside
    if inside > args.num_classes:
        raise SettingError(f"the data set has {inside} classes and the network {args.num_classes}; see --num-classes")
    return args.num_classes


def per_process_batch(args: argparse.Namespace, world_size: int) -> int:
    """Pictures per step of one process; with ``--global-batch-size`` its share, written into ``args``.

    Raises:
        SettingError: the processes cannot share it evenly, or the share is odd under mixup.
    """
    if args.global_batch_size is not None:
        if args.global_batch_size % world_size:
            raise SettingError(
                f"--global-batch-size {args.global_batch_size} cannot be shared by {world_size} processes; give a "
                f"multiple of {world_size}"
            )
        args.batch_size = args.global_batch_size // world_size
        if args.batch_size % 2 and (args.mixup or args.cutmix or args.cutmix_minmax) and not args.eval:
            raise SettingError(f"mixup and CutMix need an even batch per process, got {args.batch_size}")
    return args.batch_size


def build_curve(args: argparse.Namespace, world_size: int) -> CosineCurve:
    """The published course of the learning rate."""
    base = args.lr if args.unscale_lr else cli.scaled_lr(args.lr, batch_size=args.batch_size, world_size=world_size)
    return CosineCurve(
        base, args.epochs, args.warmup_epochs, args.warmup_lr, args.min_lr, args.lr_noise, args.lr_noise_pct, args.seed
    )


def calibrate(args: argparse.Namespace, model: Any, ratios: Sequence[float], device: torch.device) -> None:
    """Batch statistics for the widths that have none, from training pictures without augmentation.

    Raises:
        SettingError: such a width without ``--calibrate-batches``.
    """
    norms = batch_norms(model)
    lacking = [ratio for ratio in ratios if norms and not norms[0].knows(ratio)]
    if lacking and not args.calibrate_batches:
        raise SettingError(
            f"--model {args.model} keeps batch statistics per trained width and has none for "
            f"{', '.join(f'{ratio:g}' for ratio in lacking)}: give --calibrate-batches N, for instance 64"
        )
    for ratio in lacking:
        pictures = open_split(args, "train", augment=False)
        loader = train_loader(pictures, batch_size=args.batch_size, workers=args.workers, seed=args.seed)
        calibrate_(model, ratio, (images.to(device) for images, _ in islice(loader, args.calibrate_batches)))


def check_training(args: argparse.Namespace, grid: WidthGrid, model: Any) -> None:
    """Refuse widths that cannot be trained, before the first epoch.

    Raises:
        ValueError: no middle widths to draw, or a width that the model cannot have.
    """
    ratios = [grid.largest]
    if args.full_warm_epoch < args.epochs:
        check_sampling(grid)
        ratios = grid.ratios
    for ratio in ratios:
        model.check_ratio(ratio)


def load_model(model: Any, content: Any, source: str) -> None:
    """The weights of a checkpoint, strictly.

    Raises:
        CheckpointError: listing what does not fit, with the flag that usually helps.
    """
    state = select_state(content, source=source)
    try:
        load_strict(model, state, source=source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_advice(model, state)}") from error


def _advice(model: Any, state: Mapping[str, torch.Tensor]) -> str:
    """Which flags make the network that a checkpoint belongs to, as far as its shapes tell."""
    found = []
    if "pos_embed" in state and state["pos_embed"].shape[-1] != getattr(model, "embed_dim", None):
        found.append(f"a width of {state['pos_embed'].shape[-1]} (--model or --embed-dim)")
    if "head.weight" in state and state["head.weight"].shape[0] != model.num_classes:
        found.append(f"{state['head.weight'].shape[0]} classes (--num-classes)")
    if ("dist_token" in state) != hasattr(model, "dist_token"):
        found.append(
            "a distillation token (a *_distilled_* model)" if "dist_token" in state else "no distillation token"
        )
    about = "; ".join(found) or "another shape"
    return f"the checkpoint's network has {about}; name its model with --model"

"""From flags to the objects of a run: student, teachers, criterion, loaders, optimiser.

Everything that a wrong flag could spoil is checked here, before the first image is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models._factory import create_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.loaders import (
    Loader,
    build_dataset,
    eval_loader,
    eval_transform,
    num_classes,
    train_loader,
    train_transform,
)
from common.run import cli
from common.run.checkpoint import load_strict
from common.run.engine import amp_dtype, prepare_network
from common.run.launch import World
from common.run.program import get_logger
from sit.arguments import network_options
from sit.engine import get_param_groups, store_for_autocast, training_step
from sit.loading import (
    WeightsFile,
    check_teacher_fits,
    load_for_evaluation,
    load_for_training,
    read_weights,
)
from sit.losses import DistillationLoss
from sit.models import LVViT
from sit.sizes import SIZES

logger = get_logger(__name__)


class FlagError(ValueError):
    """Flags that do not go together; the message names them and says what to do."""


def check_flags(args: argparse.Namespace, world: World) -> None:
    """What can be said before anything is read.

    Raises:
        FlagError: naming the flags.
    """
    if args.extra_teacher_model and args.distillation_type == "none":
        raise FlagError("--extra-teacher-model needs --distillation-type frd: only slimmed networks have its token")
    if args.token_label_data and args.distillation_type != "none":
        raise FlagError("--token-label-data trains a teacher: give --distillation-type none")
    if args.eval:
        return
    if args.distillation_type == "frd" and not args.teacher_path and (args.lambda_token or args.lambda_logits):
        raise FlagError(
            "training with --distillation-type frd needs the teacher's weights: --teacher-path FILE. Without any, "
            "train a teacher first: sit/exp/teacher/train.sh"
        )
    if args.extra_teacher_model and not args.extra_teacher_path:
        raise FlagError(
            f"--extra-teacher-model {args.extra_teacher_model} needs its weights: --extra-teacher-path FILE"
        )
    if uses_mixup(args) and args.batch_size % 2:
        raise FlagError(f"mixup and CutMix pair the images of a batch: --batch-size {args.batch_size} must be even")
    if args.token_label_data and (args.batch_size % 2 or uses_mixup(args)):
        raise FlagError("token labeling mixes tokens by itself: give an even --batch-size, --mixup 0 and --cutmix 0")
    peak = peak_rate(args, world)
    if peak < args.min_lr:
        logger.warning(
            "the scaled rate %.3g (--lr %.3g for %d images per step) is below --min-lr %.3g: the rate will rise "
            "over the epochs; raise --lr or lower --min-lr",
            peak, args.lr, args.batch_size * world.size, args.min_lr,
        )  # fmt: skip


def uses_mixup(args: argparse.Namespace) -> bool:
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax)


def resolve_amp(args: argparse.Namespace, world: World) -> str:
    """``auto`` as published: fp16 on CUDA, nothing on the CPU."""
    return ("fp16" if world.device.type == "cuda" else "none") if args.amp == "auto" else args.amp


def peak_rate(args: argparse.Namespace, world: World) -> float:
    """Learning rate of the backbone at the start."""
    return cli.scaled_lr(args.lr, batch_size=args.batch_size, world_size=world.size) if args.scale_lr else args.lr


# ---------------------------------------------------------------------------------------------------------------------
# Data


def open_split(args: argparse.Namespace, split: str, transform: Any) -> Dataset[Any]:
    """One split of the data set that the flags name."""
    return build_dataset(
        cli.dataset_name(args.data_set),
        args.data_path,
        split,
        transform,
        on_bad_image="skip" if args.skip_bad_images else "raise",
        inat_category=args.inat_category,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def count_classes(args: argparse.Namespace, dataset: Dataset[Any]) -> int:
    """--num-classes, else those of the data, which is said where they are not the published 1000."""
    if args.num_classes:
        return args.num_classes
    found = num_classes(dataset)
    if found != 1000:
        logger.info("classes: %d, those of the data (--num-classes says otherwise)", found)
    return found


def pins(args: argparse.Namespace, world: World) -> bool:
    """Page-locked memory serves copies to a GPU only."""
    return args.pin_mem and world.device.type == "cuda"


def build_eval_loader(args: argparse.Namespace, world: World) -> tuple[Loader, int]:
    """Held-out images in batches of 1.5 times the training's, as published, and the number of classes."""
    image = eval_transform(args.input_size, crop_ratio=args.eval_crop_ratio)
    held_out = open_split(args, "val", image)
    loader = eval_loader(
        held_out, batch_size=int(1.5 * args.batch_size), workers=args.workers, pin_memory=pins(args, world),
        seed=args.seed,
    )  # fmt: skip
    return loader, count_classes(args, held_out)


def build_train_transform(args: argparse.Namespace) -> Any:
    return train_transform(
        args.input_size,
        auto_augment=args.aa,
        color_jitter=args.color_jitter,
        hflip=args.hflip,
        interpolation=args.train_interpolation,
        erase_probability=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
    )


def build_train_loader(args: argparse.Namespace, world: World) -> Loader:
    """Shuffled images, repeated and augmented as the flags say; with label maps where token labeling is on."""
    if args.token_label_data:
        from sit.token_labeling import LabelledImages  # only where a teacher is trained this way

        dataset: Dataset[Any] = LabelledImages(
            open_split(args, "train", None), args.data_path, args.token_label_data, args.input_size,
            build_train_transform(args),
        )  # fmt: skip
    else:
        dataset = open_split(args, "train", build_train_transform(args))
    return train_loader(
        dataset,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        repeated_aug=args.repeated_aug,
        pin_memory=pins(args, world),
    )


def build_mixup(args: argparse.Namespace, classes: int) -> Mixup | None:
    if not uses_mixup(args):
        return None
    return Mixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=classes,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def make_network(name: str, **options: Any) -> LVViT:
    """A size of ``sit.models``.

    Raises:
        FlagError: options that do not go together.
    """
    try:
        model = create_model(name, **options)
    except ValueError as error:
        raise FlagError(f"{name}: {error}") from error
    assert isinstance(model, LVViT)
    return model


def build_student(args: argparse.Namespace, classes: int) -> LVViT:
    """The network of --model, with the weights of --finetune if there are any."""
    file = read_weights(args.finetune, key=args.finetune_key) if args.finetune else None
    options = network_options(args)
    if args.eval and file is not None:
        options |= options_of_another_size(file, args)
        if not args.num_classes and file.classes not in (None, classes):
            logger.warning(
                "the data has %d classes, %s %d: labels are numbers of its classes", classes, file.source, file.classes
            )
            classes = file.classes
    model = make_network(
        args.model,
        num_classes=classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        distillation_type=args.distillation_type,
        conv_distillation=bool(args.extra_teacher_model),
        **options,
    )
    if file is not None and args.eval:
        load_for_evaluation(model, file, allow_stripped=args.allow_stripped)
    elif file is not None:
        load_for_training(model, file)
    if args.lambda_token == 0 and model.recover:  # nothing would train the reverse modules
        model.recover = False
        model.rtsm.requires_grad_(False)
    return model


def options_of_another_size(file: WeightsFile, args: argparse.Namespace) -> dict[str, Any]:
    """For evaluating a slimmed file at a size it was not trained for: its own tokens per stage, no reverse modules."""
    side = args.input_size // SIZES[args.model].get("patch_size", 16)
    if not file.slimmed or not file.patches or file.patches == side**2:
        return {}
    return {"keeped_patches": file.stage_patches, "logits_only": True}


def build_teacher(args: argparse.Namespace, student: LVViT, amp: str, device: torch.device) -> LVViT | None:
    """The network without slimming, in evaluation mode for good, its weights in the precision it runs in.

    None where no loss needs it.
    """
    if args.distillation_type != "frd" or not (args.lambda_token or args.lambda_logits):
        return None
    teacher = make_network(
        args.teacher_model, num_classes=student.num_classes, distillation_type=None, img_size=args.input_size
    )
    try:
        check_teacher_fits(student, teacher)
    except ValueError as error:
        raise FlagError(str(error)) from error
    load_for_evaluation(teacher, read_weights(args.teacher_path))
    teacher.with_cp = False
    teacher = teacher.to(device).eval().requires_grad_(False)
    store_for_autocast(teacher, amp_dtype(amp, device))
    return teacher


def build_cnn_teacher(args: argparse.Namespace, classes: int, device: torch.device) -> nn.Module | None:
    """The network of --extra-teacher-model, in evaluation mode for good."""
    if not args.extra_teacher_model:
        return None
    try:
        cnn = create_model(args.extra_teacher_model, num_classes=classes, global_pool="avg")
    except RuntimeError as error:
        raise FlagError(f"--extra-teacher-model: {error}; timm.list_models() has the names") from error
    file = read_weights(args.extra_teacher_path)
    load_strict(cnn, file.state, source=file.source)
    return cnn.to(device).eval().requires_grad_(False)


def build_criterion(args: argparse.Namespace, student: LVViT, amp: str, device: torch.device) -> DistillationLoss:
    """Base loss by the flags, teachers, weights."""
    base: nn.Module = nn.CrossEntropyLoss()
    if uses_mixup(args):
        base = SoftTargetCrossEntropy()  # smoothed in the mixed labels
    elif args.smoothing:
        base = LabelSmoothingCrossEntropy(args.smoothing)
    return DistillationLoss(
        base,
        build_teacher(args, student, amp, device),
        build_cnn_teacher(args, student.num_classes, device),
        args.distillation_type,
        args.lambda_token,
        args.lambda_logits,
        args.lambda_cnn,
        args.distillation_tau,
        weigh_cnn=True,
    )


def build_step(
    args: argparse.Namespace, model: LVViT, world: World, amp: str
) -> tuple[nn.Module, Callable[[Any], Mapping[str, Tensor]]]:
    """What runs under the gradient exchange, and the training step around it."""
    if args.token_label_data:
        from sit.token_labeling import DenseNetwork, make_step  # only where a teacher is trained this way

        network = prepare_network(DenseNetwork(model), world, compiled=args.compile)
        side = model.grid[0]
        options = {"smoothing": args.smoothing, "dense_weight": args.dense_weight}
        return network, make_step(network, side, model.num_classes, **options)
    criterion = build_criterion(args, model, amp, world.device)
    network = prepare_network(model, world, compiled=args.compile)
    mixup = build_mixup(args, model.num_classes)
    return network, partial(training_step, network=network, criterion=criterion, mixup=mixup)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.AdamW:
    """AdamW on the published groups, whose order resumes the published files."""
    groups = get_param_groups(model, args.weight_decay)
    make = partial(torch.optim.AdamW, groups, lr=args.lr, eps=args.opt_eps, weight_decay=args.weight_decay)
    return make(betas=tuple(args.opt_betas)) if args.opt_betas else make()

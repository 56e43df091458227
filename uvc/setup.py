"""Student, teacher, primal-dual state and course of stage 1 from flags."""

from __future__ import annotations

import argparse

import torch

from common.losses import DistillationLoss
from common.run.distributed import get_logger
from uvc.engine import JointSettings
from uvc.loading import freeze_idle, load_dense
from uvc.losses import objective
from uvc.models import create
from uvc.models.gates import GatedTransformer, register_masks
from uvc.schedules import zlr_schedule
from uvc.uvc_optimizer import PrimalDual, PrimalDualSettings

logger = get_logger(__name__)


class UsageError(ValueError):
    """Flags that do not go together; the message says what to change."""


def create_named(model_type: str, *, flag: str, **options: object) -> GatedTransformer:
    """A network by its name.

    Raises:
        UsageError: a name that is unknown or refused, with the reason.
    """
    try:
        return create(model_type, **options)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def build_student(args: argparse.Namespace, classes: int, *, load: bool) -> GatedTransformer:
    """The network that is trained, with the weights of ``--model_path`` if ``load``.

    Raises:
        UsageError: no ``--model_path``, or ``--enable_deit`` and the name disagree.
    """
    options: dict[str, object] = {"num_classes": classes}
    if args.img_size:
        options["img_size"] = args.img_size
    model = create_named(args.model_type, flag="--model_type", **options)
    distilled = getattr(model, "dist_token", None) is not None
    if args.enable_deit and not distilled:
        raise UsageError(
            f"--enable_deit 1 is for the *_distilled networks; {args.model_type} has no distillation token"
        )
    if distilled and not args.enable_deit:
        logger.info("%s has a distillation token: taking --enable_deit 1 as given", args.model_type)
    if load:
        if not args.model_path:
            raise UsageError(
                "--model_path is missing: name the checkpoint of the dense network (pretrained for the published one), "
                "or give --pretrained 0 to start from random weights"
            )
        load_dense(model, args.model_path, model_type=args.model_type, new_head=True)
    return model


def build_model(args: argparse.Namespace, classes: int) -> GatedTransformer:
    """The student with its gates, idle parameters frozen, dense weights loaded, masks registered."""
    model = build_student(args, classes, load=args.pretrained)
    gates = model.gates
    gates.block_gating, gates.jumping, gates.eps = args.enable_block_gating, args.enable_jumping, args.eps
    soft = "softmax" if args.model_type.startswith("t2t") else "soft_l0"
    gates.mode = "gumbel" if args.use_gumbel else soft
    if not args.enable_block_gating:
        model.block_skip_gating.requires_grad_(False)
        model.fix_blocks()
    if args.enable_patch_gating == 1:
        model.add_patch_gates()
        gates.patch = "soft"
    if args.enable_patch_gating == 2 and hasattr(model, "add_token_scores"):
        model.add_token_scores()  # pyright: ignore[reportCallIssue] - T2T-ViT's
    register_masks(model)
    freeze_idle(model, token_scores=args.enable_patch_gating == 2)
    return model


def build_primal_dual(args: argparse.Namespace, model: GatedTransformer) -> PrimalDual:
    """The pruning numbers and duals; refuses a budget that cannot be met."""
    same = ("budget", "slr", "rlr", "ylr", "plr", "soptim", "roptim", "sl2wd", "z_grad_clip", "glr")
    more = ("gating_interval", "gating_weight", "patchlr", "patch_weight")
    settings = PrimalDualSettings(
        **{name: getattr(args, name) for name in (*same, *more)},
        zlr=args.zlr_schedule_list[0],
        block_gating=args.enable_block_gating,
        pruning=args.enable_pruning,
        learn_patches=args.enable_patch_gating == 1 and not args.official,
        with_mhsa=args.flops_with_mhsa,
    )
    state = PrimalDual(model, settings, seed=args.seed)
    lowest = state.lowest_ratio()
    if args.budget < lowest:
        raise UsageError(
            f"--budget {args.budget:g} cannot be met: with these flags {lowest:.4f} of the cost is left at the least; "
            "give a larger budget or let more be learned (--enable_block_gating, --enable_pruning)"
        )
    if 1 - args.budget > args.z_grad_clip:
        logger.warning(
            "--budget %g is more than --z_grad_clip %g below the dense cost: while the cost exceeds the budget by more "
            "than the clip, pruning gets no gradient from it (only skipped blocks can bring it down); --z_grad_clip %g "
            "avoids that", args.budget, args.z_grad_clip, 1 - args.budget,
        )  # fmt: skip
    return state


def build_settings(args: argparse.Namespace, steps_per_epoch: int) -> JointSettings:
    """Course of the run from the flags."""
    schedule: dict[int, float] = {0: args.zlr_schedule_list[0]}
    if not args.official:
        schedule = zlr_schedule(args.zlr_schedule_list, args.num_epochs)
    learned = args.enable_patch_gating == 1 and not args.official
    return JointSettings(
        warmup_epochs=args.warmup_epochs if args.enable_warmup or args.official else 0, warmup_lr=args.warmup_lr,
        warmup_reset=args.warmup_reset, zlr_schedule=schedule, eps_decay=args.eps_decay,
        parts=args.gradient_accumulation_steps,
        select_ratio=args.patch_ratio if args.enable_patch_gating == 2 else None,
        total_steps=args.num_epochs * steps_per_epoch, patch_l1_weight=args.patch_l1_weight if learned else 0.0,
        official=args.official, log_interval=args.log_interval,
    )  # fmt: skip


def build_teacher_loss(args: argparse.Namespace, classes: int, device: torch.device) -> DistillationLoss:
    """The loss with its teacher: the dense network in evaluation mode, all blocks running.

    Raises:
        UsageError: distillation without a checkpoint of the teacher.
    """
    teacher = None
    if args.distillation_type != "none" and not args.eval:
        name, source = args.teacher_model or args.model_type, args.teacher_path or args.model_path
        if not source:
            raise UsageError(
                f"--distillation-type {args.distillation_type} needs the teacher's weights: give --teacher-path or "
                "--model_path, or --distillation-type none"
            )
        if "deit" not in name and "t2t" not in name:
            raise UsageError(f"--teacher-model must be a deit or t2t network, got {name!r}")
        options: dict[str, object] = {"num_classes": classes}
        if args.img_size:
            options["img_size"] = args.img_size
        teacher = create_named(name, flag="--teacher-model", **options)
        load_dense(teacher, source, model_type=name)  # a teacher with a new head would teach noise
        teacher.fix_blocks((True,) * len(teacher.blocks))
        teacher.to(device).eval().requires_grad_(False)
    kind = args.distillation_type if teacher is not None else "none"
    return objective(teacher, kind=kind, alpha=args.distillation_alpha, tau=args.distillation_tau)

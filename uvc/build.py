"""Student, teacher and primal-dual state of a run from its settings."""

from __future__ import annotations

from typing import Any

import torch

from common.losses import DistillationLoss
from common.run.errors import UsageError
from common.run.program import get_logger
from uvc.loading import Masked, freeze_idle, freeze_structure, load_dense, load_masked
from uvc.losses import objective
from uvc.models import create
from uvc.models.gates import GatedTransformer, register_masks
from uvc.settings import PrimalDualSettings, Student, Teacher
from uvc.uvc_optimizer import PrimalDual

logger = get_logger(__name__)


def build_student(student: Student, classes: int) -> GatedTransformer:
    """The network of stage 1: dense weights loaded, gates set, idle parameters frozen, masks registered.

    Raises:
        UsageError: ``--enable_deit`` and the name disagree.
    """
    name = student.model_type
    model = create(name, num_classes=classes, img_size=student.img_size)
    distilled = model.dist_token is not None
    if student.enable_deit and not distilled:
        raise UsageError(f"--enable_deit 1 is for the *_distilled networks; {name} has no distillation token")
    if distilled and not student.enable_deit:
        logger.info("%s has a distillation token: taking --enable_deit 1 as given", name)
    if student.pretrained:
        assert student.model_path
        load_dense(model, student.model_path, model_type=name, new_head=True)
    gates = model.gates
    gates.block_gating, gates.jumping, gates.eps = student.enable_block_gating, student.enable_jumping, student.eps
    soft = "softmax" if name.startswith("t2t") else "soft_l0"
    gates.mode = "gumbel" if student.use_gumbel else soft
    if not student.enable_block_gating:
        model.block_skip_gating.requires_grad_(False)
        model.fix_blocks()
    if student.enable_patch_gating == 1:
        model.add_patch_gates()
        gates.patch = "soft"
    selects = student.enable_patch_gating == 2
    if selects:
        model.add_token_scores()
    register_masks(model)
    freeze_idle(model, token_scores=selects)
    return model


def build_primal_dual(model: GatedTransformer, settings: PrimalDualSettings, *, seed: int) -> PrimalDual:
    """The pruning numbers and duals.

    Raises:
        UsageError: a budget that cannot be met.
    """
    state = PrimalDual(model, settings, seed=seed)
    budget, lowest = settings.budget, state.lowest_ratio()
    if budget < lowest:
        raise UsageError(
            f"--budget {budget:g} cannot be met: with these flags {lowest:.4f} of the cost is left at the least; "
            "give a larger budget or let more be learned (--enable_block_gating, --enable_pruning)"
        )
    if 1 - budget > settings.z_grad_clip:
        logger.warning(
            "--budget %g is more than --z_grad_clip %g below the dense cost: while the cost exceeds the budget by more "
            "than the clip, pruning gets no gradient from it (only skipped blocks can bring it down); --z_grad_clip %g "
            "avoids that", budget, settings.z_grad_clip, 1 - budget,
        )  # fmt: skip
    return state


def build_objective(
    teacher: Teacher | None, classes: int, device: torch.device, *, img_size: int | None
) -> DistillationLoss:
    """The loss with its teacher: the dense network in evaluation mode, all blocks running.

    Args:
        teacher: None for none.
        classes, img_size: of the student.
        device: where the teacher goes.
    """
    if teacher is None or teacher.distillation_type == "none":
        return objective(None)
    name, kind = teacher.model_type, teacher.distillation_type
    assert teacher.source
    network = create(name, num_classes=classes, img_size=img_size)
    load_dense(network, teacher.source, model_type=name)  # a teacher with a new head would teach noise
    network.fix_blocks((True,) * len(network.blocks))
    network.to(device).eval().requires_grad_(False)
    return objective(network, kind=kind, alpha=teacher.distillation_alpha, tau=teacher.distillation_tau)


def load_network(file: str, model_type: str | None, *, img_size: int | None, **options: Any) -> Masked:
    """The masked network of stage 2, its structure frozen.

    Args:
        file: of stage 1 or 2, see ``load_masked``, which gets ``options``.
        model_type: None takes what the file says.
        img_size: side that was asked for, which must be the file's.

    Raises:
        UsageError: another size.
    """
    masked = load_masked(file, model_type or "", **options)
    model = masked.model
    if img_size not in (None, model.image_size[0]):
        raise UsageError(f"--img_size {img_size}: the file's network takes {model.image_size[0]} pixels")
    freeze_structure(model)
    masks = (mask for name, mask in model.named_buffers() if name.endswith("mask"))
    if all(model.runs()) and all(bool(mask.all()) for mask in masks):
        logger.warning("%s: no weight is masked and every block runs: this is the dense network", file)
    return masked

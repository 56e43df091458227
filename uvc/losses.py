"""Objective of both stages: labels, distillation from the dense network, and a penalty on patch gates.

UVC, arXiv:2203.08243.
"""

from __future__ import annotations

from torch import Tensor, nn

from common.losses import DistillationLoss, label_criterion


def objective(
    teacher: nn.Module | None, *, kind: str = "none", alpha: float = 0.5, tau: float = 1.0
) -> DistillationLoss:
    """(1 - alpha) CE + alpha KD, with targets as class probabilities (B, C).

    Args:
        teacher: the dense network in evaluation mode, gives logits (B, C); None with kind ``none``.
        kind: ``none``, ``soft`` (KL divergence at temperature tau, divided by batch and classes) or ``hard``.
        alpha: weight of the distillation, from 0 to 1.

    Source: arXiv:2203.08243, objective of problem (5): (1 - alpha) CE + alpha KD; Figure 1 (3): distillation.
    """
    return DistillationLoss(label_criterion(mixed=True), teacher, kind, alpha, tau)


def patch_penalty(patch_gating: Tensor, weight: float) -> Tensor:
    """``weight`` times the sum of the patch gates, (): what ``--patch_l1_weight`` adds to the loss."""
    return weight * patch_gating.sigmoid().sum()

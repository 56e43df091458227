"""One training step of DVT, and its evaluation: all exits at once.

Paper: arXiv:2105.15075, Section 3.1: the exits are trained together, their losses unweighted; nothing is detached, so
the gradients of later exits reach earlier stages through both reuses.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def exit_logits(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits of all exits, each (B, C), of what a network returned; a network alone has one exit."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def summed_loss(
    criterion: Callable[[Tensor, Tensor], Tensor], logits: Iterable[Tensor], targets: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Sum of the exits' losses, each with weight one, and the single losses.

    Args:
        criterion: of logits (B, C) and targets, (B,) or soft (B, C).
        logits: of each exit, (B, C).

    Source: arXiv:2105.15075, Section 3.1: minimise L_1 + L_2 + L_3.
    """
    losses = [criterion(answers, targets) for answers in logits]
    return torch.stack(losses).sum(), losses


def build_criterion(mixup: bool, smoothing: float) -> nn.Module:
    """Soft-target cross entropy under mixup, whose targets are smoothed already; else cross entropy with smoothing."""
    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def cascade_step(
    batch: tuple[Tensor, Tensor], *, network: nn.Module, criterion: nn.Module, mixup: Mixup | None = None
) -> dict[str, Tensor]:
    """Loss of images (B, 3, height, width) with targets (B,): ``loss``, and ``exit1_loss``, ... of a cascade."""
    images, targets = batch if mixup is None else mixup(*batch)
    loss, losses = summed_loss(criterion, exit_logits(network(images)), targets)
    if len(losses) == 1:
        return {"loss": loss}
    return {"loss": loss, **{f"exit{number}_loss": value.detach() for number, value in enumerate(losses, 1)}}

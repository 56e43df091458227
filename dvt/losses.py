"""Loss of a cascade: all exits at once.

Paper: arXiv:2105.15075, Section 3.1: the exits are trained together, their losses unweighted; nothing is detached, so
the gradients of later exits reach earlier stages through both reuses.

Letters: B images, C classes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from timm.loss.jsd import JsdCrossEntropy
from torch import Tensor, nn

from common.losses import label_criterion


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

    Source: arXiv:2105.15075, Section 3.1, Eq. 1: the sum over exits i of CE(p_i, y), its mean minimised.
    """
    losses = [criterion(answers, targets) for answers in logits]
    return torch.stack(losses).sum(), losses


def build_criterion(mixup: bool, smoothing: float, *, jsd_views: int = 0) -> nn.Module:
    """Loss of an exit, see ``common.losses.label_criterion``.

    Args:
        jsd_views: with it, cross entropy of the first of so many views, plus their Jensen-Shannon divergence.
    """
    if jsd_views:
        return JsdCrossEntropy(jsd_views, smoothing=smoothing)
    return label_criterion(mixed=mixup, smoothing=smoothing)

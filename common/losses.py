"""What the papers train with: the loss on labels, DeiT's distillation, and the divergence that it is made of.

Letters: B batch, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from common.run.errors import UsageError

DISTILLATION_TYPES = ("none", "soft", "hard")
"""How an external teacher supervises: not at all, by its distribution, by its choice."""


def label_criterion(*, mixed: bool, smoothing: float = 0.0) -> nn.Module:
    """DeiT's loss of logits (B, C) on labels: cross entropy, mean over the batch.

    Args:
        mixed: targets are class probabilities (B, C) of mixed images, smoothed already; else labels (B,).
        smoothing: probability that is spread over all classes.

    Raises:
        UsageError: nothing of the labels would be left.
    """
    if not 0 <= smoothing < 1:
        raise UsageError(f"--smoothing must be from 0 to below 1, got {smoothing:g}")
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def divergence(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of softened class probabilities: summed over classes, mean over the batch.

    Args:
        student, teacher: logits (B, C).
        tau: temperature.

    Source: Distilling the Knowledge in a Neural Network, arXiv:1503.02531; the factor keeps the size of the gradient.
    """
    own, other = (F.log_softmax(logits / tau, dim=1) for logits in (student, teacher))
    return F.kl_div(own, other, reduction="batchmean", log_target=True) * tau**2


def distillation_term(student: Tensor, teacher: Tensor, kind: str, tau: float = 1.0) -> Tensor:
    """What the distillation head learns from a teacher, a scalar.

    Args:
        student, teacher: logits (B, C); give the teacher's without gradient.
        kind: ``soft``: :func:`divergence` averaged over classes, too, as DeiT's code does (a thousandth of the usual
            batch mean with 1000 classes); ``hard``: cross entropy with the teacher's choice.

    Source: DeiT, arXiv:2012.12877, Eq. 2 (soft) and Eq. 3 (hard).
    """
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    return divergence(student, teacher, tau) / student.shape[1]


class DistillationLoss(nn.Module):
    """(1 - alpha) labels for the class head + alpha teacher for the distillation head.

    Args:
        base: criterion of the class head, called with (logits, targets).
        teacher: gives logits (B, C) of images, in evaluation mode; None only for kind ``none``. It is no submodule:
            neither ``train()`` nor a state dict reaches it.
        kind: one of ``DISTILLATION_TYPES``, see :func:`distillation_term`.
        alpha, tau: weight of the teacher's term, and temperature of ``soft``.

    Raises:
        ValueError: an unknown kind, no teacher where one is needed, or a number out of range.

    Source: DeiT, arXiv:2012.12877, Eqs. 2 and 3.
    """

    def __init__(
        self,
        base: Callable[[Tensor, Tensor], Tensor],
        teacher: Callable[[Tensor], Tensor] | None = None,
        kind: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in DISTILLATION_TYPES:
            raise ValueError(f"--distillation-type must be one of {', '.join(DISTILLATION_TYPES)}, got {kind!r}")
        if kind != "none" and teacher is None:
            raise ValueError(f"--distillation-type {kind} needs a teacher")
        if not 0 <= alpha <= 1:
            raise ValueError(f"--distillation-alpha must be from 0 to 1, got {alpha}")
        if not tau > 0:
            raise ValueError(f"--distillation-tau must be positive, got {tau}")
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        self._teacher = (teacher,)  # a tuple, so that it is not registered

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor | None:
        """Logits of the teacher (B, C), None where it is not asked."""
        (teacher,) = self._teacher
        return None if self.kind == "none" or teacher is None else teacher(images)

    def terms(self, logits: Tensor, distilled: Tensor, targets: Tensor, taught: Tensor | None) -> dict[str, Tensor]:
        """``loss``, and with a teacher its two parts before they are weighted, ``base`` and ``distillation``.

        Args:
            logits: of the class head, (B, C).
            distilled: logits that learn from the teacher, (B, C); the same tensor without a head for it.
            targets: (B,) or (B, C), whatever ``base`` takes.
            taught: of :meth:`teach`.
        """
        base = self.base(logits, targets)
        if taught is None:
            return {"loss": base}
        term = distillation_term(distilled, taught, self.kind, self.tau)
        return {"loss": (1 - self.alpha) * base + self.alpha * term, "base": base, "distillation": term}

    def forward(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            images: (B, 3, height, width), for the teacher.
            outputs: logits (B, C), or the pair of a distilled network.

        Raises:
            ValueError: distillation of a network with one head.
        """
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, None)
        if distilled is None and self.kind != "none":
            raise ValueError(
                "distillation needs a network with a distillation head, a *_distilled_* model in training mode; "
                "this one gives a single output"
            )
        return self.terms(logits, logits if distilled is None else distilled, targets, self.teach(images))["loss"]

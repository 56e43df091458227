"""Training loss of both stages: soft-target cross-entropy blended with distillation from the dense network.

*Unified Visual Transformer Compression*, ICLR 2022: CE (1 - alpha) + alpha KD.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTILLATION_TYPES = ("none", "soft", "hard")


class DistillationLoss:
    """(1 - alpha) cross-entropy + alpha distillation.

    ``soft`` is the KL divergence of student from teacher at temperature tau, times tau^2, averaged over batch and
    classes alike: with 1000 classes a thousandth of the usual batch mean. ``hard`` is cross-entropy against the
    teacher's choice.

    Args:
        teacher: gives class logits (B, C); None with type ``none``. Put in evaluation mode by the caller.
        kind: ``none``, ``soft`` or ``hard``.
        alpha: weight of the distillation, from 0 to 1.
        tau: temperature of ``soft``.

    Raises:
        ValueError: an unknown kind, no teacher where one is needed, or a number out of range.
    """

    def __init__(self, teacher: nn.Module | None, *, kind: str = "none", alpha: float = 0.5, tau: float = 1.0) -> None:
        if kind not in DISTILLATION_TYPES:
            raise ValueError(f"--distillation-type must be one of {', '.join(DISTILLATION_TYPES)}, got {kind!r}")
        if kind != "none" and teacher is None:
            raise ValueError(f"--distillation-type {kind} needs a teacher")
        if not 0 <= alpha <= 1:
            raise ValueError(f"--distillation-alpha must be from 0 to 1, got {alpha}")
        if not tau > 0:
            raise ValueError(f"--distillation-tau must be positive, got {tau}")
        self.teacher, self.kind, self.alpha, self.tau = teacher, kind, alpha, tau

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor | None:
        """Logits of the teacher (B, C), None without one."""
        return None if self.kind == "none" or self.teacher is None else self.teacher(images)

    def __call__(self, outputs: Tensor, distilled: Tensor, targets: Tensor, taught: Tensor | None) -> dict[str, Tensor]:
        """Loss terms by name.

        Args:
            outputs: logits of the class token, (B, C).
            distilled: logits that learn from the teacher, (B, C); the same tensor without a distillation token.
            targets: class probabilities (B, C).
            taught: the teacher's logits (B, C), or None.
        """
        base = soft_cross_entropy(outputs, targets)
        if taught is None:
            return {"loss": base}
        if self.kind == "soft":
            student = (distilled / self.tau).log_softmax(1)
            teacher = (taught / self.tau).log_softmax(1)
            total = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2
            term = total / distilled.numel()
        else:
            term = F.cross_entropy(distilled, taught.argmax(1))
        return {"loss": (1 - self.alpha) * base + self.alpha * term, "base": base, "distillation": term}


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against probabilities (B, C), mean over the batch."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()

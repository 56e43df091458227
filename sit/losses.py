"""Feature recalibration distillation (FRD): the loss of SiT's training.

Paper: Self-slimmed Vision Transformer, arXiv:2111.12624; an earlier version calls it dense knowledge distillation.

Letters: B batch, N tokens of the unslimmed network, C width, K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import distillation_term, divergence
from common.run.wrapping import within
from sit.sizes import TYPES

Teacher = Callable[[Tensor], object]


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over all L blocks of the mean squared error between recovered and teacher tokens.

    Args:
        student, teacher: L tensors (B, N, C); the student's are recovered by the reverse modules, and are its own
            tokens before the first slimming.

    Raises:
        ValueError: if the shapes differ.

    Source: SiT, arXiv:2111.12624, feature recalibration distillation (FRD): token loss, 1/L sum_l mean((X'_l - T_l)^2).
    """
    if len(student) != len(teacher):
        raise ValueError(f"the student has tokens of {len(student)} blocks, the teacher of {len(teacher)}")
    for index, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own.shape != other.shape:
            raise ValueError(
                f"after block {index + 1} the student has tokens {tuple(own.shape)}, the teacher {tuple(other.shape)}: "
                "the teacher must be the same network without slimming (--teacher-model)"
            )
    terms = [F.mse_loss(own, other) for own, other in zip(student, teacher, strict=True)]
    return torch.stack(terms).mean()


class Losses(NamedTuple):
    """Total and its weighted terms, scalars."""

    loss: Tensor
    cls: Tensor
    token: Tensor
    logits: Tensor
    cnn: Tensor

    def terms(self) -> dict[str, Tensor]:
        """By the names of the record: ``loss``, ``loss_cls``, ``loss_token``, ``loss_logits``, ``loss_cnn``."""
        return {"loss": self.loss, **{f"loss_{name}": getattr(self, name) for name in self._fields[1:]}}


class DistillationLoss(nn.Module):
    """Cross entropy + token loss + logit loss (``common.losses.divergence``) + cross entropy to a CNN's decision.

    The teachers run once per batch, without gradient, in evaluation mode, under the caller's autocast, and only as far
    as a weight that is not zero asks for. They are no submodules: neither ``train()`` nor a state dict reaches them.

    Args:
        base_criterion: loss of class logits and labels.
        teacher_model: the same network without slimming, from images to (logits, L tokens); not needed for ``none``.
        cnn_teacher: from images to logits, or None.
        distillation_type: ``none`` or ``frd``.
        lambda_token, lambda_logits, lambda_cnn, tau: weights, and temperature of the logit loss.
        weigh_cnn: multiply the last term by ``lambda_cnn``. The published code stores that weight without using it,
            which is the default here; ``main.py`` uses it.

    Raises:
        ValueError: for an unknown type, a missing teacher, or a temperature that is not positive.
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        teacher_model: Teacher | None,
        cnn_teacher: Callable[[Tensor], Tensor] | None,
        distillation_type: str,
        lambda_token: float,
        lambda_logits: float,
        lambda_cnn: float,
        tau: float,
        *,
        weigh_cnn: bool = False,
    ) -> None:
        super().__init__()
        if distillation_type not in TYPES:
            raise ValueError(f"--distillation-type must be one of {', '.join(TYPES)}, got {distillation_type!r}")
        if distillation_type == "frd" and teacher_model is None and (lambda_token or lambda_logits):
            raise ValueError("feature recalibration distillation needs a teacher: --teacher-path FILE")
        if not tau > 0:
            raise ValueError(f"--distillation-tau must be positive, got {tau}")
        self.base_criterion = base_criterion
        self.distillation_type = distillation_type
        self.lambda_token, self.lambda_logits = lambda_token, lambda_logits
        self.lambda_cnn = lambda_cnn if weigh_cnn else 1.0
        self.tau = tau
        self._teachers = (teacher_model, cnn_teacher)  # a tuple, so that they are not registered

    @torch.no_grad()
    def ask_teacher(self, inputs: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The teacher's logits (B, K) and L tokens (B, N, C), each only if its loss has a weight."""
        teacher = self._teachers[0]
        if not (self.lambda_token or self.lambda_logits):
            return None, ()
        if hasattr(teacher, "forward_parts"):
            wanted = {"logits": bool(self.lambda_logits), "tokens": bool(self.lambda_token)}
            return within(teacher, teacher.forward_parts, inputs, **wanted)  # pyright: ignore
        logits, *_, tokens = teacher(inputs)  # pyright: ignore[reportOptionalCall, reportGeneralTypeIssues]
        return logits, tokens

    def forward(self, inputs: Tensor, outputs: tuple[Tensor, Tensor, Sequence[Tensor]], labels: Tensor) -> Losses:
        """Losses of a batch.

        Args:
            inputs: the images that the student saw, (B, 3, height, width).
            outputs: what it returned in training mode: class logits, distillation logits, recovered tokens.
            labels: whatever the base criterion takes.

        Source: SiT, arXiv:2111.12624, feature recalibration distillation (FRD): total loss, CE + lambda_token token
        loss + lambda_logits tau^2 KL(teacher || student).
        """
        logits, distilled, tokens = outputs
        base = self.base_criterion(logits, labels)
        zero = torch.zeros((), dtype=base.dtype, device=base.device)
        if self.distillation_type == "none":
            return Losses(base, base, zero, zero, zero)
        teacher_logits, teacher_tokens = self.ask_teacher(inputs)
        token = self.lambda_token * token_loss(tokens, teacher_tokens) if self.lambda_token else zero
        soft = zero
        if self.lambda_logits:
            assert teacher_logits is not None
            soft = self.lambda_logits * divergence(logits, teacher_logits, self.tau)
        cnn = zero
        if (cnn_teacher := self._teachers[1]) is not None:
            with torch.no_grad():
                taught = cnn_teacher(inputs)
            cnn = self.lambda_cnn * distillation_term(distilled, taught, "hard")
        return Losses(base + token + soft + cnn, base, token, soft, cnn)

"""The losses of a step: DeiT's for the full width, transfer from wider to narrower, and their combination per width.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786. With z_r the logits at width r, sg the stop of
gradients, y the targets and c ``ce_coefficient``::

    loss of the largest width   = DeiT's, with or without an external teacher
    loss of a slim width w      = KL(sg softmax z_t || softmax z_w) + c CE(z_w, y)     t: the width that teaches w

A :class:`WidthLosses` says both to the step (``engine_scala.py``); another set of losses for the same four passes is
another class with its two methods.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import divergence
from scala.arguments import CE_TYPES, TRANSFER_KINDS


def transfer_loss(student: Tensor, teacher: Tensor, kind: str = "soft") -> Tensor:
    """Progressive knowledge transfer from a wider pass to a narrower one.

    Args:
        student, teacher: logits (B, C); no gradient reaches the teacher.
        kind: ``soft``: sum over classes of KL(teacher || student), mean over the batch, temperature 1; ``hard``: cross
            entropy with the teacher's prediction.

    Source: arXiv:2412.04786, Section 4.3 (Progressive Knowledge Transfer), Eq. 5: KL(p^r' || p^r). In print between
    distillation heads; here ``--token_type`` says which.
    """
    if kind not in TRANSFER_KINDS:
        raise ValueError(f"the kind of transfer must be one of {', '.join(TRANSFER_KINDS)}, got {kind!r}")
    teacher = teacher.detach()
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    return divergence(student, teacher)


def cosub_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cooperative training of two random sub-networks (stochastic depth) of one batch, DeiT III's cosub.

    Args:
        logits: (2 B, C): the batch passed twice, with different blocks dropped.
        targets: (2 B, C), multi-hot or soft, repeated likewise.

    Source: DeiT III's co-sub training, arXiv:2212.04884. The official code of Scala stops with an error here.
    """
    (one, two), (y, _) = logits.chunk(2), targets.chunk(2)
    terms = (
        F.binary_cross_entropy_with_logits(one, y),
        F.binary_cross_entropy_with_logits(two, y),
        F.binary_cross_entropy_with_logits(one, two.detach().sigmoid()),
        F.binary_cross_entropy_with_logits(two, one.detach().sigmoid()),
    )
    return torch.stack(terms).mean()


class CosubLoss(nn.Module):
    """:func:`cosub_loss` of the class head, with the signature of ``common.losses.DistillationLoss``."""

    def forward(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        del images
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])
        return cosub_loss(logits, targets.to(logits.dtype))


class WidthLosses(Protocol):
    """The losses of the four passes of a step; outputs are whatever the network returned."""

    def full(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        """Loss of the largest width, a scalar."""
        ...

    def slim(self, outputs: Any, teacher: Any, largest: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Transfer and cross-entropy term of a slim width, scalars, taught by ``teacher`` (no gradient)."""
        ...


@dataclass(frozen=True)
class ScalaLosses:
    """The paper's losses on logits.

    Args:
        criterion: of the largest width, called with (images, outputs, targets).
        kind: of the transfer, see :func:`transfer_loss`.
        token: head of a distilled network that carries the transfer, 0 class and 1 distillation.
        ce_coefficient: weight c of the cross entropy, noisy calibration.
        ce_type: its targets, see ``CE_TYPES``.

    Source: arXiv:2412.04786, Section 4.3.
    """

    criterion: nn.Module
    kind: str = "soft"
    token: int = 0
    ce_coefficient: float = 1.0
    ce_type: str = "one_hot"

    def __post_init__(self) -> None:
        if self.kind not in TRANSFER_KINDS:
            raise ValueError(f"--distill_type must be one of {', '.join(TRANSFER_KINDS)}, got {self.kind!r}")
        if self.ce_type not in CE_TYPES:
            raise ValueError(f"--ce_type must be one of {', '.join(CE_TYPES)}, got {self.ce_type!r}")

    def full(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        return self.criterion(images, outputs, targets)

    def slim(self, outputs: Any, teacher: Any, largest: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy is that of the class head, whichever head carries the transfer.

        Source: arXiv:2412.04786, Section 4.3 (Noise Calibration), Eq. 9: CE of the class head with the labels; Eq. 10:
        their sum. In print the transfer has a weight, here the cross entropy has; both are 1.
        """
        student, taught = (z[self.token] if isinstance(z, tuple) else z for z in (outputs, teacher))
        logits, full = (z[0] if isinstance(z, tuple) else z for z in (outputs, largest))
        if self.ce_type == "teacher":
            targets = full.detach().argmax(dim=1)
        ce = self.ce_coefficient * F.cross_entropy(logits, targets)
        return transfer_loss(student, taught, self.kind), ce

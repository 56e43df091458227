"""One training step of DVT, and its evaluation: all exits at once.

Letters: B images, C classes, K exits.
"""

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from common.run.checkpoint import Progress
from common.run.engine import check_labels
from common.run.launch import broadcast_buffers, reduce_sums
from common.run.metrics import ProgressLine
from common.run.precision import autocast
from common.run.wrapping import gathered, unwrap
from dvt.losses import exit_logits, summed_loss
from dvt.models.cascade import Exits


@dataclass
class CascadeStep:
    """Loss of a batch: mixup, then random erasing, then all exits."""

    network: nn.Module  # gives logits, or those of all exits
    criterion: nn.Module  # loss of one exit
    progress: Progress = field(default_factory=Progress)  # of the run, which says what epoch it is
    mixup: Mixup | None = None
    mixup_epochs: int = 0  # epochs with mixup; 0 for all. Behind them targets are only smoothed
    erasing: RandomErasing | None = None  # of a mixed batch, in place

    def __call__(self, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        """``loss`` and, with several exits, ``exit1_loss``, ...

        Args:
            batch: images (B, 3, height, width), or a list of views of that shape, and targets (B,).
        """
        images, targets = batch
        if not isinstance(images, Tensor):  # views, one after the other
            targets = targets.repeat(len(images))
            images = torch.cat(list(images))
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.mixup_epochs or self.progress.epoch < self.mixup_epochs
            images, targets = self.mixup(images, targets)
        if self.erasing is not None:
            images = self.erasing(images)
        loss, losses = summed_loss(self.criterion, exit_logits(self.network(images)), targets)
        if len(losses) == 1:
            return {"loss": loss}
        return {"loss": loss, **{f"exit{number}_loss": value.detach() for number, value in enumerate(losses, 1)}}


@torch.no_grad()
def run_exits(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: str = "none",
    title: str,
    show: bool = True,
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Logits of all exits, each (B, C), and targets, batch after batch of (images, targets), on ``device``.

    Args:
        model: put in evaluation mode, and back at the end.
        amp: value of ``--amp``.
        title, show: of the progress line.
    """
    was_training = model.training
    model.eval()
    try:
        length = len(loader) if isinstance(loader, Sized) else None
        with gathered(model), ProgressLine(title, length, show=show) as line:
            for images, targets in loader:
                with autocast(amp, device):
                    answers = exit_logits(model(images.to(device, non_blocking=True)))
                check_labels(targets, answers[0].shape[1])
                yield answers, targets.to(device, non_blocking=True)
                line.update(len(targets))
    finally:
        model.train(was_training)


def evaluate_exits(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: str = "none",
    title: str = "test",
    show_progress: bool = True,
) -> dict[str, float]:
    """Accuracy of every exit over the images of all ranks, each image counted once.

    Args:
        model: its buffers become those of rank 0.
        loader: of this rank's share; an attribute ``skipped`` counts undecodable images.
        device, amp, title, show_progress: as in :func:`run_exits`; logits are compared in float32.

    Returns:
        ``loss`` (cross entropy of the last exit), ``exit1_top1``, ... and ``exit<K>_top5`` in percent (of as many
        classes as there are, with fewer than five), ``images``, ``skipped``; the same on every rank.

    Raises:
        ValueError: no image at all, a label that the model has no class for, or logits that are not numbers.
    """
    model = unwrap(model)
    broadcast_buffers(model)
    exits = len(model.stages) if isinstance(model, Exits) else 1
    names = ["loss", *(f"exit{number}_top1" for number in range(1, exits + 1)), f"exit{exits}_top5", "images"]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for answers, targets in run_exits(model, loader, device=device, amp=amp, title=title, show=show_progress):
        last = answers[-1].float()
        hits = [(logits.float().argmax(dim=1) == targets).sum().double() for logits in answers]
        five = (last.topk(min(5, last.shape[1]), dim=1).indices == targets[:, None]).sum().double()
        loss = F.cross_entropy(last, targets, reduction="sum").double()
        sums += torch.stack([loss, *hits, five, torch.full_like(loss, len(targets))])
    total = reduce_sums(dict(zip(names, sums.tolist(), strict=True)) | {"skipped": getattr(loader, "skipped", 0)})
    count, skipped = int(total.pop("images")), int(total.pop("skipped"))
    if count == 0:
        raise ValueError(f"no image to evaluate ({skipped} skipped as undecodable); check the dataset")
    if math.isnan(total["loss"]):
        raise ValueError("the model gives logits that are not numbers: damaged weights, or an overflow under --amp")
    means = {name: (1 if name == "loss" else 100) * value / count for name, value in total.items()}
    return {**means, "images": count, "skipped": skipped}

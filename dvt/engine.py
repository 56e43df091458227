"""One training step of DVT, and its evaluation: all exits at once.

Letters: B images, C classes, K exits.
"""

import math
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from common.run.checkpoint import Progress
from common.run.engine import autocast
from common.run.launch import broadcast_buffers, reduce_sums
from common.run.metrics import ProgressLine
from common.run.wrapping import unwrap
from dvt.losses import exit_logits, summed_loss
from dvt.models import EXITS
from dvt.models.cascade import Cascade


class CascadeStep:
    """Loss of a batch: mixup, then random erasing, then all exits.

    Args:
        network: called with images; gives logits, or those of all exits.
        criterion: loss of one exit.
        mixup: None for none.
        mixup_epochs: epochs with mixup; 0 for all. Behind them targets are only smoothed.
        erasing: of a mixed batch, in place.
        progress: of the run, which says what epoch it is.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: nn.Module,
        *,
        mixup: Mixup | None = None,
        mixup_epochs: int = 0,
        erasing: RandomErasing | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.network, self.criterion = network, criterion
        self.mixup, self.mixup_epochs, self.erasing = mixup, mixup_epochs, erasing
        self.progress = Progress() if progress is None else progress

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
        model: put in evaluation mode, and back afterwards.
        loader: (images, targets) of this rank's share; an attribute ``skipped`` counts undecodable images.
        amp: value of ``--amp``; logits are compared in float32.

    Returns:
        ``loss`` (cross entropy of the last exit), ``exit1_top1``, ... and ``exit<K>_top5`` in percent (of as many
        classes as there are, with fewer than five), ``images``, ``skipped``; the same on every rank.

    Raises:
        ValueError: no image at all, a label that the model has no class for, or logits that are not numbers.
    """
    model = unwrap(model)
    broadcast_buffers(model)
    was_training = model.training
    model.eval()
    exits = count_exits(model)
    sums = torch.zeros(exits + 2, dtype=torch.float64, device=device)
    images_seen = 0
    try:
        length = len(loader) if isinstance(loader, Sized) else None
        with ProgressLine(title, length, show=show_progress) as line:
            for images, targets in loader:
                with autocast(amp, device):
                    answers = exit_logits(model(images.to(device, non_blocking=True)))
                check_labels(targets, answers[0].shape[1])
                sums += _batch_sums(answers, targets.to(device, non_blocking=True))
                images_seen += len(targets)
                line.update(len(targets))
    finally:
        model.train(was_training)
    names = ["loss", *(f"exit{number}_top1" for number in range(1, exits + 1)), f"exit{exits}_top5"]
    total = reduce_sums(
        dict(zip(names, sums.tolist(), strict=True)) | {"images": images_seen, "skipped": getattr(loader, "skipped", 0)}
    )
    count = total["images"]
    if count == 0:
        raise ValueError(f"no image to evaluate ({total['skipped']:.0f} skipped as undecodable); check the dataset")
    if math.isnan(total["loss"]):
        raise ValueError("the model gives logits that are not numbers: damaged weights, or an overflow under --amp")
    result = {name: (1 if name == "loss" else 100) * total[name] / count for name in names}
    return {**result, "images": int(count), "skipped": int(total["skipped"])}


def count_exits(model: nn.Module) -> int:
    """Exits of a network, whatever it is wrapped in."""
    return EXITS if isinstance(unwrap(model), Cascade) else 1


def check_labels(targets: Tensor, classes: int) -> None:
    """Refuse labels that the network has no class for; on the CPU, where the loader leaves them."""
    if not targets.is_cuda and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(
            f"the data has label {int(targets.max())}, the network only {classes} classes: check --num-classes and "
            "that the checkpoint belongs to this data set"
        )


def _batch_sums(answers: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Summed loss of the last exit, hits of each exit, hits among five of the last one; (K+2,) in float64."""
    last = answers[-1].float()
    hits = [(logits.float().argmax(dim=1) == targets).sum().double() for logits in answers]
    ranked = last.topk(min(5, last.shape[1]), dim=1).indices
    five = (ranked == targets[:, None]).sum().double()
    return torch.stack([F.cross_entropy(last, targets, reduction="sum").double(), *hits, five])

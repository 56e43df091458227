"""One step of scale coordination, the learning-rate schedule, and evaluation at any width.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786. A step passes one batch through four widths, each
in training mode with its own drop-path masks, and updates once with the sum of their gradients::

    largest l  ->  w3 from the upper half  ->  w2 from the lower half  ->  smallest s

The loop around it is ``common.run.engine``'s. Legend: t epoch of the schedule.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from common.run.engine import Optimization, evaluate, evaluate_all
from common.run.wrapping import unwrap
from scala.arguments import TRANSFER_TYPES, CosineSettings
from scala.losses import WidthLosses
from scala.slicing import WidthGrid

EARLY_EPOCHS, EARLY_DIVISOR = 10, 2.0
"""Below so many epochs of the schedule the rate is divided."""
SLIM_PASSES = ("3q", "2q", "1q")
"""Names of the slim passes in the record: upper middle, lower middle, smallest."""


def draw_widths(grid: WidthGrid) -> tuple[float, float]:
    """One width of the upper half, then one of the lower, from Python's global generator.

    Returns:
        w3 and w2, which are never far apart. Two draws, in this order, as the published sequence has them.

    Source: arXiv:2412.04786, Section 4.3 (Stable Sampling), Eq. 8: m = m~ eps, m~ uniform on each half.
    """
    upper = random.randint(*grid.upper_steps)
    lower = random.randint(*grid.lower_steps)
    return upper * grid.granularity, lower * grid.granularity


@dataclass
class ScaleCoordination:
    """The training step, for ``common.run.engine.train(..., own_backward=True)``.

    Args:
        network: called with (images, ratio); under DistributedDataParallel if there are several ranks.
        losses: of the largest and of the slim widths.
        grid: the widths trained.
        epoch: the running epoch, counted from 0.
        full_warm_epoch: epochs below it train the largest width alone, without a draw.
        transfer_type: one of ``TRANSFER_TYPES``.
        augment: mixup on the batch, or None.
        multi_hot: targets become 1 wherever they are above 0 (``--bce-loss``).
        twice: pass the batch twice, for losses that compare two sub-networks (``--cosub``).

    Source: arXiv:2412.04786, Section 4.1: the sandwich rule, gradients of four widths summed.

    Gradients are exchanged between the ranks in the last pass only: the mean over ranks of the per-rank sums, at a
    quarter of the traffic. Every rank draws its own widths.
    """

    network: nn.Module
    losses: WidthLosses
    grid: WidthGrid
    epoch: Callable[[], int]
    full_warm_epoch: int = 10
    transfer_type: str = "progressive"
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    multi_hot: bool = False
    twice: bool = False

    def __post_init__(self) -> None:
        if self.transfer_type not in TRANSFER_TYPES:
            raise ValueError(f"--transfer_type must be one of {', '.join(TRANSFER_TYPES)}, got {self.transfer_type!r}")

    def __call__(self, batch: tuple[Tensor, Tensor], optimization: Optimization) -> dict[str, Tensor]:
        """Add the gradients of all passes.

        Returns:
            ``loss``, the sum over the passes; ``loss_full`` and, per slim pass, ``loss_3q`` and the part of it that is
            cross entropy, ``loss_3q_ce``, and so on: the names of the published log.

        Source: arXiv:2412.04786, Section 4.3 (Progressive Knowledge Transfer), Eq. 5: the order of the passes, each
        taught by the next larger width.
        """
        images, targets = self.prepare(*batch)
        warming = self.epoch() < self.full_warm_epoch
        with contextlib.nullcontext() if warming else optimization.no_sync():
            largest = self.network(images, self.grid.largest)
            loss = self.losses.full(images, largest, targets)
            optimization.backward(loss)
        terms = {"loss_full": loss.detach()}
        largest = _detach(largest)
        terms |= dict.fromkeys((f"loss_{name}{ce}" for name in SLIM_PASSES for ce in ("", "_ce")), loss.new_zeros(()))
        if not warming:
            widths = (*draw_widths(self.grid), self.grid.smallest)
            teacher = largest
            for name, width in zip(SLIM_PASSES, widths, strict=True):
                last = name == SLIM_PASSES[-1]
                with contextlib.nullcontext() if last else optimization.no_sync():
                    outputs = self.network(images, width)
                    transfer, ce = self.losses.slim(outputs, teacher, largest, targets)
                    loss = transfer + ce
                    optimization.backward(loss)
                terms |= {f"loss_{name}": loss.detach(), f"loss_{name}_ce": ce.detach()}
                if self.transfer_type == "progressive":
                    teacher = _detach(outputs)
        total = torch.stack([terms["loss_full"], *(terms[f"loss_{name}"] for name in SLIM_PASSES)]).sum()
        return {"loss": total, **terms}

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch that all passes see: mixed, doubled for cosub, with multi-hot targets for BCE."""
        if self.augment is not None:
            images, targets = self.augment(images, targets)
        if self.multi_hot:
            classes: Any = unwrap(self.network).num_classes
            targets = to_multi_hot(targets, classes)
        if self.twice:
            images, targets = images.repeat(2, 1, 1, 1), targets.repeat(2, *[1] * (targets.ndim - 1))
        return images, targets


def to_multi_hot(targets: Tensor, classes: int) -> Tensor:
    """1 wherever a target is above 0: of soft targets (B, C), or of labels (B,)."""
    if targets.ndim == 1:
        return F.one_hot(targets, classes).to(torch.get_default_dtype())
    return (targets > 0).to(targets.dtype)


def _detach(outputs: Any) -> Any:
    return tuple(part.detach() for part in outputs) if isinstance(outputs, tuple) else outputs.detach()


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


class LaggingSchedule(CosineLRScheduler):
    """timm's cosine f(t), which the warm-up does not shift, with two turns of the published runs.

    f(t) is divided below epoch ``EARLY_EPOCHS``, as by the official scheduler whatever the flags are. And the official
    loop advances the schedule by the epoch that has just run: epoch 0 has the warm-up rate, undivided (the peak without
    warm-up), and epoch e > 0 has f(e - 1).

    Args:
        optimizer: its rate is the peak, after scaling by the batch.
        settings: of the flags.
        seed: of the noise, a draw of its own per epoch.
        start_epoch: a run that begins there (``--start_epoch``) begins with f(start_epoch), as the official code does
            when it resumes. Our own resumed runs go on exactly instead.

    Raises:
        ValueError: noise over no range, or without a bound.

    Source: the official scheduler; arXiv:2412.04786 does not mention the divisor.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: CosineSettings, *, seed: int = 0, start_epoch: int = 0
    ) -> None:
        noise, bound = settings.lr_noise, settings.lr_noise_pct
        if noise is not None and not 1 <= len(noise) <= 2:
            raise ValueError(f"--lr-noise takes one or two fractions of the epochs, got {list(noise)}")
        if noise is not None and not bound > 0:
            raise ValueError(f"--lr-noise-pct must be positive, got {bound}")
        epochs: Any = [fraction * settings.epochs for fraction in noise or ()]
        super().__init__(
            optimizer, settings.epochs, settings.min_lr, warmup_t=settings.warmup_epochs,
            warmup_lr_init=settings.warmup_lr, noise_range_t=epochs[0] if len(epochs) == 1 else epochs or None,
            noise_pct=bound, noise_seed=seed,
        )  # fmt: skip
        self.start_epoch = start_epoch
        self.step(start_epoch)

    def _get_lr(self, t: int) -> list[float]:
        """f(t) of each group, without noise."""
        return [rate / (EARLY_DIVISOR if t < EARLY_EPOCHS else 1.0) for rate in super()._get_lr(t)]

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Set the rates for ``epoch``, the one about to run."""
        if epoch == 0:
            self.update_groups(self.warmup_lr_init if self.warmup_t else self.base_values)
        else:
            super().step(epoch if epoch == self.start_epoch else epoch - 1, metric)

    def state_dict(self) -> dict[str, Any]:
        return {"start_epoch": self.start_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The rate itself is in the optimizer's state; a file of the official trainer holds other keys."""
        self.start_epoch = int(state_dict.get("start_epoch", 0))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def allow_widths(count: int) -> None:
    """Let torch.compile keep one specialised graph per width."""
    import torch._dynamo.config as config  # only where it is used: importing it takes seconds

    config.specialize_float = True
    config.recompile_limit = max(config.recompile_limit, 4 * count + 8)


class AtRatio(nn.Module):
    """A network at one width, as a function of the images alone; the average of both heads where there are two."""

    def __init__(self, model: nn.Module, ratio: float) -> None:
        super().__init__()
        self.model, self.ratio = model, ratio
        self.training = model.training  # evaluate() puts the mode back

    def forward(self, images: Tensor) -> Tensor:
        result = self.model(images, self.ratio)
        return (result[0] + result[1]) / 2 if isinstance(result, tuple) else result


def evaluate_width(
    model: nn.Module, loader: Iterable[Any], ratio: float, *, device: torch.device, amp: str = "none", **options: Any
) -> dict[str, float]:
    """Accuracy at one width; see ``common.run.engine.evaluate``. Each image counts once, in ``loss`` too."""
    return evaluate(AtRatio(model, ratio), loader, device=device, amp=amp, **options)


def evaluate_widths(
    model: nn.Module,
    loader: Iterable[Any],
    ratios: Sequence[float],
    *,
    device: torch.device,
    amp: str = "none",
    failed: dict[str, str] | None = None,
) -> dict[float, dict[str, float]]:
    """Accuracy at each width, of images that are loaded once; ``failed`` as in ``common.run.engine.evaluate_all``."""
    models = {f"width {ratio}": AtRatio(model, ratio) for ratio in ratios}  # of two that are the same, one
    title = f"{len(models)} widths" if len(models) > 1 else next(iter(models))
    found = evaluate_all(models, loader, device=device, amp=amp, title=title, failed=failed)
    return {ratio: found[f"width {ratio}"] for ratio in ratios if f"width {ratio}" in found}

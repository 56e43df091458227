"""One training step of SiT, its parameter groups, its two learning rates, and the precision of its teacher.

The loop of epochs, precision, clipping, averaging and checkpoints are ``common.run.engine``'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.run.checkpoint import TrainingState
from common.run.engine import evaluate as evaluate_images
from common.run.program import is_main
from sit.losses import DistillationLoss

RTSM_FACTOR = 5.0
"""Learning rate of the reverse modules over that of the rest, at the start."""

_TOKENS = ("cls_token", "pos_embed", "dist_token", "reg_token")


def get_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups ``rtsm`` (decayed throughout), ``base_no_decay`` (tokens, biases, norms) and ``base_decay``, in order.

    The first rule that holds decides: frozen is left out; a token or position embedding is not decayed; a reverse
    module is; one dimension or a bias is not; the rest is. So the slimming modules' ``scale``, of three dimensions, is
    decayed, as in the published code. A group may be empty; files of the published trainer resume with this order.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "weight_decay": decay}
        for name, decay in (("rtsm", weight_decay), ("base_no_decay", 0.0), ("base_decay", weight_decay))
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(token in name for token in _TOKENS):
            group = "base_no_decay"
        elif "rtsm" in name:
            group = "rtsm"
        elif parameter.ndim == 1 or name.endswith(".bias"):
            group = "base_no_decay"
        else:
            group = "base_decay"
        groups[group]["params"].append(parameter)
    return list(groups.values())


def adjust_learning_rate(
    param_groups: Iterable[dict[str, Any]],
    init_lr: float,
    min_lr: float,
    step: int,
    max_step: int,
    *,
    warmup: int = 0,
) -> tuple[float, float]:
    """Set the rates of an epoch: a cosine from ``init_lr`` (reverse modules: five times that) to ``min_lr``.

    Args:
        param_groups: of the optimiser, named as :func:`get_param_groups` does.
        init_lr: scaled rate at the start; below ``min_lr`` the cosine simply runs upwards.
        step, max_step: epoch, from 0, and length of the cosine; from there on the rate is ``min_lr``.
        warmup: epochs in which the rates rise linearly up to the cosine; 0 as published.

    Returns:
        Rates of the backbone and of the reverse modules.

    Source: SiT, arXiv:2111.12624, implementation details: two cosines, the reverse modules' at five times the rate.
    """
    share = (1 + math.cos(math.pi * step / max_step)) / 2 if step < max_step else 0.0
    backbone = min_lr + share * (init_lr - min_lr)
    reverse = min_lr + share * (RTSM_FACTOR * init_lr - min_lr)
    rise = min(1.0, (step + 1) / (warmup + 1))
    backbone, reverse = backbone * rise, reverse * rise
    for group in param_groups:
        group["lr"] = reverse if group["name"] == "rtsm" else backbone
    return backbone, reverse


def rates_line(backbone: float, reverse: float) -> str:
    """The published line with which an epoch begins."""
    return f"## Using lr  {backbone:.7f} for BACKBONE, lr = {reverse:.7f} for RTSM"


def training_step(
    batch: tuple[Tensor, Tensor],
    *,
    network: nn.Module,
    criterion: DistillationLoss,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Loss terms of a batch; the teacher sees the same mixed images as the student.

    Args:
        batch: images (B, 3, height, width), class numbers (B,).
        network: the student in training mode, perhaps under DistributedDataParallel.
        mixup: timm's, needs an even batch.
    """
    images, targets = batch if mixup is None else mixup(*batch)
    return criterion(images, network(images), targets).terms()


class ClassLogits(nn.Module):
    """A network as a function from images to class logits (B, K), without the tokens that it gives besides."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # evaluation puts the mode back

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.model(images)
        return outputs if isinstance(outputs, Tensor) else outputs[0]


def evaluate(data_loader: Iterable[Any], model: nn.Module, device: torch.device, **options: Any) -> dict[str, float]:
    """Accuracy and loss over the images of all ranks; see ``common.run.engine.evaluate``, whose options are taken.

    Returns:
        That function's result under the published names too: ``acc1``, ``acc5`` in percent, and ``loss``, which is the
        mean over batches, each counted alike; ``image_loss`` is the mean over images.
    """
    result = evaluate_images(ClassLogits(model), data_loader, device=device, **options)
    loss = {"loss": result.pop("batch_loss"), "image_loss": result["loss"]}
    return {**result, **loss, "acc1": result["top1_percent"], "acc5": result["top5_percent"]}


def evaluate_both(state: TrainingState, loader: Iterable[Any], device: torch.device, *, amp: str) -> dict[str, float]:
    """Accuracy of the weights and, under ``ema_``, of their average; prints the published line."""
    result = evaluate(loader, state.model, device, amp=amp, show_progress=False)
    average: Any = state.ema
    if average is not None:
        smoothed = average.module
        if next(smoothed.parameters()).device != device:  # --model-ema-force-cpu
            smoothed = copy.deepcopy(smoothed).to(device)
        smooth = evaluate(loader, smoothed, device, amp=amp, show_progress=False)
        result |= {f"ema_{name}": smooth[name] for name in ("loss", "acc1", "acc5")}
    if is_main():
        print(full_summary_line(result), flush=True)
    return result


def summary_line(result: Mapping[str, float]) -> str:
    """The published line with which an evaluation ends."""
    return f"* Acc@1 {result['acc1']:.3f} Acc@5 {result['acc5']:.3f} loss {result['loss']:.3f}"


def full_summary_line(result: Mapping[str, float]) -> str:
    """That line, and the loss that does not depend on the size of the batches."""
    return f"{summary_line(result)} (mean over batches, as published; over images {result['image_loss']:.3f})"


def store_for_autocast(teacher: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Keep the weights that autocast would convert in every pass in its precision; the results are the same bits.

    Autocast remembers its conversions of weights with gradients only, a teacher has none. Linear layers and
    convolutions are converted, norms and embeddings stay. With dtype None nothing happens.

    Returns:
        The teacher, changed in place.
    """
    if dtype is not None:
        for module in teacher.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
    return teacher

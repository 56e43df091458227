"""Accuracy of a classifier under the published protocol: transform, measures, printed lines.

The lines are those of the published script; the sums behind the last one are exact over any number of processes.
"""

import math
import time
from collections.abc import Iterable, Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from common.data.images import to_rgb
from common.data.loaders import DataError, eval_transform
from common.run.launch import World, reduce_sums
from common.run.precision import autocast


def swag_eval_transform(resolution: int) -> Compose:
    """Shorter side to ``resolution`` pixels (bicubic), centre crop, ImageNet normalisation: crop ratio 1."""
    return eval_transform(resolution, crop_ratio=1.0, interpolation="bicubic")


def transform_image(image: Image.Image, resolution: int) -> Tensor:
    """One image as a batch, (1, 3, resolution, resolution)."""
    return torch.stack([swag_eval_transform(resolution)(to_rgb(image))])  # pyright: ignore[reportArgumentType]


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percent of images whose label is among the k highest outputs, for each k, as one-element tensors.

    Args:
        output: logits, (B, C). A k above C counts as C.
        target: labels, (B,).
    """
    classes = output.shape[1]
    ranked = output.topk(min(max(topk), classes), dim=1).indices
    hits = ranked == target[:, None]
    return [hits[:, :k].sum().float().reshape(1) * (100.0 / len(target)) for k in topk]


class Summary(Enum):
    """What the last line shows of a meter."""

    NONE = ""
    AVERAGE = "{name} {avg:.3f}"


class AverageMeter:
    """Current value and running average of a quantity.

    Args:
        name: printed before the value.
        fmt: format of value and average, such as ":6.2f".
        summary: what the last line shows.
    """

    def __init__(self, name: str, fmt: str = ":f", summary: Summary = Summary.AVERAGE) -> None:
        self.name, self.fmt, self.summary = name, fmt, summary
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: float | Tensor, n: int = 1) -> None:
        """Add a mean over ``n`` images."""
        self.val = float(val)
        self.sum += self.val * n
        self.count += n
        self.avg = self.sum / self.count

    def summarize(self) -> str:
        """The meter's part of the last line."""
        return self.summary.value.format(name=self.name, avg=self.avg)

    def __str__(self) -> str:
        return ("{name} {val" + self.fmt + "} ({avg" + self.fmt + "})").format(
            name=self.name, val=self.val, avg=self.avg
        )


class ProgressMeter:
    """Prints meters line by line.

    Args:
        num_batches: of the whole evaluation.
        meters: shown in this order.
        prefix: of every line.
    """

    def __init__(self, num_batches: int, meters: Sequence[AverageMeter], prefix: str = "") -> None:
        digits = len(str(num_batches))
        self.counter = f"[{{:{digits}d}}/{num_batches}]"
        self.meters, self.prefix = meters, prefix

    def display(self, batch: int) -> None:
        """Print value and average of every meter."""
        print("\t".join([self.prefix + self.counter.format(batch), *map(str, self.meters)]), flush=True)

    def display_summary(self) -> None:
        """Print the last line; a meter without summary leaves its slot empty, as published."""
        print(" ".join([" *", *(meter.summarize() for meter in self.meters)]), flush=True)


def make_meters() -> list[AverageMeter]:
    """Time, loss, top-1 and top-5 accuracy, as published."""
    return [
        AverageMeter("Time", ":6.3f", Summary.NONE),
        AverageMeter("Loss", ":.4e", Summary.NONE),
        AverageMeter("Acc@1", ":6.2f"),
        AverageMeter("Acc@5", ":6.2f"),
    ]


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], world: World, *, amp: str = "none", print_freq: int = 10
) -> dict[str, float | int]:
    """Loss and accuracy over the images of all processes, each counted once.

    Rank 0 prints a line of its own share every ``print_freq`` batches and, last, the result.

    Args:
        model: on ``world.device``, in evaluation mode.
        loader: (images, targets) of this process; its attribute ``skipped`` counts undecodable images.
        amp: none, fp16 or bf16.

    Returns:
        ``top1_percent``, ``top5_percent`` (of all classes where there are fewer), ``loss`` (mean cross-entropy),
        ``images``, ``skipped`` and ``seconds`` (of rank 0), the same on every process but for the last.

    Raises:
        DataError: if there is no image, a label beyond the model's classes, or a logit that is not a number.
    """
    meters = batch_time, losses, top1, top5 = make_meters()
    progress = ProgressMeter(len(loader), meters, prefix="Test: ")  # pyright: ignore[reportArgumentType]
    hits1 = hits5 = 0
    start = before = time.perf_counter()
    for i, (images, targets) in enumerate(loader):
        with autocast(amp, world.device):
            logits = model(images.to(world.device, non_blocking=True)).float()
        if int(targets.max()) >= logits.shape[1]:
            raise DataError(
                f"an image is of class {int(targets.max())}, but the model knows classes 0 to {logits.shape[1] - 1}; "
                "is this the data set that it was trained for?"
            )
        targets = targets.to(world.device, non_blocking=True)
        acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
        losses.update(F.cross_entropy(logits, targets), len(targets))
        top1.update(acc1, len(targets))
        top5.update(acc5, len(targets))
        hits1 += round(top1.val / 100 * len(targets))
        hits5 += round(top5.val / 100 * len(targets))
        now = time.perf_counter()
        batch_time.update(now - before)
        before = now
        if world.is_main and i % print_freq == 0:
            progress.display(i)
    skipped = getattr(loader, "skipped", 0)
    total = reduce_sums({"loss": losses.sum, "top1": hits1, "top5": hits5, "images": losses.count, "skipped": skipped})
    images = int(total["images"])
    if images == 0:
        raise DataError(f"no image to evaluate ({total['skipped']:.0f} skipped as undecodable)")
    if math.isnan(total["loss"]):
        raise DataError("the network gives logits that are not numbers: damaged weights, or an overflow under --amp")
    losses.avg, top1.avg, top5.avg = (total["loss"] / images, *(100 * total[k] / images for k in ("top1", "top5")))
    if world.is_main:
        if total["skipped"]:
            print(f"skipped {total['skipped']:.0f} images that cannot be decoded")
        progress.display_summary()
    return {
        "top1_percent": top1.avg,
        "top5_percent": top5.avg,
        "loss": losses.avg,
        "images": images,
        "skipped": int(total["skipped"]),
        "seconds": time.perf_counter() - start,
    }

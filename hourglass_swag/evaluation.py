"""Accuracy of a classifier under the published protocol: transform, measures, printed lines.

The lines are those of the published script; the sums behind the last one are exact over any number of processes.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from common.data.images import to_rgb
from common.data.loaders import eval_transform
from common.run.errors import DataError, NotNumbers
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


class Tally:
    """Loss and hits of one network, batch by batch, with the published lines.

    Args:
        name: in front of every line.
        batches: of the whole evaluation.
    """

    def __init__(self, name: str, batches: int) -> None:
        self.name = name
        self.time, self.losses, self.top1, self.top5 = self.meters = make_meters()
        self.progress = ProgressMeter(batches, self.meters, prefix=f"{name} Test: " if name else "Test: ")
        self.hits1 = self.hits5 = 0

    def add(self, logits: Tensor, targets: Tensor, seconds: float) -> None:
        """Count a batch; logits (B, C), targets (B,)."""
        acc1, acc5 = accuracy(logits, targets, topk=(1, 5))
        self.losses.update(F.cross_entropy(logits, targets), len(targets))
        self.top1.update(acc1, len(targets))
        self.top5.update(acc5, len(targets))
        self.hits1 += round(self.top1.val / 100 * len(targets))
        self.hits5 += round(self.top5.val / 100 * len(targets))
        self.time.update(seconds)

    def reduce(self, skipped: int, world: World) -> dict[str, float | int]:
        """What :func:`evaluate` returns, but for the seconds, over all processes; rank 0 prints the last line.

        Raises:
            DataError: see there.
        """
        sums = {"loss": self.losses.sum, "top1": self.hits1, "top5": self.hits5, "images": self.losses.count}
        total = reduce_sums(sums | {"skipped": skipped})
        images, skipped = int(total["images"]), int(total["skipped"])
        of = f"{self.name}: " if self.name else ""
        if images == 0:
            raise DataError(f"no image to evaluate ({skipped} skipped as undecodable)")
        if math.isnan(total["loss"]):
            raise NotNumbers(
                f"{of}the network gives logits that are not numbers: damaged weights, or an overflow under --amp"
            )
        self.losses.avg, self.top1.avg, self.top5.avg = (
            total["loss"] / images, 100 * total["top1"] / images, 100 * total["top5"] / images
        )  # fmt: skip
        if world.is_main:
            if skipped:
                print(f"{of}skipped {skipped} images that cannot be decoded")
            print(self.name, end="")
            self.progress.display_summary()
        measured = {"top1_percent": self.top1.avg, "top5_percent": self.top5.avg, "loss": self.losses.avg}
        return measured | {"images": images, "skipped": skipped}


def make_meters() -> list[AverageMeter]:
    """Time, loss, top-1 and top-5 accuracy, as published."""
    return [
        AverageMeter("Time", ":6.3f", Summary.NONE),
        AverageMeter("Loss", ":.4e", Summary.NONE),
        AverageMeter("Acc@1", ":6.2f"),
        AverageMeter("Acc@5", ":6.2f"),
    ]


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
    return evaluate_all({"": model}, loader, world, amp=amp, print_freq=print_freq)[""]


@torch.inference_mode()
def evaluate_all(
    models: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    world: World,
    *,
    amp: str = "none",
    print_freq: int = 10,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, float | int]]:
    """:func:`evaluate` for several networks, whose images are loaded once; ``seconds`` are of all together.

    Args:
        models: name, which begins every printed line -> network.
        failed: takes the names of networks whose logits are not numbers, and what is to be said of them; they are left
            out of the result. None raises it.
    """
    tallies = {name: Tally(name, len(loader)) for name in models}  # pyright: ignore[reportArgumentType]
    start = before = time.perf_counter()
    for i, (batch, labels) in enumerate(loader):
        images, targets = (part.to(world.device, non_blocking=True) for part in (batch, labels))
        highest = int(labels.max())
        for name, model in models.items():
            with autocast(amp, world.device):
                logits = model(images).float()
            if highest >= logits.shape[1]:
                raise DataError(
                    f"an image is of class {highest}, but the model knows classes 0 to {logits.shape[1] - 1}; "
                    "is this the data set that it was trained for?"
                )
            now = time.perf_counter()
            tallies[name].add(logits, targets, now - before)
            before = now
            if world.is_main and i % print_freq == 0:
                tallies[name].progress.display(i)
    skipped = getattr(loader, "skipped", 0)
    found: dict[str, dict[str, float | int]] = {}
    for name, tally in tallies.items():
        try:
            found[name] = tally.reduce(skipped, world)
        except NotNumbers as error:  # on all processes alike
            if failed is None:
                raise
            failed[name] = str(error)
    seconds = time.perf_counter() - start
    return {name: measured | {"seconds": seconds} for name, measured in found.items()}

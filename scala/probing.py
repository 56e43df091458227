"""Linear probing of a frozen network at many widths: features, heads that are sliced or one per width (design).

The paper probes UCF101 with a head that is slimmable like the backbone, and 12 image data sets at several widths. A
clip's feature is the mean over its frames. Networks with two tokens have a head for each, whose logits are averaged,
as the backbone's own are.

Legend: B batch, T frames, t tokens (2 in a distilled network), d = int(r D) width of a slice, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.build import open_split
from common.data.datasets import SkipBadImages, num_classes
from common.data.loaders import eval_loader, train_loader
from common.data.transforms import eval_transform, train_transform
from common.run.build import build_run
from common.run.engine import evaluate
from common.run.errors import UsageError
from common.run.launch import World
from common.run.settings import DataSettings, OptimizerSettings, RunSettings, ScheduleSettings
from scala.arguments import ProbeSettings
from scala.engine_scala import allow_widths, draw_widths
from scala.layers import SlicedLinear
from scala.loading import Trained
from scala.models_scala import DistilledVisionTransformer_scala
from scala.slicing import Ratio, SliceRule, WidthGrid, exact, sliced_size
from scala.sweep import costs, write
from scala.ucf101 import Clips, clip_transform

CLIP_SETS = ("ucf101", "clips")
"""Values of ``--data-set`` that name clips."""


class FrozenFeatures(nn.Module):
    """Pooled features of a frozen network, before its own head: (B, t, d) of images or clips, at a width."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokens = 2 if isinstance(model, DistilledVisionTransformer_scala) else 1
        if self.tokens == 2:
            model.pair_outputs = True  # both tokens, not their mean

    def train(self, mode: bool = True) -> FrozenFeatures:
        """A frozen network never leaves evaluation mode."""
        del mode
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Images (B, 3, height, width) or clips (B, T, 3, height, width)."""
        frames = images if images.ndim == 4 else images.flatten(0, 1)
        pooled = self.model.forward_head(self.model.forward_features(frames, ratio), ratio, pre_logits=True)
        features = torch.stack(pooled if isinstance(pooled, tuple) else (pooled,), dim=1)  # (B T, t, d)
        return features if images.ndim == 4 else features.unflatten(0, images.shape[:2]).mean(dim=1)


class Head(nn.Module):
    """Linear heads on the tokens of a network, whose logits are averaged; a subclass says which belong to a width."""

    heads: nn.ModuleList

    def __init__(self, classes: int, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.num_classes = classes
        self.heads = nn.ModuleList(heads)
        self.apply(_zero)

    def apply_heads(self, features: Sequence[Tensor], ratio: Ratio) -> list[Tensor]:
        """Logits (B, C) of each token from its features (B, d)."""
        raise NotImplementedError

    def logits(self, features: Tensor, ratio: Ratio) -> Tensor:
        """(B, t, d) to (B, C)."""
        return torch.stack(self.apply_heads(features.unbind(1), ratio)).mean(dim=0)

    def forward(self, features: Sequence[Tensor], ratios: Sequence[float]) -> list[Tensor]:
        """Logits of several widths, so that one call of a wrapped module does a whole step."""
        return [self.logits(part, ratio) for part, ratio in zip(features, ratios, strict=True)]


class SlicedHead(Head):
    """A linear head whose columns are cut by the rule of the backbone; the bias is whole.

    Source: arXiv:2412.04786, Section 5.4: the head is slimmable like the backbone (design).
    """

    def __init__(self, rule: SliceRule, width: int, classes: int, tokens: int) -> None:
        super().__init__(classes, (SlicedLinear(rule, width, classes, rows=False) for _ in range(tokens)))

    def apply_heads(self, features: Sequence[Tensor], ratio: Ratio) -> list[Tensor]:
        return [head(token, ratio) for head, token in zip(self.heads, features, strict=True)]


class SeparateHeads(Head):
    """A linear head of its own for each width, all of which must take part in every step."""

    def __init__(self, width: int, classes: int, tokens: int, ratios: Sequence[float]) -> None:
        sizes = [sliced_size(width, ratio) for ratio in ratios]
        super().__init__(classes, (nn.ModuleList(nn.Linear(size, classes) for _ in range(tokens)) for size in sizes))
        self.rows = {exact(ratio): row for row, ratio in enumerate(ratios)}

    def apply_heads(self, features: Sequence[Tensor], ratio: Ratio) -> list[Tensor]:
        heads: Any = self.heads[self.rows[exact(ratio)]]
        return [head(token) for head, token in zip(heads, features, strict=True)]


def _zero(module: nn.Module) -> None:
    """A probe starts without an opinion: the problem is convex."""
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def sampled_widths(grid: WidthGrid) -> list[float]:
    """Largest, two middle and smallest width of a step, as in training; every width where they are four or fewer."""
    if len(grid.ratios) <= 4:
        return grid.ratios[::-1]
    return [grid.largest, *draw_widths(grid), grid.smallest]


@dataclass
class ProbeStep:
    """Cross entropy of the probe at the widths of a step, for ``common.run.engine.train``.

    Args:
        features: the frozen network.
        network: the probe, under DistributedDataParallel if there are several ranks.
        widths: gives those of a step; Python's generator decides where they are drawn.
        smoothing: of the labels.
    """

    features: FrozenFeatures
    network: nn.Module
    widths: Callable[[], list[float]]
    smoothing: float = 0.0

    def __call__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """``loss``, the sum over the widths, and the largest and smallest width's."""
        images, targets = batch
        widths = self.widths()
        outputs = self.network([self.features(images, ratio) for ratio in widths], widths)
        losses = torch.stack([F.cross_entropy(out, targets, label_smoothing=self.smoothing) for out in outputs])
        order = sorted(range(len(widths)), key=widths.__getitem__)
        return {"loss": losses.sum(), "loss_largest": losses[order[-1]], "loss_smallest": losses[order[0]]}


class ProbeAtRatio(nn.Module):
    """Logits of images or clips at one width."""

    def __init__(self, features: FrozenFeatures, head: Any, ratio: Ratio) -> None:
        super().__init__()
        self.features, self.head, self.ratio = features, head, ratio

    def forward(self, images: Tensor) -> Tensor:
        return self.head.logits(self.features(images, self.ratio), self.ratio)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def open_images(data: DataSettings, split: str, settings: ProbeSettings) -> Dataset[Any]:
    """Images or clips of a split, cropped and flipped at random in training, without further augmentation."""
    training = split == "train"
    if data.data_set.lower() in CLIP_SETS:
        transform = clip_transform(data.input_size, train=training, crop_ratio=data.eval_crop_ratio)
        clips = Clips(data.data_path, split, frames=settings.frames, transform=transform, fold=settings.fold)
        return SkipBadImages(clips) if data.skip_bad_images else clips
    plain = eval_transform(data.input_size, crop_ratio=data.eval_crop_ratio)
    cropped = train_transform(data.input_size, auto_augment="", color_jitter=0.0, erase_probability=0.0)
    return open_split(data, split, cropped if training else plain)


def probe_widths(
    world: World,
    run: RunSettings,
    data: DataSettings,
    trained: Trained,
    settings: ProbeSettings,
    optimizer: OptimizerSettings,
    schedule: ScheduleSettings,
    *,
    arguments: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Train a probe of a frozen network unless ``run.eval``; accuracy and cost of every width, ascending.

    Raises:
        UsageError: a width that was not trained, without ``--allow-untrained``; or none is known.

    Source: arXiv:2412.04786, Section 5.4 (design).
    """
    wanted = settings.ratios or trained.ratios
    if not wanted:
        raise UsageError("the checkpoint does not say which widths were trained: give --granularity or --ratios")
    ratios = trained.choose(sorted(set(wanted)), allow_untrained=settings.allow_untrained, flag="--ratios")
    is_clips = data.data_set.lower() in CLIP_SETS
    held_out = open_images(data, "val", settings)
    classes = num_classes(held_out.dataset if isinstance(held_out, SkipBadImages) else held_out)
    loading: dict[str, Any] = {"batch_size": data.batch_size, "workers": data.workers, "pin_memory": data.pin_mem}
    test = partial(evaluate, loader=eval_loader(held_out, **loading), device=world.device, amp=run.amp)
    features, width = FrozenFeatures(trained.model.to(world.device)), int(trained.model.num_features)
    if settings.head == "sliced" or (settings.head == "auto" and is_clips):
        rule = SliceRule(
            trained.model.smallest_ratio, trained.model.largest_ratio, isolated=trained.model.rule.isolated
        )
        head: Head = SlicedHead(rule, width, classes, features.tokens)
        known = trained.ratios or ratios
        grid = WidthGrid(known[0], known[-1], known[1] - known[0]) if len(known) > 4 else None
        widths = partial(sampled_widths, grid) if grid is not None else lambda: known[::-1]
    else:
        head, widths = SeparateHeads(width, classes, features.tokens, ratios), lambda: ratios
    if run.compile:
        allow_widths(len(trained.ratios or ratios))
    trainer = build_run(head.to(world.device), world, run, optimizer=optimizer, schedule=schedule, arguments=arguments)
    if not run.eval:
        assert trainer.network is not None
        trainer.fit(
            ProbeStep(features, trainer.network, widths, settings.smoothing),
            train_loader(open_images(data, "train", settings), seed=data.seed, **loading),
            evaluate_fn=lambda: test(ProbeAtRatio(features, head, ratios[-1]), show_progress=False),
        )
    frames = settings.frames if is_clips else 1
    rows = []
    for ratio in ratios:
        found = test(ProbeAtRatio(features, head, ratio), title=f"width {ratio:g}")
        cost = costs(trained.model, ratio)
        rows.append({"ratio": ratio, **cost, "gmacs": frames * cost["gmacs"], **found})
    write(rows, run.output_dir, {**arguments, "model": trained.name})
    return rows

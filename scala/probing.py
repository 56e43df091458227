"""Linear probing of a frozen network at many widths: features, heads that are sliced or one per width (design).

The paper probes UCF101 with a head that is slimmable like the backbone, and 12 image data sets at several widths. A
clip's feature is the mean over its frames. Networks with two tokens have a head for each, whose logits are averaged,
as the backbone's own are.

Legend: B batch, T frames, t tokens (2 in a distilled network), d = int(r D) width of a slice, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scala.engine_scala import draw_widths
from scala.layers import SlicedLinear
from scala.models_scala import DistilledVisionTransformer_scala
from scala.slicing import Ratio, SliceRule, WidthGrid, exact, sliced_size


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

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.num_features)

    @torch.no_grad()
    def forward(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Images (B, 3, height, width) or clips (B, T, 3, height, width)."""
        frames = images if images.ndim == 4 else images.flatten(0, 1)
        pooled = self.model.forward_head(self.model.forward_features(frames, ratio), ratio, pre_logits=True)
        features = torch.stack(pooled if isinstance(pooled, tuple) else (pooled,), dim=1)  # (B T, t, d)
        return features if images.ndim == 4 else features.unflatten(0, images.shape[:2]).mean(dim=1)


class Head(nn.Module):
    """Linear heads on the tokens of a network, whose logits are averaged; a subclass says which belong to a width."""

    num_classes: int

    def heads_of(self, ratio: Ratio) -> list[Callable[[Tensor], Tensor]]:
        """A function from features (B, d) to logits (B, C) per token."""
        raise NotImplementedError

    def logits(self, features: Tensor, ratio: Ratio) -> Tensor:
        """(B, t, d) to (B, C)."""
        pairs = zip(self.heads_of(ratio), features.unbind(1), strict=True)
        return torch.stack([head(token) for head, token in pairs]).mean(dim=0)

    def forward(self, features: Sequence[Tensor], ratios: Sequence[float]) -> list[Tensor]:
        """Logits of several widths, so that one call of a wrapped module does a whole step."""
        return [self.logits(part, ratio) for part, ratio in zip(features, ratios, strict=True)]


class SlicedHead(Head):
    """A linear head whose columns are cut by the rule of the backbone; the bias is whole.

    Source: arXiv:2412.04786, Section 5.4: the head is slimmable like the backbone (design).
    """

    def __init__(self, rule: SliceRule, width: int, classes: int, tokens: int) -> None:
        super().__init__()
        self.num_classes = classes
        self.heads = nn.ModuleList(SlicedLinear(rule, width, classes, rows=False) for _ in range(tokens))
        self.apply(_zero)

    def heads_of(self, ratio: Ratio) -> list[Callable[[Tensor], Tensor]]:
        return [partial(head, ratio=ratio) for head in self.heads]


class SeparateHeads(Head):
    """A linear head of its own for each width, all of which must take part in every step."""

    def __init__(self, width: int, classes: int, tokens: int, ratios: Sequence[float]) -> None:
        super().__init__()
        self.num_classes = classes
        self.rows = {exact(ratio): index for index, ratio in enumerate(ratios)}
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(sliced_size(width, ratio), classes) for _ in range(tokens)) for ratio in ratios
        )
        self.apply(_zero)

    def heads_of(self, ratio: Ratio) -> list[Callable[[Tensor], Tensor]]:
        return list(self.heads[self.rows[exact(ratio)]])  # pyright: ignore[reportArgumentType] - a list of layers


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

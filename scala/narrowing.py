"""Any network at any width: a width is a plain network of that width, run with a part of the full network's weights.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786, shows other backbones than the ViT and publishes
no code for them (design). :class:`NarrowedNetwork` gets a function that builds plain networks; what a width uses of a
weight follows from the two shapes and ``slicing.SliceRule``. Batch statistics of different widths differ, so they
cannot share one running mean: every trained width has its own, as in slimmable networks (arXiv:1812.08928). A width
that was not trained gets them from a few batches by :func:`calibrate_`.

Legend: B batch, C channels, c = int(r C) channels of a slice, K classes, r width ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from common.run.launch import get_world_size, reduce_sums
from scala.layers import SlicedLinear, SlicedNetwork
from scala.slicing import Ratio, SliceRule, Width, exact, make_grid

State = dict[str, Tensor]
FULL = Width(1, 1)


class Narrowed(SlicedNetwork, nn.Module):
    """A network whose widths are plain networks, which run with a part of its weights.

    Args:
        make: builds the plain network of a width, whose weights have the names that they have here.
        rule: which end a width is cut from.
    """

    def __init__(self, make: Callable[[Width], nn.Module], rule: SliceRule) -> None:
        super().__init__()
        self.make, self.rule = make, rule
        self.smallest_ratio, self.largest_ratio = rule.smallest, rule.largest
        self._plain: dict[Width, nn.Module] = {}  # on the meta device: their weights are those of this network
        self._shapes: dict[Width, dict[str, torch.Size]] = {}

    def plain(self, width: Width) -> Any:
        """The network that a width is, on the meta device."""
        if width not in self._plain:
            with torch.device("meta"):
                network = self._plain[width] = self.make(width)
            self._shapes[width] = {name: value.shape for name, value in network.named_parameters()}
        network = self._plain[width]
        return network if network.training == self.training else network.train(self.training)

    def trunk(self, width: Width, names: Callable[[str], bool] | None = None) -> State:
        """Parameters of the plain network of a width, views; those alone whose ``names`` are wanted."""
        own = dict(self.named_parameters())
        self.plain(width)
        shapes = {name: shape for name, shape in self._shapes[width].items() if names is None or names(name)}
        return {name: self.rule.cut_to(own[name], width, shape) for name, shape in shapes.items()}

    def sliced_parameters(self, width: Width) -> State:
        return self.trunk(width)


class NarrowedNetwork(Narrowed):
    """A network with batch statistics per width, whose every forward pass takes a width ratio.

    It has the weights of the plain network of full width under the same names, and a classifier. ``running_mean`` and
    its companions are the statistics of the largest width, so that a checkpoint of an ordinary network fits; rows of
    ``narrow_mean`` and ``narrow_var`` belong to the other trained widths, from the smallest on, of which a width uses
    the first c entries.

    Args:
        make: builds the plain network of a width on torch's default device: images to the last map, no classifier.
        classifier: name of the layer from pooled features to logits.
        num_features: of the last map, at full width.
        img_size: side of the images in pixels; the count of operations goes by it.
        smallest_ratio, largest_ratio: s and l, which decide what end a width is cut from.
        granularity: step of the trained widths.
        num_classes: 0 for pooled features instead of logits.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        make: Callable[[Width], nn.Module],
        classifier: str,
        num_features: int,
        *,
        img_size: int = 224,
        smallest_ratio: float = 0.25,
        largest_ratio: float = 1.0,
        granularity: float = 0.0625,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(make, SliceRule(smallest_ratio, largest_ratio))
        self.img_size, self.num_classes, self.in_chans = img_size, num_classes, in_chans
        self.classifier_name, self.num_features, self.drop_rate = classifier, num_features, drop_rate
        *narrow, self.largest = (exact(ratio) for ratio in make_grid(smallest_ratio, largest_ratio, granularity).ratios)
        self.rows = {width: row for row, width in enumerate(narrow)}
        self.calibrated: dict[Width, State] = {}
        for name, child in make(FULL).named_children():
            self.add_module(name, child)
        for norm in batch_norms(self).values():
            if narrow:
                norm.register_buffer("narrow_mean", torch.zeros(len(narrow), norm.num_features))
                norm.register_buffer("narrow_var", torch.ones(len(narrow), norm.num_features))
        head = SlicedLinear(self.rule, num_features, num_classes, rows=False) if num_classes else None
        self.add_module(classifier, head)

    @property
    def head_layer(self) -> SlicedLinear | None:
        return self._modules[self.classifier_name]  # pyright: ignore[reportReturnType] - built above

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size

    def no_weight_decay(self) -> set[str]:
        return set()

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        del width
        shared = {"img_size": self.img_size, "num_classes": self.num_classes, "in_chans": self.in_chans}
        return shared, {"smallest_ratio": 1.0, "largest_ratio": 1.0, "granularity": 1.0}

    def sliced_parameters(self, width: Width) -> State:
        head = {} if self.head_layer is None else self.head_layer.sliced(width)
        return self.trunk(width) | {f"{self.classifier_name}.{name}": value for name, value in head.items()}

    def knows(self, ratio: Ratio) -> bool:
        """Whether there are batch statistics for a width."""
        return exact(ratio) in (self.largest, *self.rows, *self.calibrated)

    def statistics(self, ratio: Ratio) -> State:
        """Running statistics of a width by their names in a plain network of it, as views.

        Raises:
            ValueError: a width that was neither trained nor calibrated.
        """
        width = exact(ratio)
        counting = next(self.parameters()).is_meta  # of operations, which every width has
        if width in self.calibrated and not counting:
            return self.calibrated[width]
        if not counting and not self.knows(width):
            known = ", ".join(f"{steps / of:g}" for steps, of in (*self.rows, self.largest))
            raise ValueError(
                f"batch normalisation has no statistics for width ratio {width.steps / width.of:g}: it has those of "
                f"the trained widths {known}; give calibrate_() a few batches"
            )
        found: State = {}
        sizes = {name: norm.num_features for name, norm in batch_norms(self.plain(width)).items()}
        for name, norm in batch_norms(self).items():
            mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
            if width in self.rows:  # whose batches nobody counts
                row = self.rows[width]
                mean, variance, batches = norm.narrow_mean[row], norm.narrow_var[row], batches.clone()
            found |= {f"{name}.running_mean": mean[: sizes[name]], f"{name}.running_var": variance[: sizes[name]]}
            found[f"{name}.num_batches_tracked"] = batches
        return found

    def forward_features(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Images (B, 3, height, width) to the last map, (B, c, height / 32, width / 32)."""
        width = self.check_ratio(ratio)
        return functional_call(self.plain(width), self.trunk(width) | self.statistics(width), (images,))

    def forward_head(self, x: Tensor, ratio: Ratio, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, c), or the logits (B, K)."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits or self.head_layer is None else self.head_layer(x, ratio)

    def forward(self, images: Tensor, ratio: Ratio) -> Tensor:
        width = self.check_ratio(ratio)
        return self.forward_head(self.forward_features(images, width), width)


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Batch normalisations of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


@torch.no_grad()
def calibrate_(model: NarrowedNetwork, ratio: Ratio, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of one width by their average over ``batches`` of images; weights stay.

    Statistics of a trained width stay in the model's state; those of another width live until the model is rebuilt.

    Args:
        batches: images (B, 3, height, width) on the model's device; a few thousand in all suffice.

    Returns:
        Batches seen by this process; several processes end with the mean of theirs.

    Raises:
        ValueError: no batch.

    Source: arXiv:2412.04786, Section 5.2, slimmable ability across architectures (design).
    """
    width = model.check_ratio(ratio)
    with torch.device("meta"):
        plain = model.make(width).eval()
    weights = model.trunk(width)
    found: State = {}
    for name, norm in batch_norms(plain).items():
        norm.train()
        norm.momentum = None  # the plain average over batches
        scale = weights[f"{name}.weight"]
        found |= {f"{name}.running_mean": torch.zeros_like(scale), f"{name}.running_var": torch.ones_like(scale)}
        found[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=scale.device)
    seen = 0
    for images in batches:
        functional_call(plain, weights | found, (images,))
        seen += 1
    if not seen:
        raise ValueError("calibration needs at least one batch of images")
    for name, value in found.items():
        if name.endswith(("mean", "var")):  # every process saw its own images
            value.copy_(reduce_sums(value.clone()) / get_world_size())
    if not model.knows(width):
        model.calibrated[width] = found
    else:
        for name, value in model.statistics(width).items():
            if not name.endswith("tracked"):
                value.copy_(found[name])
    return seen

"""Which channels belong to a width ratio: the only place where a weight is sliced.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786, isolated activation: the smallest width uses the
leading channels of every tensor, every width between the smallest and the largest uses the trailing ones. For
r + s <= 1 the smallest sub-network and the one of width r share no weight.

    rule = SliceRule(0.25, 1.0)
    rule.cut(linear.weight, 0.5, 0, 1)      # the trailing half of rows and columns, a view
    sliced_state_dict(model, 0.5)           # every weight of a sliced model at that width

Legend: r width ratio; s, l smallest and largest ratio; g granularity; D full width; H heads; X number of widths.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
"""Of every layer normalisation that runs: the published networks were trained with it, not with DeiT's 1e-6."""


class WidthError(ValueError):
    """A ratio, bound or granularity that no network or step can have; the message names what is possible."""


class SliceRule(NamedTuple):
    """The slicing bound of a network: its smallest and largest ratio, which decide the end that a ratio is cut from."""

    smallest: float
    largest: float

    def leads(self, ratio: float) -> bool:
        """Whether ``ratio`` takes the leading channels; an exact comparison, as the bounds are exact numbers."""
        return ratio == self.smallest or ratio == self.largest

    def cut(self, tensor: Tensor, ratio: float, *dims: int, parts: int = 1) -> Tensor:
        """The channels of ``ratio`` along each of ``dims``, a view.

        Args:
            tensor: a weight; along each of ``dims`` it has the full number of channels.
            ratio: width ratio r.
            parts: the dimension holds so many equal parts, whose sizes are rounded one by one. They are still cut as
                one block: of the fused projection (3D rows) the slice is 3d rows at one end, not d rows of each.
        """
        for dim in dims:
            full = tensor.shape[dim]
            size = parts * sliced_size(full // parts, ratio)
            if size != full:
                tensor = tensor.narrow(dim, 0 if self.leads(ratio) else full - size, size)
        return tensor


PUBLISHED_RULE = SliceRule(0.25, 1.0)
"""The bounds of every published network."""


def sliced_size(full: int, ratio: float) -> int:
    """Channels of ``ratio`` out of ``full``: truncated."""
    return int(ratio * full)


# Widths


def valid_ratios(embed_dim: int, num_heads: int) -> list[float]:
    """Every ratio whose width is a multiple of the number of heads, ascending."""
    return [width / embed_dim for width in range(num_heads, embed_dim + 1, num_heads)]


def check_ratio(ratio: float, embed_dim: int, num_heads: int) -> None:
    """Refuse a width that the heads cannot share.

    Raises:
        WidthError: naming the valid widths.
    """
    width = sliced_size(embed_dim, ratio) if 0 < ratio <= 1 else 0
    if width and width % num_heads == 0:
        return
    heads = f"{num_heads} heads need a width that is a multiple of {num_heads}"
    found = f"{ratio:g} of {embed_dim} is {width}" if width else f"got {ratio:g}"
    raise WidthError(
        f"a width ratio must be above 0 and at most 1, and {heads}; {found}. "
        f"The valid ratios are the multiples of {num_heads}/{embed_dim} = {num_heads / embed_dim:g}: "
        f"{_shown([f'{valid:g}' for valid in valid_ratios(embed_dim, num_heads)])}"
    )


class WidthGrid(NamedTuple):
    """The widths that one network is trained for: s, s + g, ..., l.

    Build it with :func:`make_grid`, which checks it.
    """

    smallest: float
    largest: float
    granularity: float

    @property
    def ratios(self) -> list[float]:
        """All X widths, ascending; the ends are exactly the bounds."""
        first, last = round(self.smallest / self.granularity), round(self.largest / self.granularity)
        between = [step * self.granularity for step in range(first + 1, last)]
        return [self.smallest, *between, self.largest] if last > first else [self.largest]

    @property
    def upper_steps(self) -> tuple[int, int]:
        """First and last multiple of g for the upper middle width, w3; the range may be empty."""
        return self._middle, round(self.largest / self.granularity) - 1

    @property
    def lower_steps(self) -> tuple[int, int]:
        """First and last multiple of g for the lower middle width, w2; the range may be empty."""
        return round(self.smallest / self.granularity) + 1, self._middle - 1

    @property
    def _middle(self) -> int:
        return math.ceil(round((self.largest + self.smallest) / 2 / self.granularity, 6))

    @property
    def rule(self) -> SliceRule:
        return SliceRule(self.smallest, self.largest)


def make_grid(smallest: float, largest: float, granularity: float) -> WidthGrid:
    """The widths s, s + g, ..., l.

    Raises:
        WidthError: if the bounds are no range within (0, 1], or the granularity does not divide it.
    """
    if not 0 < smallest <= largest <= 1:
        raise WidthError(
            f"the slicing bound must satisfy 0 < --smallest_ratio <= --largest_ratio <= 1, got {smallest:g} and "
            f"{largest:g}"
        )
    if not granularity > 0:
        raise WidthError(f"--granularity must be positive, got {granularity:g}")
    for name, size in (("the range from --smallest_ratio to --largest_ratio", largest - smallest),
                       ("--largest_ratio", largest)):  # fmt: skip
        steps = size / granularity
        if abs(steps - round(steps)) > 1e-6:
            raise WidthError(
                f"--granularity {granularity:g} does not divide {name} ({size:g}) into whole steps ({steps:g}); the "
                "paper uses 0.03125, 0.0625, 0.125 or 0.25 from 0.25 to 1"
            )
    return WidthGrid(smallest, largest, granularity)


def check_sampling(grid: WidthGrid) -> None:
    """Refuse a grid in which scale coordination has no two middle widths to draw.

    Raises:
        WidthError: naming the range that is empty.
    """
    for name, (low, high) in (("upper", grid.upper_steps), ("lower", grid.lower_steps)):
        if low > high:
            raise WidthError(
                f"--granularity {grid.granularity:g} from {grid.smallest:g} to {grid.largest:g} gives the "
                f"{len(grid.ratios)} widths {_shown([f'{r:g}' for r in grid.ratios])}: none in the {name} half, and a "
                "step needs one in each half besides the bounds (at least 4 widths). Give a finer --granularity, or "
                "train the largest width alone (--full_warm_epoch at least --epochs)"
            )


def _shown(names: list[str], limit: int = 40) -> str:
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join([*names[: limit - 1], "...", names[-1]])


# Layers with sliced weights


@runtime_checkable
class Sliced(Protocol):
    """A module that knows its own weights at a width."""

    def sliced(self, ratio: float) -> Mapping[str, Tensor]:
        """The module's own parameters at ``ratio``, views, by their names in its state dict."""
        ...


class SlicedLinear(nn.Linear):
    """A linear layer of which ``ratio`` uses a block of the rows, of the columns, or of both.

    Args:
        rule: decides the end.
        rows, columns: whether output and input channels shrink with the ratio; a classification head keeps its rows.
        parts: equal parts of the rows, see :meth:`SliceRule.cut`.
    """

    def __init__(
        self,
        rule: SliceRule,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rows: bool = True,
        columns: bool = True,
        parts: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.rule, self.rows, self.columns, self.parts = rule, rows, columns, parts

    def sliced(self, ratio: float) -> dict[str, Tensor]:
        weight = self.rule.cut(self.weight, ratio, 1) if self.columns else self.weight
        if self.rows:
            weight = self.rule.cut(weight, ratio, 0, parts=self.parts)
        if self.bias is None:
            return {"weight": weight}
        bias = self.rule.cut(self.bias, ratio, 0, parts=self.parts) if self.rows else self.bias
        return {"weight": weight, "bias": bias}

    def forward(self, x: Tensor, ratio: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = self.sliced(ratio)
        return F.linear(x, own["weight"], own.get("bias"))


class SlicedLayerNorm(nn.LayerNorm):
    """Layer normalisation over d channels with the affine weights of ``ratio``; eps is 1e-5, see ``NORM_EPS``."""

    def __init__(self, rule: SliceRule, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)
        self.rule = rule

    def sliced(self, ratio: float) -> dict[str, Tensor]:
        return {"weight": self.rule.cut(self.weight, ratio, 0), "bias": self.rule.cut(self.bias, ratio, 0)}

    def forward(self, x: Tensor, ratio: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = self.sliced(ratio)
        return F.layer_norm(x, own["weight"].shape, own["weight"], own["bias"], self.eps)


class SlicedConv2d(nn.Conv2d):
    """A convolution of which ``ratio`` uses a block of the output channels; the input is never sliced."""

    def __init__(
        self, rule: SliceRule, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int], bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, bias=bias)
        self.rule = rule

    def sliced(self, ratio: float) -> dict[str, Tensor]:
        own = {"weight": self.rule.cut(self.weight, ratio, 0)}
        return own if self.bias is None else own | {"bias": self.rule.cut(self.bias, ratio, 0)}

    def forward(self, x: Tensor, ratio: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = self.sliced(ratio)
        return F.conv2d(x, own["weight"], own.get("bias"), self.stride)  # pyright: ignore[reportArgumentType]


# A whole network at one width


def sliced_state_dict(model: nn.Module, ratio: float) -> dict[str, Tensor]:
    """Every weight that the width uses, under the names and in the order of ``model.state_dict()``; views, no copies.

    The shapes are those of a stand-alone network of width d = int(r D) with the same number of heads. Its attention
    scale differs, though: see ``scala/export.py``.

    Raises:
        WidthError: an invalid ratio, from the model's own ``check_ratio``.
        TypeError: a parameter that no sliced module owns.
    """
    check: Callable[[float], None] | None = getattr(model, "check_ratio", None)
    if check is not None:
        check(ratio)
    cut: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Sliced):
            cut |= {f"{prefix}.{name}" if prefix else name: value for name, value in module.sliced(ratio).items()}
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in names if name not in cut]:
        raise TypeError(f"no sliced module owns {', '.join(missing)}")
    return {name: cut[name] for name in names}


@torch.no_grad()
def count_active_parameters(model: nn.Module, ratio: float) -> int:
    """Entries of the weights that a width uses; works on the meta device."""
    return sum(value.numel() for value in sliced_state_dict(model, ratio).values())

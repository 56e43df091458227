"""Which channels belong to a width ratio: the only place that decides what is cut, in plain numbers.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786, isolated activation: the smallest width uses the
leading channels of every tensor, every width between the smallest and the largest uses the trailing ones. For
r + s <= 1 the smallest sub-network and the one of width r share no weight.

    rule = SliceRule(0.25, 1.0)
    rule.cut(linear.weight, 0.5, 0, 1)      # the trailing half of rows and columns, a view

Ratios come in as floats and become fractions of integers (:class:`Width`) where they enter, so that neither the end nor
the number of channels hangs on a rounding error. The layers are in ``layers.py``.

Legend: r width ratio; s, l smallest and largest ratio; g granularity; D full width; H heads; X number of widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from common.run.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SNAP = 1e-6
"""How far a ratio may be from the fraction that it means."""
MOST_PARTS = 1000
"""Largest denominator of a ratio; different fractions with such denominators are further apart than ``SNAP``."""


class WidthError(UsageError):
    """A ratio, bound or granularity that no network or step can have; the message names what is possible."""


class Width(NamedTuple):
    """A width ratio r = steps / of, exact and in lowest terms; made by :func:`exact`."""

    steps: int
    of: int

    def channels(self, full: int) -> int:
        """Channels out of ``full``: int(r full)."""
        return self.steps * full // self.of


Ratio = float | Width


def exact(ratio: Ratio) -> Width:
    """The fraction within ``SNAP`` of a ratio.

    Raises:
        WidthError: there is none with a denominator up to ``MOST_PARTS``, or it is not in (0, 1].
    """
    if isinstance(ratio, Width):
        return ratio
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 1 + SNAP:
        raise WidthError(f"a width ratio must be above 0 and at most 1, got {ratio!r}")
    for of in range(1, MOST_PARTS + 1):
        steps = round(ratio * of)
        if steps and abs(ratio - steps / of) < SNAP:
            return Width(steps, of)
    near = Fraction(ratio).limit_denominator(MOST_PARTS)
    raise WidthError(f"{ratio!r} is no exact width ratio: the nearest is {near} = {float(near):.9g}")


def sliced_size(full: int, ratio: Ratio) -> int:
    """Channels of ``ratio`` out of ``full``: truncated."""
    return exact(ratio).channels(full)


class SliceRule(NamedTuple):
    """The slicing bound of a network: its smallest and largest ratio, which decide the end that a ratio is cut from.

    In print the ends are swapped: the smallest width is trailing and the others lead. In the official code, on which
    every published file depends, the smallest leads.

    Args:
        isolated: off, every width leads, as in slimmable networks: an ablation that no published file is trained with.
    """

    smallest: float
    largest: float
    isolated: bool = True

    def leads(self, ratio: Ratio) -> bool:
        """Whether ``ratio`` takes the leading channels: it is one of the two bounds, or nothing is isolated.

        Source: arXiv:2412.04786, Section 4.2, Eq. 3: the smallest width at an end of its own (the other one in print).
        """
        width = exact(ratio)
        bounds = (self.smallest, self.largest)
        return not self.isolated or any(abs(width.steps / width.of - bound) < SNAP for bound in bounds)

    def span(self, full: int, ratio: Ratio, parts: int = 1) -> tuple[int, int]:
        """First channel of ``ratio`` out of ``full``, and how many they are.

        Args:
            parts: the channels are so many equal parts, whose sizes are rounded one by one. They are still cut as one
                block: of the fused projection (3D rows) the slice is 3d rows at one end, not d rows of each.
        """
        size = parts * sliced_size(full // parts, ratio)
        return 0 if self.leads(ratio) else full - size, size

    def cut(self, tensor: Tensor, ratio: Ratio, *dims: int, parts: int = 1) -> Tensor:
        """The channels of ``ratio`` along each of ``dims`` of a weight, a view; ``parts`` as in :meth:`span`.

        Source: arXiv:2412.04786, Section 4.2, Eq. 2: theta^r = theta[: r Co, : r Ci], here at the other end.
        """
        shape = list(tensor.shape)
        for dim in dims:
            _, shape[dim] = self.span(shape[dim], ratio, parts)
        return self.cut_to(tensor, ratio, shape)

    def cut_to(self, tensor: Tensor, ratio: Ratio, shape: Sequence[int]) -> Tensor:
        """What ``ratio`` uses of a weight that is of ``shape`` in a plain network of its width, a view."""
        for dim, (full, size) in enumerate(zip(tensor.shape, shape, strict=True)):
            if size != full:
                tensor = tensor.narrow(dim, 0 if self.leads(ratio) else full - size, size)
        return tensor


PUBLISHED_RULE = SliceRule(0.25, 1.0)
"""The bounds of every published network."""


# Widths


def check_ratio(ratio: Ratio, embed_dim: int, num_heads: int) -> Width:
    """The exact width of a ratio, which must give the heads a whole number of channels each.

    Raises:
        WidthError: naming the nearest and all valid widths.
    """
    wanted = ratio.steps / ratio.of if isinstance(ratio, Width) else ratio
    if not isinstance(wanted, (int, float)) or not math.isfinite(wanted):
        raise WidthError(f"a width ratio must be a number above 0 and at most 1, got {wanted!r}")
    each = embed_dim // num_heads
    steps = round(wanted * each)
    if 1 <= steps <= each and abs(wanted - steps / each) < SNAP:
        return Width(steps // math.gcd(steps, each), each // math.gcd(steps, each))
    low = min(max(math.floor(wanted * each), 1), each)
    near = " and ".join(f"{step / each:g} (width {step * num_heads})" for step in {low, min(low + 1, each)})
    raise WidthError(
        f"a width ratio must be above 0 and at most 1, and {num_heads} heads need a width that is a multiple of "
        f"{num_heads}; {wanted:.9g} of {embed_dim} is {wanted * embed_dim:.9g}. The nearest are {near}. "
        f"The valid ratios are the multiples of {num_heads}/{embed_dim} = {num_heads / embed_dim:g}: "
        f"{_shown([step / each for step in range(1, each + 1)])}"
    )


def find_ratio(wanted: float, ratios: Iterable[float]) -> float | None:
    """The one of ``ratios`` that ``wanted`` means, if any."""
    return next((ratio for ratio in ratios if abs(ratio - wanted) < SNAP), None)


class WidthGrid(NamedTuple):
    """The widths that one network is trained for: s, s + g, ..., l.

    Build it with :func:`make_grid`, which checks it.
    """

    smallest: float
    largest: float
    granularity: float

    @property
    def ratios(self) -> list[float]:
        """All X = (l - s) / g + 1 widths, ascending; the ends are exactly the bounds.

        Source: arXiv:2412.04786, Section 4.3, Eq. 6: X = (l - s) / eps + 1.
        """
        first, last = round(self.smallest / self.granularity), round(self.largest / self.granularity)
        between = [step * self.granularity for step in range(first + 1, last)]
        return [self.smallest, *between, self.largest] if last > first else [self.largest]

    @property
    def upper_steps(self) -> tuple[int, int]:
        """First and last multiple of g for the upper middle width, w3; the range may be empty.

        In print the middle of the bound is in the lower half; here, as in the official code, it is in the upper half
        where it is a multiple of g.

        Source: arXiv:2412.04786, Section 4.3 (Stable Sampling), Eq. 7: the upper half of the bound.
        """
        return self._middle, round(self.largest / self.granularity) - 1

    @property
    def lower_steps(self) -> tuple[int, int]:
        """First and last multiple of g for the lower middle width, w2; the range may be empty.

        Source: arXiv:2412.04786, Section 4.3 (Stable Sampling), Eq. 7: the lower half of the bound.
        """
        return round(self.smallest / self.granularity) + 1, self._middle - 1

    @property
    def _middle(self) -> int:
        return math.ceil(round((self.largest + self.smallest) / 2 / self.granularity, 6))

    @property
    def rule(self) -> SliceRule:
        return SliceRule(self.smallest, self.largest)

    @property
    def arguments(self) -> dict[str, float]:
        """The grid by the names of its flags."""
        return {"smallest_ratio": self.smallest, "largest_ratio": self.largest, "granularity": self.granularity}


def make_grid(smallest: float, largest: float, granularity: float) -> WidthGrid:
    """The widths s, s + g, ..., l, checked.

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
    if largest / granularity > MOST_PARTS + 0.5:
        raise WidthError(f"--granularity {granularity:g} makes more than {MOST_PARTS} widths; give a coarser one")
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
                f"{len(grid.ratios)} widths {_shown(grid.ratios)}: none in the {name} half, and a "
                "step needs one in each half besides the bounds (at least 4 widths). Give a finer --granularity, or "
                "train the largest width alone (--full_warm_epoch at least --epochs)"
            )


def _shown(ratios: list[float], limit: int = 40) -> str:
    names = [f"{ratio:g}" for ratio in ratios]
    return ", ".join(names if len(names) <= limit else [*names[: limit - 1], "...", names[-1]])

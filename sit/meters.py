"""The meters of the published training log: the median of the last values and the mean of all, in one text."""

from __future__ import annotations

from collections import deque

import torch


class SmoothedValue:
    """A number that is updated: over a window and over all updates.

    Args:
        window_size: updates that ``median``, ``avg``, ``max`` and ``value`` look at.
        fmt: text of the meter, with these names and ``global_avg``; None for median and mean of all.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.window: deque[float] = deque(maxlen=window_size)
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self.total, self.count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        """One update that stands for ``n`` values of this mean."""
        self.window.append(value)
        self.total += value * n
        self.count += n

    @property
    def median(self) -> float:
        """Of the window; of an even number, the lower of the two in the middle."""
        return torch.tensor(list(self.window)).median().item()

    @property
    def avg(self) -> float:
        """Mean of the window."""
        return torch.tensor(list(self.window), dtype=torch.float32).mean().item()

    @property
    def global_avg(self) -> float:
        """Mean of all values."""
        return self.total / self.count

    @property
    def max(self) -> float:
        """Largest of the window."""
        return max(self.window)

    @property
    def value(self) -> float:
        """The latest."""
        return self.window[-1]

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Meters by name, as one text."""

    def __init__(self, delimiter: str = "  ") -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """A meter of another form than the usual one."""
        self.meters[name] = meter

    def update(self, **values: float) -> None:
        """One value of each; names that are new get a meter."""
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(float(value))

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

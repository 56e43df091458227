"""What a training run prints and keeps in the published forms, next to the record of ``common.run.metrics``.

The meters show the median of the last values and the mean of all; ``log.txt`` has one JSON object per epoch.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from statistics import fmean, median_low
from typing import Any

import torch
from torch import Tensor

from common.run.engine import StepInfo
from common.run.program import is_main


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
        return median_low(self.window)

    @property
    def avg(self) -> float:
        """Mean of the window."""
        return fmean(self.window)

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


PUBLISHED_LOG = (
    "train_lr", "train_loss", "train_loss_cls", "train_loss_token", "train_loss_logits", "train_loss_cnn", "test_loss",
    "test_acc1", "test_acc5", "epoch",
)  # fmt: skip
"""Keys of a line of the published ``log.txt``, which are ours, too; ``train_lr`` is our ``train_lr_backbone``."""


def published_log(rows: Iterable[Mapping[str, Any]], n_parameters: int) -> str:
    """The published ``log.txt``, one JSON object per epoch, from the rows of ``log.jsonl``."""
    lines = []
    for row in rows:
        if row["event"] == "epoch":
            row = {**row, "train_lr": row["train_lr_backbone"]}
            line = {key: row[key] for key in PUBLISHED_LOG if key in row} | {"n_parameters": n_parameters}
            lines.append(json.dumps(line) + "\n")
    return "".join(lines)


class Logs:
    """What watches the training step: the two learning rates for the record, and the published line of meters.

    Args:
        step: the training step to watch.
        batches: of an epoch.
        print_freq: steps between two lines; 0 prints none. The values stay on the device in between.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        step: Callable[[Any], Mapping[str, Tensor]],
        *,
        batches: int,
        print_freq: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step, self.batches, self.print_freq, self.clock = step, batches, print_freq, clock
        self.epoch = -1
        self.pending: list[tuple[float, Mapping[str, Tensor]]] = []
        self.ended = clock()

    def begin_epoch(self) -> None:
        """Time spent between epochs is nobody's."""
        self.ended = self.clock()

    def step(self, batch: Any) -> Mapping[str, Tensor]:
        """The training step, its terms remembered."""
        self.began = self.clock()
        self.terms = self._step(batch)
        return self.terms

    def after_step(self, info: StepInfo) -> dict[str, float]:
        """Print if it is time; the rates, which the record keeps."""
        rtsm, backbone = info.learning_rates[0], info.learning_rates[-1]
        if self.print_freq and is_main():
            self._remember(info, backbone)
        return {"lr_backbone": backbone, "lr_rtsm": rtsm}

    def _remember(self, info: StepInfo, rate: float) -> None:
        if info.epoch != self.epoch:
            self.epoch, self.pending = info.epoch, []
            self.logger = MetricLogger()
            self.logger.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
            self.times, self.data = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        self.pending.append((rate, {name: value.detach() for name, value in self.terms.items()}))
        now = self.clock()
        self.data.update(self.began - self.ended)
        self.times.update(now - self.ended)
        self.ended = now
        if info.batch % self.print_freq and info.batch + 1 != self.batches:
            return
        for rate, terms in self.pending:
            self.logger.update(lr=rate, **{name: float(value) for name, value in terms.items()})
        self.pending = []
        print(self._line(info.batch), flush=True)

    def _line(self, batch: int) -> str:
        left = timedelta(seconds=int(self.times.global_avg * (self.batches - batch - 1)))
        place = f"[{batch:{len(str(self.batches))}d}/{self.batches}]"
        parts = [f"Epoch: [{self.epoch}]", place, f"eta: {left}", str(self.logger), f"time: {self.times}"]
        parts.append(f"data: {self.data}")
        if torch.cuda.is_available():
            parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
        return "  ".join(parts)

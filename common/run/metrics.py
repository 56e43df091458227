"""What a run shows and keeps: means over images, a progress line, a JSONL record, TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from common.run.errors import UsageError
from common.run.files import append, make_folder, write_atomic
from common.run.launch import get_world_size, reduce_sums
from common.run.program import is_main

FIRST_LINE_S = 2.0
BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"


class Means:
    """Means of named values over images, which add up over ranks and over the parts of an interrupted epoch."""

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        """``sums`` continues where :attr:`sums` of an earlier part stopped."""
        self.sums: dict[str, float] = dict(sums or {})

    def add(self, values: Mapping[str, float], images: int) -> None:
        """Count ``values``, each a mean over ``images`` images."""
        for name, value in values.items():
            self.sums[f"sum/{name}"] = self.sums.get(f"sum/{name}", 0.0) + value * images
            self.sums[f"count/{name}"] = self.sums.get(f"count/{name}", 0.0) + images

    def reduce(self) -> dict[str, float]:
        """Means over all ranks, by name; every rank must have counted the same names."""
        totals = reduce_sums(self.sums)
        return {
            name.removeprefix("sum/"): total / totals["count/" + name.removeprefix("sum/")]
            for name, total in totals.items()
            if name.startswith("sum/")
        }


def clock_text(seconds: float) -> str:
    """``1:02:03``, ``2:03``, or ``?`` where nothing is known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def values_text(values: Mapping[str, float], digits: int = 4) -> str:
    return "  ".join(f"{name} {value:.{digits}g}" for name, value in values.items())


class ProgressLine:
    """Done and total, images per second over all ranks, time left, and named values; on rank 0 only.

    On a terminal a bar that moves; elsewhere a plain line after two seconds and then at every interval, so that log
    files stay short. Use it as a context manager.

    Args:
        title: what is going on, ``epoch 3/10`` for instance.
        total: batches; None where unknown.
        done: batches done before, in an interrupted epoch.
        interval_s: seconds between plain lines.
        file: where to, standard error by default.
        show: False for silence.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        done: int = 0,
        interval_s: float = 10.0,
        file: TextIO | None = None,
        show: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.done = title, total, done
        self.first = done
        self.interval_s, self.clock = interval_s, clock
        self.file = sys.stderr if file is None else file
        self.show = show and is_main()
        self.images = 0
        self.values: dict[str, float] = {}
        self.start = clock()
        self.next_line = self.start + min(FIRST_LINE_S, interval_s)
        self.printed = False
        options: dict[str, Any] = {"delay": 0.5, "leave": False, "dynamic_ncols": True, "bar_format": BAR}
        on_terminal = self.show and self.file.isatty()
        self.bar = tqdm(total=total, initial=done, desc=title, file=self.file, **options) if on_terminal else None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *unused: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.printed:
            self._print()

    @property
    def images_per_second(self) -> float:
        """Over all ranks, each taken to be as fast as this one."""
        seconds = self.clock() - self.start
        return self.images * get_world_size() / seconds if seconds > 0 else 0.0

    def update(self, images: int, values: Mapping[str, float] | None = None) -> None:
        """One more batch, of ``images`` images on this rank; ``values`` are the latest known."""
        self.done += 1
        self.images += images
        if values:
            self.values = dict(values)
        if not self.show:
            return
        if self.bar is not None:
            rate = f"{self.images_per_second:.0f} img/s"
            self.bar.set_postfix_str("  ".join(filter(None, (rate, values_text(self.values)))), refresh=False)
            self.bar.update()
        elif self.clock() >= self.next_line:
            self._print()
            self.printed = True
            self.next_line = self.clock() + self.interval_s

    def line(self) -> str:
        """The plain line: ``epoch 3/10  120/500 batches  812 img/s  0:42 left  loss 1.23  lr 0.001``."""
        of = "" if self.total is None else f"/{self.total}"
        parts = [self.title, f"{self.done}{of} batches", f"{self.images_per_second:.0f} img/s"]
        if self.total is not None:
            fresh = self.done - self.first
            left = (self.clock() - self.start) / fresh * (self.total - self.done) if fresh else math.inf
            parts.append(f"{clock_text(left)} left")
        if self.values:
            parts.append(values_text(self.values))
        return "  ".join(parts)

    def _print(self) -> None:
        print(self.line(), file=self.file, flush=True)


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON knows: no tensors, and null for what is not finite."""
    plain: dict[str, Any] = {}
    for name, value in row.items():
        if hasattr(value, "item") and not isinstance(value, (str, bytes)):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        elif isinstance(value, Mapping):
            value = _plain_row(value)
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        plain[name] = value
    return plain


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a value, those in lists under their indices."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(f"{path}/{index}", item)
    elif isinstance(value, (int, float)):
        yield path, value


class Record:
    """A JSON object per line for every epoch, and TensorBoard's scalars if asked for; written on rank 0.

    Each row has an ``event``: ``start`` (the arguments), ``epoch``, ``step`` (at the log interval, if one is set), or a
    paper's own, which has a ``step`` too. Rows of epochs and steps that a resumed run does again are removed when it
    starts, so that none is there twice. TensorBoard gets the numbers in lists one by one, under ``name/index``.

    Args:
        path: the ``.jsonl`` file; its folder is created. None keeps nothing.
        tensorboard: folder for TensorBoard's files, or None.
        published: name of a file beside it, and what makes its text of all rows: the form that a paper's program
            writes. It is made anew with every row but starts and steps, so that a resumed run repeats nothing.

    Raises:
        UsageError: ``tensorboard`` is given and its package is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        tensorboard: str | os.PathLike[str] | None = None,
        published: tuple[str, Callable[[list[dict[str, Any]]], str]] | None = None,
    ) -> None:
        self.path = Path(path) if path is not None and is_main() else None
        self.published = published
        self.writer = _open_tensorboard(tensorboard) if tensorboard is not None and is_main() else None
        if self.path is not None:
            make_folder(self.path.parent)

    def rewind(self, epoch: int, step: int) -> None:
        """Forget what a run that starts at ``epoch`` after ``step`` steps will write again; (0, 0) forgets all."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, from a run killed while writing it
            event = row.get("event")
            if (
                (event == "start" and step > 0)
                or (event == "epoch" and row["epoch"] < epoch)
                or (event not in ("start", "epoch") and row.get("step", math.inf) <= step)
            ):
                kept.append(line)
        write_atomic(self.path, "".join(line + "\n" for line in kept))

    def replace(self, event: str, rows: Iterable[Mapping[str, Any]], *, step: int) -> None:
        """Append rows of ``event`` at ``step``, all of them or none; those that a run before wrote there go."""
        if self.path is not None and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (row := json.loads(line))["event"] != event or row.get("step") != step]
            if len(kept) < len(lines):
                write_atomic(self.path, "".join(line + "\n" for line in kept))
        self.write(event, *({"step": step, **row} for row in rows))

    def write(self, event: str, *rows: Mapping[str, Any]) -> None:
        """Append rows, all of them or none; TensorBoard gets the numbers of each at its ``step``."""
        plain = [_plain_row(row) for row in rows]
        if self.path is not None:
            append(self.path, "".join(json.dumps({"event": event, **row}) + "\n" for row in plain))
            if self.published is not None and event not in ("start", "step"):
                name, text_of = self.published
                all_rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
                write_atomic(self.path.with_name(name), text_of(all_rows))
        if self.writer is not None and event != "start":
            for row in plain:
                values = {f"{event}/{name}": value for name, value in row.items() if name not in ("step", "epoch")}
                for path, number in chain.from_iterable(_numbers(name, value) for name, value in values.items()):
                    self.writer.add_scalar(path, number, int(row.get("step", 0)))
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _open_tensorboard(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional dependency
    except ModuleNotFoundError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard: pip install 'leanvit[tensorboard]', or leave the flag out "
            "(the JSONL record is always written)"
        ) from error
    return SummaryWriter(os.fspath(folder))

"""Speeds of the rows of published tables: each row against its dense row, round by round, as records.

A paper's adapter gives a function from a row to its network, ``build(row) -> (network, resolution)``; everything
else is the same for all papers. Speeds published on another device cannot be met in images per second, so what is
compared is the ratio to the dense row.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.ledger.results import Record
from common.ledger.tables import Measured, Row, Unavailable, load_tables
from common.measure.benchmark import Clock, NotEnoughMemory, PairedSpeed, Speed, compare, device_name, random_images
from common.run.files import ROOT

COLUMNS = ("fps", "throughput_ips")
LARGE_BATCH = {"cuda": 256, "cpu": 4}
"""Batch of the throughput column: the paper's on a GPU, one that a processor finishes in seconds there."""

LEDGER_PASSES = {"cpu": (1, 5), "gpu": (3, 20)}
"""Warm-up and timed passes of each pair when the ledger asks: one pass of a large network takes seconds on a CPU."""

Build = Callable[[Row], tuple[nn.Module, int]]
"""From a row to its network (called under its device; speed does not depend on the weights) and its resolution."""

TOO_LATE = "the time limit was near"


class Network(NamedTuple):
    """What a row is measured with."""

    model: nn.Module
    resolution: int


@dataclass
class SpeedRun:
    """What a run measured, and what it did not get to."""

    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """``table/row column: why``"""
    errors: list[Exception] = field(default_factory=list)
    """why rows were left out, where that was not expected"""

    def leave_out(self, rows: Iterable[Row], column: str, why: str | Exception) -> None:
        """Note that rows were not measured."""
        if isinstance(why, Exception) and not isinstance(why, Unavailable | NotEnoughMemory):
            self.errors.append(why)
            why = f"{type(why).__name__}: {(str(why).strip() or 'no message').splitlines()[0]}"
        self.left_out += [f"{row.key} {column}: {why}" for row in rows]


def measure_rows(
    rows: Sequence[Row],
    build: Build,
    *,
    device: torch.device,
    columns: Sequence[str] = COLUMNS,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    mode: str = "eager",
    together: bool = False,
    warmup: int = 3,
    rounds: int = 20,
    limit_s: float | None = None,
    progress: str | None = None,
    clock: Clock = time.perf_counter,
    root: Path = ROOT,
) -> SpeedRun:
    """Measure rows of one paper, each in turns with its dense row.

    A network that cannot be built or run leaves its row out, with the error, and the others go on: what is measured on
    a rented machine must not be lost to one row.

    Args:
        rows: rows with published speeds. A dense row among them is measured with those that refer to it; alone if none.
        build: the paper's networks.
        device, dtype: where and how the networks run; they are cast to ``dtype``.
        columns: ``fps`` (batch 1) and ``throughput_ips`` (``batch_size``).
        batch_size: batch of ``throughput_ips``; by default as ``LARGE_BATCH`` says. It is halved for all networks that
            take turns until they fit into the memory.
        mode: ``eager``; ``compiled`` (torch.compile); ``graph``, a pass captured once as a CUDA graph and replayed.
        together: all rows that share a dense row take turns with it, also in columns for which they publish nothing:
            for a device that holds all their networks at once. Else pair by pair.
        warmup, rounds: for each rotation.
        limit_s: time for everything. It is shared among the rotations, so each may get fewer rounds; those that would
            end after it are not started, and are listed as left out.
        progress: label of a progress bar for each rotation.
        clock: source of the time.
        root: folder that holds the papers' tables, where dense rows are looked up.

    Returns:
        A record for each row and column. The record of a dense row is the median over its rotations.
    """
    known = {
        row.key: row for paper in {row.paper for row in rows} for t in load_tables(paper, root=root) for row in t.rows
    }
    jobs = _rotations(rows, columns, together=together)
    run, networks = SpeedRun(), dict[str, Network]()

    def network(row: Row) -> Network:
        if row.key not in networks:
            networks[row.key] = _load(build, row, device, dtype, mode)
        return networks[row.key]

    dense_speeds: defaultdict[tuple[str, str], list[tuple[Speed, int]]] = defaultdict(list)
    started = clock()
    shortest_s = 0.0  # what a rotation takes at least: the most that any has taken to load and for two rounds
    for index, (group, column) in enumerate(jobs):
        begin, waiting = clock(), len(jobs) - index
        share_s = None if limit_s is None else (limit_s - (begin - started)) / waiting
        if share_s is not None and share_s * waiting < shortest_s:
            for late, name in jobs[index:]:
                run.leave_out(late, name, TOO_LATE)
            break
        dense = known[group[0].dense or group[0].key]
        batch = 1 if column == "fps" else batch_size or LARGE_BATCH.get(device.type, 1)
        networks = {row.key: networks[row.key] for row in (dense, *group) if row.key in networks}
        try:
            model, resolution = network(dense)
            images = random_images(batch, resolution, device, dtype)
            taking = {dense.key: _tried(model, images, mode) if together else model}
            for row in (row for row in group if row.key != dense.key):
                if together and share_s is not None and clock() - begin > 0.7 * share_s:
                    run.leave_out([row], column, TOO_LATE)
                    continue
                try:
                    model, side = network(row)
                    if side != resolution:
                        raise ValueError(f"resolution {side} is not the {resolution} of {dense.key}")
                    taking[row.key] = _tried(model, images, mode) if together else model
                except Exception as error:  # whatever one network raises, the others are measured
                    run.leave_out([row], column, error)
            if not together and not any(row.key in taking for row in group):
                continue
            loaded = clock()
            speeds = _compare_that_fits(
                taking,
                images,
                baseline=dense.key,
                warmup=warmup,
                rounds=rounds,
                limit_s=None if share_s is None else share_s - (loaded - begin),
                progress=progress and f"{progress} {', '.join(row.id for row in group)} {column}",
                clock=clock,
            )
        except Exception as error:
            run.leave_out(group, column, error)
            continue
        dense_speed = speeds[dense.key].speed
        shortest_s = max(shortest_s, loaded - begin + 2 * (clock() - loaded) / (dense_speed.rounds + 1))  # a warm-up
        dense_speeds[dense.key, column].append((dense_speed, resolution))
        run.records += [
            record_of(known[key], column, paired, resolution, dense_speed)
            for key, paired in speeds.items()
            if key != dense.key
        ]
    for (key, column), measured in dense_speeds.items():
        if column in known[key].published:
            middle = statistics.median_low(speed.throughput_ips for speed, _ in measured)
            speed, resolution = next(entry for entry in measured if entry[0].throughput_ips == middle)
            run.records.append(record_of(known[key], column, PairedSpeed(speed, 1.0, None), resolution))
    run.records = [replace(record, cuda_graph=mode == "graph") for record in run.records]
    return run


def _rotations(rows: Sequence[Row], columns: Sequence[str], *, together: bool) -> list[tuple[list[Row], str]]:
    """Which rows are measured at a time, and for which column; those of one dense row follow each other."""
    referred = {row.dense for row in rows}
    groups: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.key not in referred), key=lambda row: row.dense):
        groups.setdefault((row.dense or row.key) if together else row.key, []).append(row)
    found = [
        ([row for row in group if together or column in row.published], column)
        for group in groups.values()
        for column in columns
    ]
    return [(group, column) for group, column in found if group]


def _load(build: Build, row: Row, device: torch.device, dtype: torch.dtype, mode: str) -> Network:
    """The row's network on the device, compiled if that is wanted."""
    with torch.device(device):
        model, resolution = build(row)
    model = model.to(device=device, dtype=dtype).eval()
    return Network(torch.compile(model) if mode == "compiled" else model, resolution)  # pyright: ignore[reportArgumentType]


@torch.inference_mode()
def _tried(model: nn.Module, images: Tensor, mode: str) -> nn.Module:
    """The network as it is timed on these images, after a pass, so that it fails by itself."""
    model(images)
    if mode == "graph":
        model = GraphReplay(model, images)
        model(images)
    return model


def _compare_that_fits(models: Mapping[str, nn.Module], images: Tensor, **options: Any) -> Mapping[str, PairedSpeed]:
    """Compare with the largest batch that fits: all images, a half of them, a quarter, ..."""
    while True:
        try:
            return compare(models, images, **options)
        except (NotEnoughMemory, torch.OutOfMemoryError) as error:
            if len(images) == 1:
                raise NotEnoughMemory(str(error)) from error
        images = images[: len(images) // 2]
        if images.is_cuda:
            torch.cuda.empty_cache()


class GraphReplay(nn.Module):
    """One captured pass of a network, replayed: what is left when the launches cost nothing.

    Args:
        model: network in evaluation mode whose pass never waits for the host.
        images: batch of the shape that will be given, on a CUDA device.

    Raises:
        RuntimeError: torch's, if the pass cannot be captured.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self._images = images.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                model(self._images)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._output = model(self._images)

    def forward(self, images: torch.Tensor) -> Any:
        """The output's memory is written again by the next pass."""
        self._images.copy_(images)
        self._graph.replay()
        return self._output


def record_of(row: Row, column: str, paired: PairedSpeed, resolution: int, dense: Speed | None = None) -> Record:
    """What was measured of a row as a record: against its dense row, or a plain value."""
    shared = ("dtype", "batch_size", "compiled", "rounds", "spread_percent", "peak_memory_mb")
    return Record(
        paper=row.paper,
        table=row.table,
        row=row.id,
        column=column,
        value=paired.speed.throughput_ips,
        reference_row=row.dense if dense else None,
        reference_value=dense.throughput_ips if dense else None,
        ratio=paired.speedup if dense else None,
        resolution=resolution,
        **{name: getattr(paired.speed, name) for name in shared},
    )


def as_measured(run: SpeedRun, device: torch.device) -> dict[tuple[str, str], Measured]:
    """What an adapter's ``speeds`` returns: (row id, column) -> value, with its paired ratio."""
    return {
        (record.row, record.column): Measured(
            value=record.value,
            convention=f"{record.dtype}, batch {record.batch_size}{', compiled' if record.compiled else ''}",
            source=f"measured here: {device_name(device)}, torch {torch.__version__}, {record.rounds} rounds",
            ratio=record.ratio,
        )
        for record in run.records
    }


def speeds_for_ledger(
    rows: Sequence[Row], build: Build, *, columns: Sequence[str], device: torch.device | str, progress: bool
) -> dict[tuple[str, str], Measured]:
    """What an adapter's ``speeds`` answers: rows that share a dense row, each pair in turns, with random weights."""
    device = torch.device(device)
    warmup, rounds = LEDGER_PASSES["cpu" if device.type == "cpu" else "gpu"]
    label = "speed" if progress else None
    run = measure_rows(rows, build, device=device, columns=columns, warmup=warmup, rounds=rounds, progress=label)
    for error in run.errors:
        raise error
    return as_measured(run, device)

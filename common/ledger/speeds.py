"""Speeds of the rows of published tables: each row against its dense row, round by round, as records.

A paper's adapter gives a function from a row to its network, ``build(row) -> (network, resolution)``; everything
else is the same for all papers. Speeds published on another device cannot be met in images per second, so what is
compared is the ratio to the dense row.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


@dataclass
class SpeedRun:
    """What a run measured, and what it did not get to."""

    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """``table/row column: why``"""


def measure_rows(
    rows: Sequence[Row],
    build: Build,
    *,
    device: torch.device,
    columns: Sequence[str] = COLUMNS,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    compiled: bool = False,
    warmup: int = 3,
    rounds: int = 20,
    limit_s: float | None = None,
    progress: str | None = None,
    clock: Clock = time.perf_counter,
    root: Path = ROOT,
) -> SpeedRun:
    """Measure rows of one paper, each against its dense row.

    Args:
        rows: rows with published speeds. A dense row among them is measured with those that refer to it; alone if none.
        build: the paper's networks.
        device, dtype, compiled: where and how the networks run; they are cast to ``dtype``.
        columns: ``fps`` (batch 1) and ``throughput_ips`` (``batch_size``).
        batch_size: batch of ``throughput_ips``; by default as ``LARGE_BATCH`` says. It is halved for both networks of a
            pair until they fit into the memory.
        warmup, rounds: for each pair and column.
        limit_s: time for everything. It is shared among the pairs, so each may get fewer rounds; pairs that would end
            after it are not started, and are listed as left out.
        progress: label of a progress bar for each pair.
        clock: source of the time.
        root: folder that holds the papers' tables, where dense rows are looked up.

    Returns:
        A record for each row and column. The record of a dense row is the median over its pairs.
    """
    known = {
        row.key: row for paper in {row.paper for row in rows} for t in load_tables(paper, root=root) for row in t.rows
    }
    referred = {row.dense for row in rows}
    pairs = sorted((row for row in rows if row.key not in referred), key=lambda row: row.dense)
    jobs = [(row, column) for row in pairs for column in columns if column in row.published]
    bench = _Bench(build, device, dtype, compiled)
    run = SpeedRun()
    dense_speeds: defaultdict[tuple[str, str], list[tuple[Speed, int]]] = defaultdict(list)
    started = clock()
    shortest_s = 0.0  # what a pair takes at least: the most that any has taken to load and for two of its rounds
    for index, (row, column) in enumerate(jobs):
        begin = clock()
        left_s = None if limit_s is None else limit_s - (begin - started)
        if left_s is not None and left_s < shortest_s:
            run.left_out += [f"{late.key} {name}: the time limit was near" for late, name in jobs[index:]]
            break
        dense = known[row.dense] if row.dense else row
        try:
            resolution = bench.load(row, dense)
            loaded = clock()
            speeds = bench.compare_that_fits(
                dense.key,
                1 if column == "fps" else batch_size or LARGE_BATCH.get(device.type, 1),
                resolution,
                warmup=warmup,
                rounds=rounds,
                limit_s=None if left_s is None else left_s / (len(jobs) - index) - (loaded - begin),
                progress=progress and f"{progress} {row.id} {column}",
                clock=clock,
            )
        except (Unavailable, NotEnoughMemory) as error:
            run.left_out.append(f"{row.key} {column}: {error}")
            continue
        rounds_done = speeds[dense.key].speed.rounds + 1  # at least one warm-up
        shortest_s = max(shortest_s, loaded - begin + 2 * (clock() - loaded) / rounds_done)
        dense_speeds[dense.key, column].append((speeds[dense.key].speed, resolution))
        if row is not dense:
            run.records.append(_record(row, column, speeds[row.key], resolution, dense, speeds[dense.key].speed))
    for (key, column), measured in dense_speeds.items():
        if column in known[key].published:
            middle = statistics.median_low(speed.throughput_ips for speed, _ in measured)
            speed, resolution = next(entry for entry in measured if entry[0].throughput_ips == middle)
            run.records.append(_record(known[key], column, PairedSpeed(speed, 1.0, None), resolution, None, None))
    return run


def measure_together(
    rows: Sequence[Row],
    build: Build,
    *,
    device: torch.device,
    column: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    mode: str = "eager",
    warmup: int = 3,
    rounds: int = 10,
    limit_s: float | None = None,
    clock: Clock = time.perf_counter,
    root: Path = ROOT,
) -> SpeedRun:
    """Measure rows that share a dense row in one rotation with it: for a device that holds all their networks at once.

    A network that cannot be built or run in this mode is left out with its error, and the others go on: what is
    measured on a rented machine must not be lost to one row.

    Args:
        rows: rows of one paper, with one dense row.
        mode: ``eager``; ``compiled`` (torch.compile); ``graph``, a pass captured once as a CUDA graph and replayed.
        limit_s: time for building, warm-up and rounds.
        build, device, column, dtype, batch_size, warmup, rounds, clock, root: as in ``measure_rows``.
    """
    known = {row.key: row for table in load_tables(rows[0].paper, root=root) for row in table.rows}
    dense = known[rows[0].dense or rows[0].key]
    run, models, resolution = SpeedRun(), {}, 0
    started = clock()
    images: torch.Tensor | None = None
    for row in [dense, *(row for row in rows if row.key != dense.key)]:
        if limit_s is not None and models and clock() - started > 0.7 * limit_s:
            run.left_out.append(f"{row.key} {column} {mode}: the time limit was near")
            continue
        try:
            with torch.device(device):
                model, side = build(row)
            if images is None:
                resolution = side
                images = random_images(batch_size, side, device, dtype)
            elif side != resolution:
                raise ValueError(f"resolution {side} is not the {resolution} of {dense.key}")
            model = model.to(device=device, dtype=dtype).eval()
            with torch.inference_mode():
                model(images)
                if mode == "compiled":
                    model = torch.compile(model)
                elif mode == "graph":
                    model = GraphReplay(model, images)
                model(images)
        except Exception as error:  # whatever one network raises, the others are measured
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            run.left_out.append(f"{row.key} {column} {mode}: {type(error).__name__}: {text}")
            if row is dense:
                return run
            continue
        models[row.key] = model
    assert images is not None
    speeds = compare(
        models,
        images,
        baseline=dense.key,
        warmup=warmup,
        rounds=rounds,
        limit_s=None if limit_s is None else limit_s - (clock() - started),
        clock=clock,
    )
    for key, paired in speeds.items():
        reference = None if key == dense.key else dense
        if reference is None and column not in dense.published:
            continue
        record = _record(known[key], column, paired, resolution, reference, reference and speeds[dense.key].speed)
        run.records.append(replace(record, cuda_graph=mode == "graph"))
    return run


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


class _Bench:
    """The networks of the current pair, on the device."""

    def __init__(self, build: Build, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self._build, self._device, self._dtype, self._compiled = build, device, dtype, compiled
        self._models: dict[str, nn.Module] = {}
        self._resolutions: dict[str, int] = {}

    def load(self, *rows: Row) -> int:
        """Hold these rows' networks and no others; returns the resolution of the first."""
        wanted = {row.key: row for row in rows}
        for key in set(self._models) - set(wanted):
            del self._models[key]
        for key, row in wanted.items():
            if key not in self._models:
                with torch.device(self._device):
                    model, self._resolutions[key] = self._build(row)
                model = model.to(device=self._device, dtype=self._dtype).eval()
                self._models[key] = torch.compile(model) if self._compiled else model  # pyright: ignore[reportArgumentType]
        return self._resolutions[rows[0].key]

    def compare_that_fits(
        self,
        baseline: str,
        batch: int,
        resolution: int,
        *,
        warmup: int,
        rounds: int,
        limit_s: float | None,
        progress: str | None,
        clock: Clock,
    ) -> Mapping[str, PairedSpeed]:
        """Compare with the largest batch that fits: ``batch``, a half of it, a quarter, ...

        Raises:
            NotEnoughMemory: if a single image does not fit.
        """
        while True:
            try:
                return compare(
                    self._models,
                    random_images(batch, resolution, self._device, self._dtype),
                    baseline=baseline,
                    warmup=warmup,
                    rounds=rounds,
                    limit_s=limit_s,
                    progress=progress,
                    clock=clock,
                )
            except (NotEnoughMemory, torch.OutOfMemoryError) as error:
                if batch == 1:
                    raise NotEnoughMemory(str(error)) from error
            batch //= 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def _record(
    row: Row, column: str, paired: PairedSpeed, resolution: int, dense: Row | None, reference: Speed | None
) -> Record:
    """One record; without a dense row it is a plain value."""
    speed = paired.speed
    return Record(
        paper=row.paper,
        table=row.table,
        row=row.id,
        column=column,
        value=speed.throughput_ips,
        reference_row=dense.key if dense else None,
        reference_value=reference.throughput_ips if reference else None,
        ratio=paired.speedup if dense else None,
        dtype=speed.dtype,
        batch_size=speed.batch_size,
        resolution=resolution,
        compiled=speed.compiled,
        rounds=speed.rounds,
        spread_percent=speed.spread_percent,
        peak_memory_mb=speed.peak_memory_mb,
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
    return as_measured(run, device)

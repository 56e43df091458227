"""Speed of networks of the registry as the cost tool measures, prints and records it."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from common.ledger import results
from common.measure.benchmark import (
    BenchmarkError,
    PairedSpeed,
    compare,
    describe_device,
    device_name,
    random_images,
)
from hourglass_swag.tools.costs import clustering_layer, published_row
from hourglass_swag.tools.timing import (
    available_memory_bytes,
    measure_activation_bytes,
    measure_paper_protocol,
    measure_share,
)

LONG_S = 60  # a measurement that is expected to take longer is announced

Speeds = Mapping[str, Mapping[str, PairedSpeed]]
"""Column (``fps``, ``throughput_ips``) -> network -> speed, with its ratio to the last network."""


def check_cpu(
    model: nn.Module, resolution: int, batch_size: int, dtype: torch.dtype, *, passes: int, limit_s: float | None
) -> None:
    """Before a large batch on a CPU: will it fit, and how long will it take? Warns if long.

    Args:
        model: network on the CPU.
        resolution, batch_size, dtype: of the images to come.
        passes: how many are to be made.
        limit_s: time after which no further one is started.

    Raises:
        BenchmarkError: if the memory is too small, naming a batch that fits.
    """
    image = random_images(1, resolution, dtype=dtype)
    per_image = measure_activation_bytes(model, image) + image.nbytes
    free = available_memory_bytes(image.device)
    if free is not None and per_image * batch_size > 0.9 * free:
        raise BenchmarkError(
            f"a batch of {batch_size} needs about {per_image * batch_size / 2**30:.1f} GiB beside the weights, but "
            f"only {free / 2**30:.1f} GiB are free; -b {max(int(0.9 * free / per_image), 1)} or less fits"
        )
    timed = compare({"": model}, image, baseline="", warmup=1, rounds=1, limit_s=LONG_S / 4)[""].speed
    batch_s = batch_size * timed.latency_ms / 1e3
    if batch_s * passes > LONG_S:
        limit = "" if limit_s is None else f" After {limit_s:.0f} s (--limit-s) no further pass is started."
        print(
            f"warning: a CPU is slow: a batch of {batch_size} takes about {batch_s:.1f} s here, {passes} passes about "
            f"{batch_s * passes / 60:.0f} min.{limit} A smaller batch, such as -b {min(4, batch_size)}, gives nearly "
            "the same throughput",
            file=sys.stderr,
        )


def measure_speeds(
    models: Mapping[str, nn.Module],
    resolution: int,
    batches: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    runs: int,
    limit_s: float,
    paper: bool,
) -> Speeds:
    """Time networks in turns, or a single one by the published protocol.

    Args:
        models: name -> network on ``device`` in ``dtype``; the last is the baseline.
        resolution, device, dtype: of the images.
        batches: column -> batch size.
        runs: passes, of which the first quarter is warm-up.
        limit_s: time for one column, without ``paper``.
        paper: follow the published protocol.
    """
    speeds: dict[str, Mapping[str, PairedSpeed]] = {}
    for column, batch in batches.items():
        label = f"Batch {batch}"
        if paper:
            ((name, model),) = models.items()
            speed = measure_paper_protocol(
                model, batch_size=batch, resolution=resolution, device=device, runs=runs, progress=label
            )
            speeds[column] = {name: PairedSpeed(speed, 1.0, None)}
        else:
            speeds[column] = compare(
                models,
                random_images(batch, resolution, device, dtype),
                baseline=list(models)[-1],
                warmup=runs // 4,
                rounds=runs - runs // 4,
                limit_s=limit_s,
                progress=label,
            )
    return speeds


def print_speeds(speeds: Speeds, flops_ratio: float) -> None:
    """Speeds, and with two networks their ratio beside that of their FLOPs; the last line as the published tool's."""
    for column, measured in speeds.items():
        label = "FPS" if column == "fps" else "Throughput"
        own, *others = measured.values()
        for name, pair in list(measured.items())[1:]:
            print(f"{label} of {name}: {pair.speed.throughput_ips:.2f} im/s")
        if others:
            spread = "" if own.speedup_spread_percent is None else f", spread {own.speedup_spread_percent:.1f} %"
            print(f"Speed-up at batch {own.speed.batch_size}: {own.speedup:.3f}{spread}")
            print(f"FLOPs ratio: {flops_ratio:.3f}, realised/theoretical: {own.speedup / flops_ratio:.3f}")
        memory = "" if own.speed.peak_memory_mb is None else f", peak memory {own.speed.peak_memory_mb:.0f} MiB"
        spread = "" if own.speed.spread_percent is None else f", spread {own.speed.spread_percent:.1f} %"
        print(
            f"Batch {own.speed.batch_size}: {own.speed.latency_ms:.2f} ms in {own.speed.rounds} passes{spread}{memory}"
        )
        print(f"{label}: {own.speed.throughput_ips:.2f} im/s")


def print_clustering_share(
    model: nn.Module, resolution: int, device: torch.device, dtype: torch.dtype, batch: int
) -> None:
    """What part of the time the clustering step of a Hourglass network takes; nothing for another network."""
    if (layer := clustering_layer(model)) is not None:
        share = measure_share(model, layer, random_images(batch, resolution, device, dtype))
        print(f"Clustering: {100 * share:.2f} % of the time at batch {batch}")


def write_speeds(
    path: Path, speeds: Speeds, networks: Mapping[str, argparse.Namespace], device: torch.device, command: str
) -> None:
    """Write a record file. A network that is no published row keeps its name, and cannot be filed.

    Args:
        path: file to write.
        speeds: what was measured.
        networks: name -> parsed flags.
        device: where it was measured.
        command: the command line.
    """
    records: list[results.Record] = []
    for column, measured in speeds.items():
        rows = {name: published_row(network, column) for name, network in networks.items()}
        baseline = list(measured)[-1]
        for name, pair in measured.items():
            row, dense, speed = rows[name], rows[baseline], pair.speed
            compared = name != baseline
            records.append(
                results.Record(
                    paper="hourglass_swag",
                    table=row.table if row else "",
                    row=row.id if row else name,
                    column=column,
                    value=speed.throughput_ips,
                    reference_row=(dense.key if dense else baseline) if compared else None,
                    reference_value=measured[baseline].speed.throughput_ips if compared else None,
                    ratio=pair.speedup if compared else None,
                    dtype=speed.dtype,
                    batch_size=speed.batch_size,
                    resolution=networks[name].resolution,
                    compiled=speed.compiled,
                    rounds=speed.rounds,
                    spread_percent=speed.spread_percent,
                    peak_memory_mb=speed.peak_memory_mb,
                )
            )
    origin = results.Origin(results.now(), results.current_commit(), describe_device(device), command)
    results.write_records(path, records, origin)


def device_line(device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    """Device and precision, which belong to every speed."""
    return f"Device: {device_name(device)}, {str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}"

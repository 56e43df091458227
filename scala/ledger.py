"""What the ledger asks of this paper: cost and accuracy of a published row."""

import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common.ledger.tables import Measured, NeedsData, NeedsWeights, Row, load_tables
from common.ledger.weights import find_weights
from common.measure.flops import gmacs
from common.run.files import ROOT
from scala import linear_probe, main_scala
from scala.arguments import NetworkSettings, given
from scala.build import build_model
from scala.loading import resolve_grid


def build(row: Row) -> tuple[Any, float, int]:
    """The row's network with random weights on torch's default device, its width ratio, and its resolution in pixels.

    Raises:
        ValueError: the row names no single width.
    """
    args = main_scala.parse_args(shlex.split(row.arguments))
    bound = resolve_grid(given(args), {}, "").arguments
    if not isinstance(args.eval_ratio, list) or len(args.eval_ratio) != 1:
        raise ValueError(f"row {row.id}: expected one width in --eval_ratio, got {args.eval_ratio}")
    return build_model(NetworkSettings.of(args, **bound), args.num_classes or 1000), args.eval_ratio[0], args.input_size


def costs(row: Row) -> dict[str, Measured]:
    """GMACs and parameters of a row's width, counted on the meta device; nothing for rows without a command."""
    if not row.arguments or row.arguments.split()[0] != "--model":
        return {}
    with torch.device("meta"):
        model, ratio, side = build(row)
    counts, parameters = model.count_ops(ratio), model.count_parameters(ratio) / 1e6
    source = f"count_ops({ratio:g}) of {type(model).__name__}, one image at {side}"
    return {
        "gmacs": Measured(gmacs(counts, "fvcore"), "fvcore", source),
        "params_m": Measured(parameters, "parameters that the width uses", f"those of width ratio {ratio:g}"),
        "macs_g": Measured(counts.macs / 1e9, "macs", source),
    }


def accuracy(
    row: Row, *, data: Path, weights: Path | None, device: torch.device | str, progress: bool
) -> dict[str, Measured]:
    """Accuracy of a row through its own command, or its gain over separate training at the same width.

    Args:
        data: folder that holds val/, and UCF101 in ucf101/ for the rows of linear probing.
        weights: folder with checkpoints of training, see :func:`weights_of`.

    Raises:
        NeedsWeights: naming the files looked for.
        NeedsData: no UCF101.
    """
    if row.arguments.startswith("--data-set ucf101"):
        return _probe_gain(row, data, weights, device)
    if not row.arguments or row.arguments.split()[0] != "--model":
        return {}
    if "top1_gain_points" not in row.published:
        return _evaluate(row, data, weights, device)
    baseline = separate_row(row)
    alone = _evaluate(baseline, data, weights, device)["top1_percent"]
    found = _evaluate(row, data, weights, device)["top1_percent"]
    source = f"{found.source}; minus {alone.value:.3f} % of {baseline.key}"
    return {"top1_gain_points": Measured(found.value - alone.value, found.convention, source)}


def _evaluate(row: Row, data: Path, weights: Path | None, device: torch.device | str) -> dict[str, Measured]:
    file = weights_of(row, weights)
    words = [*shlex.split(row.arguments), "--eval", "--resume", str(file), "--data-path", str(data)]
    if slimmable := row.table == "slimmable":
        words.append("--allow-untrained")
    result = main_scala.main([*words, "--device", str(device), "--amp", "none"])
    convention = f"{result['images']} images, {file.name}, float32{', untrained widths too' if slimmable else ''}"
    source = f"main_scala.py --eval {row.arguments}"
    return {name: Measured(result[name], convention, source) for name in ("top1_percent", "top5_percent")}


def _probe_gain(row: Row, data: Path, weights: Path | None, device: torch.device | str) -> dict[str, Measured]:
    """Top-1 of a linear probe on UCF101 minus that of a probe on the network trained alone at the same width."""
    clips = data / "ucf101"
    if not clips.is_dir():
        raise NeedsData(reason=f"UCF101 in {clips}")
    baseline = separate_row(replace(row, arguments="--model deit_base_"))
    found = []
    for network, ratio in ((row, row.id.rpartition("-")[2]), (baseline, baseline.arguments.split()[-1])):
        words = shlex.split(row.arguments)
        words[words.index("--ratios") + 1] = ratio
        words += ["--data-path", str(clips), "--checkpoint", str(weights_of(network, weights))]
        found.append(linear_probe.main([*words, "--device", str(device)]))
    scala, alone = found
    convention = f"{scala['images']} clips, float32, probe trained anew"
    source = f"linear_probe.py {row.arguments}; minus {alone['top1_percent']:.3f} % of {baseline.key}"
    return {"top1_gain_points": Measured(scala["top1_percent"] - alone["top1_percent"], convention, source)}


@cache
def _baselines() -> dict[tuple[str, str], Row]:
    """(s or b, setting) -> row of separate training."""
    tables = {table.name: table for table in load_tables("scala", root=ROOT)}
    rows = [(size, row) for size in "sb" for row in tables[f"scala_{size}"].rows]
    return {(size, row.id.rpartition("-")[2]): row for size, row in rows if row.series == "separate training"}


def separate_row(row: Row) -> Row:
    """The row of separate training that a gain is over: of the same size and width.

    Backbones other than DeiT have none in the tables; theirs is a network of the same class trained at the one width.

    Raises:
        NeedsWeights: no such row is published.
    """
    size = "b" if "_base_" in row.arguments else "s"
    ratio = float(row.id.rpartition("-")[2])
    if "--model deit_" not in row.arguments:
        model = shlex.split(row.arguments)[1]
        bound = f"--smallest_ratio {ratio:g} --largest_ratio {ratio:g} --granularity {ratio:g} --eval_ratio {ratio:g}"
        name = f"{row.id.rpartition('-')[0]}-separate-{ratio:g}"
        return replace(row, id=name, series="separate training", arguments=f"--model {model} {bound}")
    for name in (f"{ratio:g}", f"{ratio:.2f}", f"{ratio:.1f}"):
        if found := _baselines().get((size, name)):
            return found
    raise NeedsWeights(reason=f"a separately trained network at width {ratio:g}")


def weights_of(row: Row, folder: Path | None) -> Path:
    """The checkpoint of a row in the folder of ``--weights``.

    A file ``NAME.pth``, or ``checkpoint.pth`` in the folder ``NAME`` that training wrote, where NAME is the row, the
    row without its width, or the table's name for the checkpoint.

    Raises:
        NeedsWeights: naming the files looked for.
    """
    names = [row.id, row.id.rpartition("-")[0]]
    if row.checkpoint is not None and row.series != "separate training":  # one name for four networks there
        names.append(row.checkpoint.name)
    return find_weights([file for name in names for file in (f"{name}.pth", f"{name}/checkpoint.pth")], folder)

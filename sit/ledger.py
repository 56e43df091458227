"""What the ledger asks of this paper: costs, speeds and accuracy of a published row."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.ledger.results import Record
from common.ledger.speeds import record_of as row_record
from common.ledger.speeds import speeds_for_ledger
from common.ledger.tables import Measured, NeedsWeights, Row, load_tables
from common.ledger.weights import find_weights
from common.measure.benchmark import BenchmarkError, PairedSpeed
from common.measure.flops import gmacs
from common.run.files import ROOT
from sit.arguments import parse_args
from sit.models import LVViT, count_published_parameters
from sit.models.lvvit import build_lvvit, count_ops
from sit.sizes import SIZES


def build_whole(row: Row) -> LVViT:
    """The row's network as trained, with random weights, on torch's default device."""
    args = parse_args(shlex.split(row.arguments))
    return build_lvvit(args.model, img_size=args.input_size, distillation_type=args.distillation_type)


def build(row: Row) -> tuple[nn.Module, int]:
    """The row's network as deployed (logits only, batch norm folded), and its resolution in pixels."""
    model = build_whole(row)
    return model.deployed(), model.image_shape[0]


def costs(row: Row) -> dict[str, Measured]:
    """Parameters and GMACs of a row, counted on the meta device: nothing is computed and nothing downloaded.

    As published: without the reverse modules, which evaluation does not run; normalisation layers cost something, and
    ``aux_head`` counts as parameters although nothing runs it.
    """
    args = parse_args(shlex.split(row.arguments))
    with torch.device("meta"):
        model = build_whole(row)
    counts = count_ops(model)
    name = f"{args.model} ({args.distillation_type}), one image at {model.img_size}"
    convention = row.convention.get("gmacs", "fvcore")
    kinds = " + ".join(f"{kind} {counts[kind] / 1e9:.3f}" for kind in ("conv", "linear", "matmul"))
    norms = (5 * counts["layer_norm"] + 2 * counts["batch_norm"]) / 1e9
    counted = f"operations of {name}: {kinds} + normalisation {norms:.3f} G"
    return {
        "params_m": Measured(
            count_published_parameters(model) / 1e6, row.convention.get("params_m", ""), f"parameters of {name}"
        ),
        "gmacs": Measured(gmacs(counts, convention), convention, counted),
        "macs_g": Measured(gmacs(counts), "macs", counted),
    }


speeds = partial(speeds_for_ledger, build=build)
"""Speed of rows against their teacher, in turns; random weights, the networks as deployed."""


def published_row(name: str) -> Row:
    """The row of the table of students that a size belongs to.

    Raises:
        BenchmarkError: if it is no published size.
    """
    for table in load_tables("sit", root=ROOT):
        for row in table.rows:
            if row.dense and parse_args(shlex.split(row.arguments)).model == name:
                return row
    raise BenchmarkError(f"{name} has no published row, so --output cannot record it")


def record_of(name: str, speeds: dict[str, PairedSpeed]) -> Record:
    """What a pair measured, as a record."""
    row = published_row(name)
    student, teacher = speeds["student"], speeds["teacher"].speed
    column = "fps" if student.speed.batch_size == 1 else "throughput_ips"
    return row_record(row, column, student, int(SIZES[name].get("img_size", 224)), teacher)


def accuracy(
    row: Row, *, data: Path, weights: Path | None, device: torch.device | str, progress: bool
) -> dict[str, Measured]:
    """Top-1 of a row on ImageNet, through the very command of the row.

    Args:
        data: folder that holds val/.
        weights: folder that holds the row's checkpoint, as NAME.pth, .pth.tar or .pt with NAME from the table.

    Raises:
        NeedsWeights: if it is not there.
    """
    from sit import main

    name = row.checkpoint.name if row.checkpoint else row.id
    names = [f"{name}{suffix}" for suffix in (".pth", ".pth.tar", ".pt", ".safetensors")]
    if weights is None:
        raise NeedsWeights(reason=f"{names[0]} in a folder given by --weights DIR")
    file = find_weights(names, weights)
    command = ["--eval", "--device", str(device), "--finetune", str(file), "--data-path", str(data)]
    words = [*shlex.split(row.arguments), *command, "--batch-size", "128"]
    result = main.main(words)
    convention = f"{result['images']} images, {file.name}, {'float16 autocast' if 'cuda' in str(device) else 'float32'}"
    return {"top1_percent": Measured(result["acc1"], convention, f"sit/main.py --eval {row.arguments}")}

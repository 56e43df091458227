"""What the ledger asks of this paper: costs and accuracy of a published row.

Speeds have no entry of their own: how fast a cascade is depends on the exits that its images take, hence on trained
weights; ``inference.py --dynamic`` measures accuracy, cost and throughput together.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch

from common.ledger.tables import Measured, Row
from common.ledger.weights import find_weights
from common.measure.flops import count_parameters, gmacs
from common.run.checkpoint import read_checkpoint
from dvt.costs import CONVENTION, count_exits, exit_gflops
from dvt.models import MODELS, STAGE_NAMES, create_model
from dvt.models.cascade import Cascade

EQUAL_COST = {"t2-dvt-at-7": "T2t_vit_7", "t2-dvt-at-10": "T2t_vit_10", "t2-dvt-at-12": "T2t_vit_12"}
"""Rows of Table 2 that compare accuracy at the speed of a baseline -> that baseline.

The paper does not say which point of the curve a row is. Speeds of another GPU cannot be met here, so the point taken
is the last one that costs no more than the baseline."""

CURVE_ENDS = {"f6-12-first": 0.0, "f6-12-last": float("inf"), "f6-14-last": 5.28}
"""Rows of Figure 6 -> GFLOPs at which the plotted curve has them; the nearest point of the sweep is taken."""


def parse_row(row: Row) -> argparse.Namespace:
    """Model, data set and classes of a row."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", required=True, choices=sorted(MODELS))
    parser.add_argument("--dataset", default="imagenet")
    parser.add_argument("--num-classes", type=int, default=1000)
    return parser.parse_known_args(shlex.split(row.arguments))[0]


def costs(row: Row) -> dict[str, Measured]:
    """Parameters and GMACs of a row, counted on the meta device.

    Of a cascade, GMACs are those of one exit where the row names one; else they depend on the exits that images take
    and are not returned.
    """
    args = parse_row(row)
    with torch.device("meta"):
        part = model = create_model(args.model, num_classes=args.num_classes)
    source, number = f"operations of {args.model}, one image at 224", int(row.variables.get("exit", 1)) - 1
    name, whole = args.model, "all parameters"
    if isinstance(model, Cascade) and "exit" in row.variables:
        part, name, whole = model.stages[number], f"{name}.{STAGE_NAMES[number]}", f"{whole} of the stage"
    found = {"params_m": Measured(count_parameters(part) / 1e6, whole, f"parameters of {name}")}
    if isinstance(part, Cascade):
        return found
    counts = count_exits(model)
    published = [0.0, *(gmacs(counted.published, CONVENTION) for counted in counts)]
    found["gmacs"] = Measured(published[number + 1], CONVENTION, source)
    if part is not model:
        found["stage_gmacs"] = Measured(published[number + 1] - published[number], CONVENTION, source)
        source += ", resizes as matrix products"
    found["macs_g"] = Measured(gmacs(counts[number].executed), "macs", source)
    return found


def accuracy(
    row: Row, *, data: Path, weights: Path | None, device: torch.device | str, progress: bool
) -> dict[str, Measured]:
    """Top-1 of a row through ``inference.py``; thresholds are the file's, or found on training images without any.

    Args:
        data: folder of the row's data set.
        weights: folder with the checkpoints; None: torch.hub's cache. A file is named after its network,
            ``<model>.pth.tar`` or ``<model>.pth``, on CIFAR ``<model>_<dataset>.pth``.

    Raises:
        NeedsWeights: if there is no such checkpoint.
    """
    from dvt import inference

    args = parse_row(row)
    stem = args.model if args.dataset == "imagenet" else f"{args.model}_{args.dataset}"
    file = find_weights([f"{stem}{end}" for end in (".pth.tar", ".pth", ".pt", ".safetensors")], weights)
    words = [*shlex.split(row.arguments), "--checkpoint_path", str(file), "--data_url", str(data)]
    content = read_checkpoint(file)
    stored = isinstance(content, dict) and {"flops", "dynamic_threshold"} <= content.keys()
    mode = "1" if stored and MODELS[args.model].stages else "2"
    words += ["--eval_mode", mode, "--device", str(device)]
    result = inference.main(words)
    convention = f"{result['images']} images, {file.name}, float32"
    value, point = pick_point(row, result)
    source = f"inference.py {row.arguments} --eval_mode {mode}{point}"
    return {"top1_percent": Measured(value, convention, source)}


def pick_point(row: Row, result: dict[str, Any]) -> tuple[float, str]:
    """The accuracy that a row is about, and which point of the curve it is.

    A row that compares costs at equal accuracy is the cheapest point that reaches the published accuracy, or the best
    point if none does.
    """
    costs_g, accuracies = result["budgeted_batch_classification"]
    points = sorted(zip(costs_g, accuracies, strict=True))
    if len(result["flops"]) == 1:
        return accuracies[0], ""
    if row.id in EQUAL_COST:
        with torch.device("meta"):
            baseline = create_model(EQUAL_COST[row.id])
        (limit,) = exit_gflops(baseline)
        cost, value = [point for point in points if point[0] <= limit][-1] if points[0][0] <= limit else points[0]
    elif row.id in CURVE_ENDS:
        cost, value = min(points, key=lambda point: abs(point[0] - min(CURVE_ENDS[row.id], points[-1][0])))
    else:
        reached = [point for point in points if point[1] >= float(row.published["top1_percent"])]
        cost, value = reached[0] if reached else max(points, key=lambda point: point[1])
    return value, f", at {cost:.3f} G"

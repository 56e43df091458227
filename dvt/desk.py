"""DVT at desk size: a three-exit cascade on handwritten digits, with and without reuse, and early exit that is timed.

Both networks (``DVT_desk``) are trained by ``main.py`` on 1,437 of the 1,797 digits that ship inside scikit-learn.
Thresholds are found on the training digits and judged on the 360 others, as for ImageNet. Full cascade and early exit
take turns on every batch, so the speed-ups of one run are comparable.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.ledger.desk import quiet, train_once
from common.ledger.tables import DeskTable
from common.measure.benchmark import device_name
from common.run.checkpoint import read_checkpoint
from dvt import main as training
from dvt.costs import exit_gflops
from dvt.evaluation import ImageSource, collect_scores
from dvt.exits import EVERYBODY, NOBODY, find_thresholds
from dvt.loading import load_network
from dvt.models import MODELS
from dvt.models.cascade import Cascade
from dvt.throughput import FULL, DynamicResult, measure_dynamic

MODEL = "DVT_desk"
NETWORKS: Mapping[str, Sequence[str]] = {
    "with reuse": (),
    "without reuse": ("--no-feature-reuse", "--no-relation-reuse"),
}
"""Method -> flags of ``main.py``."""

FIXED: Mapping[str, Sequence[float]] = {
    "all leave at exit 1": (EVERYBODY, EVERYBODY, EVERYBODY),
    "all leave at exit 2": (NOBODY, EVERYBODY, EVERYBODY),
}
BUDGETS = (2, 5, 10, 20, 40)
"""Rows of the published sweep of shares: p of 59."""

BATCH = 120
PASSES = {"cpu": 4, "cuda": 20}
"""How often the held-out digits are run through, for the clock's sake."""

FLOOR = 80.0
"""Accuracy in percent below which the training has failed."""

COLUMNS = ("method", "setting", "top1_percent", "mmacs", "throughput_ips", "speedup", "flops_ratio", "realised")


def run(folder: Path, *, device: torch.device | str, force: bool, progress: bool) -> DeskTable:
    """Train both networks once, find thresholds, measure.

    Args:
        folder: where the trained networks are kept.
        force: train again although nothing changed.
        progress: print what the scripts print.
    """
    device = torch.device(device)
    rows: list[dict[str, Any]] = []
    for method, flags in NETWORKS.items():
        name = method.replace(" ", "-")
        words = ["--model", MODEL, "--output", str(folder), "--experiment", name, "--device", str(device), *flags]
        weights = folder / "train" / name / "last.pth.tar"
        train_once(
            ["dvt", name, str(device)], lambda words=words: training.main(words)["exit3_top1"], weights,
            force=force, progress=progress, at_least=FLOOR,
        )  # fmt: skip
        with quiet(not progress):
            results = measure(weights, device)
        for result in results:
            rows.append({"method": method, "setting": result.name, "mmacs": round(1e3 * result.gmacs, 2)})
            rows[-1] |= {name: round(getattr(result, name), 2) for name in COLUMNS if hasattr(result, name)}
            rows[-1]["throughput_ips"] = round(result.throughput_ips)
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return DeskTable(
        title="A three-exit cascade at desk size (1,797 handwritten digits)",
        columns=COLUMNS,
        rows=rows,
        notes=(
            "DVT_desk: three small Transformers at 2x2, 4x4 and 6x6 tokens of 32x32 images; trained on 1,437 digits, "
            "thresholds found on them, accuracy on the 360 others. One image is 0.28 points. p: row of the published "
            "sweep of shares, whose ratio is p / 20. mmacs by the convention 'fvcore', in millions per image.",
            f"Throughput on {device_name(device)}{threads}, float32, batch {BATCH}, {PASSES[device.type]} passes over "
            "the held-out digits; full cascade and early exit in turns. speedup: over the full cascade of the same row "
            "group; flops_ratio: what the mean cost promises; realised: the first over the second.",
        ),
        plot={"x": "mmacs", "y": "top1_percent", "label": "setting", "series": "method"},
    )


def measure(weights: Path, device: torch.device) -> list[DynamicResult]:
    """Full cascade, fixed exits and some budgets of one trained network on the held-out digits."""
    model = load_network(MODEL, read_checkpoint(weights), source=weights, num_classes=10).to(device).eval()
    assert isinstance(model, Cascade)
    images = ImageSource("digits", None, MODELS[MODEL].img_size, BATCH)
    scores = collect_scores(model, images.search(), device=device, title="training digits")
    thresholds = find_thresholds(scores.confidence)
    settings: dict[str, Sequence[float] | Tensor] = {**FIXED, **{f"p = {p}": thresholds[p - 1] for p in BUDGETS}}
    batches = list(images.held_out()) * PASSES[device.type]
    results = measure_dynamic(model, settings, batches, exit_gflops(model), device=device)
    assert results[0].name == FULL
    return results

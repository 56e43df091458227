"""What is measured for the claims of ``tables/claims.toml``: the desk cascade with and without reuse, on Fashion-MNIST.

``main.py`` trains on five sixths of the training images (``fashion_tune``), thresholds are found on the sixth that is
left, and what is reported is measured on the 2,000 test images, which nothing else has seen. Without reuse the stages
of a cascade share nothing, so that each is a network with one exit, trained by itself on the same images in the same
order: these are the single networks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.ledger.evidence import Arms, Job, Run
from common.measure.flops import gmacs
from common.run.checkpoint import read_checkpoint
from common.run.export import export_program
from dvt import main as training
from dvt.arguments import RECIPES
from dvt.costs import count_exits
from dvt.evaluation import ImageSource, Scores, collect_scores
from dvt.exits import EVERYBODY, find_thresholds, thresholds_for_budget
from dvt.loading import load_network
from dvt.models import MODELS
from dvt.models.cascade import Cascade
from dvt.throughput import Alone, measure_dynamic

MODEL = "DVT_desk"
RECIPE = "-b 64 --epochs 8 --warmup-epochs 1 --warmup-lr 1e-3 --lr 3e-3 --no-aug --no-model-ema"
FITTED, TESTED = "fashion_tune", "fashion"
"""Data sets: images trained on and, held out, those that thresholds are found on; and the one of the test images."""

NETWORKS: Mapping[str, str] = {"both": "", "none": "--no-feature-reuse --no-relation-reuse"}
"""What a cascade reuses -> flags of ``main.py``."""

GRIDS = ("3x3", "4x4", "6x6")
"""Names of the single networks: their tokens."""

SWEPT = (2, 5, 10, 15, 20, 25, 30, 40, 50)
"""Rows of the published sweep of shares that are shown and timed, p of 59."""

BATCH, PASSES = 250, 4
"""Images at once, and how often the test images are run through for the clock's sake, of which the fastest counts."""

GUESSED = 10.0
"""Top-1 of a guess, which costs nothing, in percent."""

LIVE = "--epochs 2"


def words(job: Job, name: str) -> list[str]:
    """Flags of ``main.py`` for one network of a seed."""
    fixed = ["--model", MODEL, "--seed", str(job.seed), "--device", job.device, "--output", str(job.folder)]
    return [*fixed, "--experiment", name, *RECIPE.split(), *NETWORKS[name.removeprefix("live-")].split()]


def weights(job: Job, name: str) -> Path:
    return job.folder / "train" / name / "last.pth.tar"


def train(job: Job, reused: str) -> Arms:
    """Train a cascade, and evaluate every exit on the test images.

    Args:
        reused: key of ``NETWORKS``.
    """
    flags = words(job, reused)
    training.main([*flags, "--data-set", FITTED])
    test = [*flags, "--data-set", TESTED, "--eval_checkpoint", str(weights(job, reused))]
    found, costs = training.main(test), mmacs(open_cascade(job, reused))
    return {
        f"exit {k} with {reused}": {"top1_percent": found[f"exit{k}_top1"], "mmacs": cost}
        for k, cost in enumerate(costs, 1)
    }


def open_cascade(job: Job, name: str) -> Cascade:
    """A trained network of this seed, in evaluation mode."""
    file = weights(job, name)
    model = load_network(MODEL, read_checkpoint(file), source=file, num_classes=10).to(job.device).eval()
    assert isinstance(model, Cascade)
    return model


def mmacs(model: torch.nn.Module) -> list[float]:
    """Millions of MACs per image that are executed up to each exit."""
    return [1e3 * gmacs(counted.executed, "macs") for counted in count_exits(model)]


def images_of(data_set: str) -> ImageSource:
    return ImageSource(data_set, None, MODELS[MODEL].img_size, BATCH)


def score(job: Job, model: Cascade, data_set: str) -> Scores:
    """What the exits say about the held-out images of a data set."""
    images = images_of(data_set).held_out()
    return collect_scores(model, images, device=torch.device(job.device), title=f"{data_set} images", show=False)


def sweep(job: Job, model: Cascade) -> dict[str, Tensor]:
    """Thresholds by name: all at exit 1, and the published sweep, found on images that were not trained on."""
    found = find_thresholds(score(job, model, FITTED).confidence).cpu()
    return {"exit 1": torch.full((3,), EVERYBODY)} | {f"p = {p}": row for p, row in enumerate(found, 1)}


def at_cost(costs: Sequence[float], top1_percent: Sequence[float], cost: float) -> float:
    """Top-1 at a cost between two settings: that of their mixture, which costs just as much.

    Below the cheapest setting, images that there is nothing left for are guessed; above the dearest, nothing is gained.
    """
    order = np.argsort(costs, kind="stable")
    return float(np.interp(cost, [0.0, *np.asarray(costs)[order]], [GUESSED, *np.asarray(top1_percent)[order]]))


def measure_budgets(job: Job) -> Arms:
    """Early exit over the published sweep, with and without reuse, and the single networks; cost in executed MACs.

    ``early exit@6x6`` costs on average what the single network of 6x6 tokens costs. ``best single@6x6`` is that of the
    single networks up to this one that is right most often on the images that thresholds are found on.
    """
    alone = open_cascade(job, "none")
    single = [mmacs(stage)[0] for stage in alone.stages]
    top1 = score(job, alone, TESTED).anytime
    arms = {
        f"single: {grid}": {"top1_percent": right, "mmacs": cost}
        for grid, right, cost in zip(GRIDS, top1, single, strict=True)
    }
    held_out = score(job, alone, FITTED).anytime
    for number, grid in enumerate(GRIDS):
        best = max(range(number + 1), key=held_out.__getitem__)
        arms[f"best single@{grid}"] = arms[f"single: {GRIDS[best]}"]
    for family, model in (("early exit", open_cascade(job, "both")), ("early exit without reuse", alone)):
        settings = sweep(job, model)
        outcome = score(job, model, TESTED).leave(mmacs(model), torch.stack(list(settings.values())))
        costs, right = outcome.as_lists()
        for name, *values in zip(settings, right, costs, strict=True):
            if name in shown():
                arms[f"{family}: {name}"] = dict(zip(("top1_percent", "mmacs"), values, strict=True))
        for grid, cost in zip(GRIDS[1:], single[1:], strict=True):
            arms[f"{family}@{grid}"] = {"top1_percent": at_cost(costs, right, cost), "mmacs": cost}
    return arms


def shown() -> list[str]:
    """Names of the settings that are reported and timed."""
    return ["exit 1", *(f"p = {p}" for p in SWEPT)]


def measure_time(job: Job) -> Arms:
    """Early exit that happens, against single networks, in turns on every batch; cost in microseconds per image.

    On a CPU these are seconds on the processor, which other programs disturb less than those of the clock on the wall.
    ``early exit@time of 6x6`` takes as long as the single network of 6x6 tokens.
    """
    cascade, singles = open_cascade(job, "both"), open_cascade(job, "none").stages
    beside = {f"single {grid}": Alone(net, mmacs(net)[0]) for grid, net in zip(GRIDS, singles, strict=True)}
    settings = {name: row for name, row in sweep(job, cascade).items() if name in shown()}
    batches = list(images_of(TESTED).held_out())
    clock = time.process_time if job.device == "cpu" else time.perf_counter
    passes = [
        measure_dynamic(
            cascade,
            settings,
            batches,
            mmacs(cascade),
            device=torch.device(job.device),
            alone=beside,
            show=False,
            clock=clock,
        )
        for _ in range(PASSES)
    ]
    arms = {}
    for rows in zip(*passes, strict=True):
        fastest = max(row.throughput_ips for row in rows)
        arms[f"timed {rows[0].name}"] = {"top1_percent": rows[0].top1_percent, "microseconds": 1e6 / fastest}
    taken = [arms[f"timed {name}"] for name in settings]
    for grid in GRIDS[1:]:
        own = arms[f"timed single {grid}"]["microseconds"]
        right = at_cost([row["microseconds"] for row in taken], [row["top1_percent"] for row in taken], own)
        arms[f"early exit@time of {grid}"] = {"top1_percent": right, "microseconds": own}
    return arms


def live(job: Job) -> Arms:
    """A short run of everything: training, thresholds for a budget, early exit, and an exported program."""
    training.main([*words(job, "live-both"), "--data-set", FITTED, *LIVE.split()])
    model = open_cascade(job, "live-both")
    costs, scores = mmacs(model), score(job, model, TESTED)
    budget = costs[1]
    thresholds = thresholds_for_budget(score(job, model, FITTED).confidence, costs, budget)
    batches = list(images_of(TESTED).held_out())
    name = "budget of exit 2"
    early = measure_dynamic(
        model, {name: thresholds}, batches, costs, device=torch.device(job.device), show=False
    )[1]  # fmt: skip
    export_program(model.cpu(), batches[0][0][:8], job.folder / "live-both.pt2")
    arms = {
        f"live: exit {k}": {"top1_percent": right, "mmacs": cost}
        for k, (right, cost) in enumerate(zip(scores.anytime, costs, strict=True), 1)
    }
    return arms | {f"live: {name}": {"top1_percent": early.top1_percent, "mmacs": early.gmacs}}


_SETTINGS = f"{MODELS[MODEL]}; {RECIPES[MODEL]}; {FITTED} {RECIPE}"

RUNS: dict[str, Run] = {
    **{name: Run(f"{_SETTINGS} {flags}", lambda job, name=name: train(job, name)) for name, flags in NETWORKS.items()},
    "budgets": Run(f"{_SETTINGS}; {SWEPT}", measure_budgets),
    "time": Run(f"{_SETTINGS}; {SWEPT}, {BATCH}, {PASSES}, processor time", measure_time),
    "live": Run(f"{_SETTINGS} {LIVE}", live),
}

"""Accuracy, cost and throughput of early exit, measured together on a data set, against the full cascade.

The images of the validation set are taken in their order, batch by batch. The full cascade and early exit under each
setting of thresholds take turns on every batch, so that a machine that gets slower meanwhile slows all alike. Loading
and copying images is not timed.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.measure.benchmark import synchronize
from common.run.engine import check_labels
from common.run.metrics import ProgressLine
from dvt.dynamic import DynamicClassifier
from dvt.evaluation import Scores
from dvt.exits import NOBODY, complete_thresholds, pick_budget, thresholds_for_budget
from dvt.models.cascade import Exits

FULL = "full cascade"
SHOWN = (1, 5, 10, 15, 20, 30, 40, 50, 59)
"""Rows of the published curve that are measured where no budget is named; p counts from 1."""


@dataclass(frozen=True)
class DynamicResult:
    """Early exit under one setting of thresholds."""

    name: str
    thresholds: list[float]
    exit_percent: list[float]  # share of the images that leave at each exit
    top1_percent: float
    gmacs: float  # mean cost per image, of the exits taken
    throughput_ips: float
    speedup: float  # time of the full cascade over own time, on the same batches
    spread_percent: float  # range of that ratio over the batches, relative to its median
    flops_ratio: float  # cost of the full cascade over own cost: the speed-up promised
    realised: float  # speedup over flops_ratio

    def line(self) -> str:
        """One line for the terminal."""
        left = "/".join(f"{share:.1f}" for share in self.exit_percent)
        return (
            f"{self.name:14}  top1 {self.top1_percent:.3f}  {self.gmacs:.4f} GFLOPs  {self.throughput_ips:.1f} img/s  "
            f"speed-up {self.speedup:.2f} of {self.flops_ratio:.2f} promised  leave {left} %"
        )


class Alone(NamedTuple):
    """A network with one exit that is timed beside a cascade."""

    network: nn.Module  # in evaluation mode, images to logits
    gmacs: float  # what it costs, in the unit of the cascade's costs


@torch.no_grad()
def measure_dynamic(
    cascade: Exits,
    settings: Mapping[str, Sequence[float] | Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    gflops: Sequence[float],
    *,
    device: torch.device,
    compiled: bool = False,
    warmup: int = 1,
    alone: Mapping[str, Alone] | None = None,
    show: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[DynamicResult]:
    """Run the full cascade and early exit on every image of a loader.

    Args:
        cascade: in evaluation mode, on ``device``.
        settings: thresholds by name, one per exit.
        loader: (images, targets).
        gflops: cumulative cost of the exits.
        compiled: compile all of it; what the first batch compiles is not timed.
        warmup: untimed passes over the first batch.
        alone: networks that take turns with the cascade, by names that no setting has.

    Returns:
        The full cascade, then each setting, then each of ``alone``.
    """
    alone = alone or {}
    exits = len(gflops)
    everything = {FULL: [NOBODY] * (exits - 1) + [-NOBODY], **settings}
    classifier = DynamicClassifier(cascade, everything[FULL], compiled=compiled)
    names = [*everything, *alone]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    hits = dict.fromkeys(names, 0)
    left = {name: torch.zeros(exits, dtype=torch.float64) for name in names}
    count = 0
    with ProgressLine("early exit", len(loader) if isinstance(loader, Sized) else None, show=show) as line:
        for number, (images, targets) in enumerate(loader):
            images = images.to(device, non_blocking=True)
            if number == 0 and compiled:
                classifier.warm_up(images)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                if name in everything:
                    classifier.set_thresholds(everything[name])
                run = alone[name].network if name in alone else classifier
                for _ in range(0 if number else warmup):
                    run(images)
                synchronize(device)
                begin = clock()
                output = run(images)
                synchronize(device)
                seconds[name].append(clock() - begin)
                logits = output.logits if name in everything else output
                check_labels(targets, logits.shape[1])
                hits[name] += int((logits.argmax(dim=1).cpu() == targets).sum())
                if name in everything:
                    left[name] += torch.bincount(output.exits.cpu(), minlength=exits)
            count += len(targets)
            line.update(len(targets))
    if not count:
        raise ValueError("early exit: no image could be read; check the folder")
    results: list[DynamicResult] = []
    for name in names:
        shares = (left[name] / count).tolist() if name in everything else [1.0]
        cost_of = gflops if name in everything else [alone[name].gmacs]
        mean = sum(share * cost for share, cost in zip(shares, cost_of, strict=True))
        ratios = [full / own for full, own in zip(seconds[FULL], seconds[name], strict=True)]
        speedup, promised = sum(seconds[FULL]) / sum(seconds[name]), gflops[-1] / mean
        results.append(
            DynamicResult(
                name=name,
                thresholds=torch.as_tensor(everything.get(name, ())).tolist(),
                exit_percent=[100 * share for share in shares],
                top1_percent=100 * hits[name] / count,
                gmacs=mean,
                throughput_ips=count / sum(seconds[name]),
                speedup=speedup,
                spread_percent=100 * (max(ratios) - min(ratios)) / statistics.median(ratios),
                flops_ratio=promised,
                realised=speedup / promised,
            )
        )
    return results


def choose_settings(
    gflops: Sequence[float],
    *,
    budgets: Sequence[float] = (),
    thresholds: Sequence[float] = (),
    search: Scores | None = None,
    stored: Tensor | None = None,
    stored_costs: Sequence[float] = (),
) -> dict[str, Tensor]:
    """Thresholds that a command line asks for, by name.

    Args:
        gflops: cumulative cost of the exits.
        budgets: mean costs in GFLOPs; met on ``search`` where there is one, else picked from the stored curve.
        thresholds: of all exits, or of all but the last.
        search: scores that thresholds are found on.
        stored, stored_costs: of a packed checkpoint, or found: (P, K), and the mean cost of each row; some rows are
            what is taken where nothing is asked for.
    """
    exits = len(gflops)
    chosen: dict[str, Tensor] = {}
    if thresholds:
        chosen["thresholds " + " ".join(f"{value:g}" for value in thresholds)] = complete_thresholds(thresholds, exits)
    for budget in budgets:
        if search is not None:
            chosen[f"budget {budget:g}"] = thresholds_for_budget(search.confidence, gflops, budget)
        elif stored is not None:
            chosen[f"budget {budget:g}"] = pick_budget(stored, stored_costs, gflops, budget)
        else:
            raise ValueError("--budget needs thresholds: a packed checkpoint, or training images (--eval_mode 2)")
    if not chosen and stored is not None:
        chosen = {f"p = {p}": stored[p - 1] for p in SHOWN if p <= len(stored)}
    if not chosen:
        raise ValueError("--dynamic needs --threshold, --budget, or a checkpoint with dynamic_threshold")
    return chosen

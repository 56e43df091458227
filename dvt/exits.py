"""Where images leave a cascade: confidence thresholds for a budget, and accuracy and cost under them.

Paper: Not All Images are Worth 16x16 Words, arXiv:2105.15075, Section 3.3. An image takes the answer of the first exit
k whose largest probability is at least T_k.

The official release walks over the images one by one. Here a budget is a row of a matrix: each exit is sorted once,
and the walk is a cumulative count. Confidences and thresholds are float32 and compared with ``>=``, so ties behave as
in the walk.

Letters: K exits, n images, C classes, P budgets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dvt import BUDGETS

NOBODY = 1e8
"""Threshold of an exit that no image takes; also where a quota cannot be met."""

EVERYBODY = -1e8
"""Threshold of the last exit, which always answers."""


@dataclass(frozen=True)
class Outcome:
    """Accuracy and cost of images that leave by thresholds; P rows, one per budget."""

    top1_percent: Tensor  # (P,) float64
    gmacs: Tensor  # (P,) float32: mean cost per image, of the cumulative costs given
    exit_counts: Tensor  # (P, K) int64: images that leave at each exit

    def as_lists(self) -> list[list[float]]:
        """``[costs, accuracies]``, as the published checkpoints keep the curve."""
        return [self.gmacs.double().tolist(), self.top1_percent.tolist()]


def confidence_and_prediction(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest softmax probability and its class, the lowest class where several share it: (..., C) -> (...), (...).

    The softmax is taken in float32, as published, whatever the dtype.
    """
    return logits.float().softmax(dim=-1).max(dim=-1)


def exit_shares(ratio: float, exits: int = 3) -> Tensor:
    """Shares of the images that are to leave at each exit: a geometric series with this ratio, summing to one.

    Computed as exp(k log u) / sum, k = 1..K, in float32, because a quota is the floor of n times a share.

    Source: the official release; the paper names no equation for it.
    """
    if not ratio > 0:
        raise ValueError(f"the ratio of the exits' shares must be positive, got {ratio}")
    steps = torch.arange(1, exits + 1, dtype=torch.float32)
    weights = torch.exp(torch.tensor([ratio], dtype=torch.float32).log() * steps)
    return weights / weights.sum()


def published_shares(exits: int = 3) -> Tensor:
    """Shares of the 59 published budgets, (P, K); row p - 1 belongs to u = p / 20."""
    return torch.stack([exit_shares(p / 20, exits) for p in range(1, BUDGETS + 1)])


def find_thresholds(confidence: Tensor, shares: Tensor | None = None) -> Tensor:
    """Thresholds under which given shares of these images leave at each exit.

    Exit k lets out the floor(n * share_k) most confident of the images that have not left before. The quota is a
    share of all n. Ties at the threshold leave together. Where the quota is zero, or more than what is left, nobody
    leaves. The last exit takes whoever remains.

    Args:
        confidence: largest probability of each image at each exit, (K, n); taken as float32.
        shares: (K,) or (P, K), of ``exit_shares``; by default those of the published budgets.

    Returns:
        Thresholds, float32, in the shape of ``shares``.

    Raises:
        ValueError: if there is no image, a confidence is not a number, or the shapes do not fit.
    """
    confidence = _check_confidence(confidence)
    exits, count = confidence.shape
    shares = published_shares(exits) if shares is None else shares
    rows = _as_rows(shares, "shares", exits).to(confidence)
    quotas = torch.floor(torch.tensor(float(count)).to(confidence) * rows).long()
    thresholds = torch.full_like(rows, NOBODY)
    thresholds[:, -1] = EVERYBODY
    left = torch.zeros(len(rows), count, dtype=torch.bool, device=confidence.device)
    for k in range(exits - 1):
        ordered, order = confidence[k].sort(descending=True)
        waiting = (~left[:, order]).cumsum(dim=1, dtype=torch.int32)  # (P, n): images met that have not left
        quota = quotas[:, k]
        reached = (quota > 0) & (waiting[:, -1] >= quota)
        place = torch.searchsorted(waiting, quota.to(torch.int32)[:, None]).squeeze(1)
        thresholds[:, k] = torch.where(reached, ordered[place.clamp_max(count - 1)], NOBODY)
        left |= confidence[k] >= thresholds[:, k, None]
    return thresholds.reshape(shares.shape)


def first_exit(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Index of the exit that answers each image, from 0; K where no threshold is passed.

    Confidence (K, n) and thresholds, (K,) or (P, K), give (n,) or (P, n).

    Source: arXiv:2105.15075, Section 3.3: the first exit whose largest probability reaches its threshold.
    """
    confidence = _check_confidence(confidence)
    exits = len(confidence)
    rows = _as_rows(thresholds, "thresholds", exits).to(confidence)
    first = torch.zeros(len(rows), confidence.shape[1], dtype=torch.int64, device=confidence.device)
    staying = torch.ones_like(first, dtype=torch.bool)
    for k in range(exits):
        staying &= ~(confidence[k] >= rows[:, k, None])
        first += staying
    return first.reshape(*thresholds.shape[:-1], -1)


def evaluate_thresholds(confidence: Tensor, correct: Tensor, gmacs: Sequence[float], thresholds: Tensor) -> Outcome:
    """Accuracy and mean cost when each image takes the answer of the first exit it passes.

    Args:
        confidence: (K, n); taken as float32.
        correct: whether the answer of each exit is right, (K, n), bool.
        gmacs: cost of each exit, cumulative: all stages up to it.
        thresholds: (K,) or (P, K). An image that passes none counts as wrong and free, which the last threshold of
            ``find_thresholds`` rules out.

    Raises:
        ValueError: if there is no image, a confidence is not a number, or the shapes do not fit.
    """
    exits, count = confidence.shape
    if correct.shape != confidence.shape or correct.dtype != torch.bool:
        raise ValueError(f"correct must be bool, {(exits, count)}, got {correct.dtype}, {tuple(correct.shape)}")
    costs = torch.as_tensor(gmacs, dtype=torch.float32, device=confidence.device)
    if len(costs) != exits or not bool((costs > 0).all()) or not bool((costs.diff() >= 0).all()):
        raise ValueError(f"flops must be {exits} positive cumulative costs, one per exit, got {list(gmacs)}")
    first = first_exit(confidence, _as_rows(thresholds, "thresholds", exits))
    leaves = [first == k for k in range(exits)]  # each (P, n)
    counts = torch.stack([own.sum(dim=1) for own in leaves], dim=1)
    hits = torch.stack([(own & right).sum(dim=1) for own, right in zip(leaves, correct, strict=True)]).sum(dim=0)
    # an exit's share times its cost, added up one exit after the other in float32, as published
    mean_cost = torch.zeros(len(counts), device=confidence.device)
    for k in range(exits):
        mean_cost = mean_cost + counts[:, k].float() / count * costs[k]
    return Outcome(hits.double() * 100 / count, mean_cost, counts)


def anytime_top1_percent(correct: Tensor) -> list[float]:
    """Accuracy in percent when every image takes the answer of exit 1, of exit 2, ...; ``correct`` is (K, n).

    The fraction is rounded to float32 before it becomes a percentage, as in the published checkpoints.
    """
    if correct.shape[-1] == 0:
        raise ValueError("there is no image to take the accuracy of")
    return ((correct.sum(dim=1).float() / correct.shape[1]).double() * 100).tolist()


def thresholds_for_budget(confidence: Tensor, gmacs: Sequence[float], budget: float) -> Tensor:
    """Thresholds under which these images cost at most ``budget`` on average, and as near to it as shares allow.

    The published curve has 59 budgets; here the ratio of the shares is found by bisection, so that any mean cost can be
    asked for. Ties can keep the cost below the budget, never above.

    Args:
        confidence: (K, n), of the images that the thresholds, (K,), are to be found on.
        gmacs: cumulative cost of each exit.
        budget: mean cost per image; see :func:`check_budget`.

    Source: arXiv:2105.15075, Section 3.3, Eq. 10: the best thresholds under a mean cost B; the paper solves it by a
    genetic algorithm, the release and this function by shares that form a geometric series.
    """
    check_budget(budget, gmacs)
    exits, nothing_right = len(confidence), torch.zeros_like(confidence, dtype=torch.bool)

    def at(logarithm: float) -> tuple[float, Tensor]:
        thresholds = find_thresholds(confidence, exit_shares(math.exp(logarithm), exits))
        return float(evaluate_thresholds(confidence, nothing_right, gmacs, thresholds).gmacs[0]), thresholds

    low, high = -16.0, 16.0  # log of the ratio: everybody at the first exit, everybody at the last
    cost, thresholds = at(high)
    if cost <= budget:
        return thresholds
    fitting = [(0.0, torch.full((exits,), EVERYBODY, device=confidence.device))]
    while high - low > 1e-6:
        middle = (low + high) / 2
        cost, thresholds = at(middle)
        if cost <= budget:
            low = middle
            fitting.append((cost, thresholds))
        else:
            high = middle
    return max(reversed(fitting), key=lambda found: found[0])[1]


def confidences(values: Sequence[float] | Tensor) -> Tensor:
    """Thresholds as float32, (K,).

    Raises:
        ValueError: naming one that is no confidence; one of percent would send every image to the last exit.
    """
    try:
        given = torch.as_tensor(values, dtype=torch.float32).flatten()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected one confidence for each exit, numbers between 0 and 1, got {values!r:.80}"
        ) from error
    for value in given[given.isnan() | ((given > 1 + 1e-6) & (given <= 100))].tolist():
        raise ValueError(f"{value:g} is not a confidence; give numbers between 0 and 1")
    return given


def complete_thresholds(values: Sequence[float] | Tensor, exits: int) -> Tensor:
    """Thresholds of all exits, (K,), of all of them or of all but the last, which always answers.

    Raises:
        ValueError: if there are others, or one is not a number.
    """
    given = confidences(values)
    if len(given) not in (exits - 1, exits):
        raise ValueError(
            f"expected the thresholds of the first {exits - 1} exits (the last always answers), got {len(given)} "
            "numbers"
        )
    return torch.cat([given, given.new_tensor([EVERYBODY])])[:exits]


def pick_budget(thresholds: Tensor, costs: Sequence[float], gmacs: Sequence[float], budget: float) -> Tensor:
    """The row of a stored curve that comes nearest to a budget from below; everybody at exit 1 if none does.

    Args:
        thresholds: ``dynamic_threshold`` of a packed checkpoint, (P, K).
        costs: mean costs of its curve, P numbers.
        gmacs, budget: see :func:`thresholds_for_budget`.
    """
    if len(costs) != len(thresholds):
        raise ValueError(f"the curve has {len(costs)} costs and {len(thresholds)} rows of thresholds")
    check_budget(budget, gmacs)
    fitting = [(cost, row) for row, cost in enumerate(costs) if cost <= budget]
    return thresholds[max(fitting)[1]] if fitting else torch.full(thresholds.shape[1:], EVERYBODY)


def check_budget(budget: float, gmacs: Sequence[float]) -> None:
    """Refuse a mean cost below that of the first exit or above that of the last, naming both."""
    margin = 1e-6 * gmacs[-1]  # the costs may have been through float32
    if not gmacs[0] - margin <= budget <= gmacs[-1] + margin:
        raise ValueError(
            f"a budget of {budget:g} GFLOPs per image is out of reach: the first exit costs {gmacs[0]:.4g}, the last "
            f"{gmacs[-1]:.4g}; give a budget between them"
        )


def _as_rows(values: Tensor, name: str, exits: int) -> Tensor:
    """(K,) or (P, K) as (P, K)."""
    if values.shape[-1] != exits or values.dim() not in (1, 2):
        raise ValueError(f"{name} must be (K,) or (P, K) for K = {exits} exits, got {tuple(values.shape)}")
    return values.reshape(-1, exits)


def _check_confidence(confidence: Tensor) -> Tensor:
    if confidence.dim() != 2 or not confidence.is_floating_point():
        raise ValueError(f"confidences must be numbers of shape (K, n), got {tuple(confidence.shape)}")
    if confidence.shape[1] == 0:
        raise ValueError("there is no image to find or apply thresholds on: are the folders empty?")
    if bool(confidence.isnan().any()):
        raise ValueError("a confidence is not a number (nan): the network's output is not finite")
    return confidence.float()

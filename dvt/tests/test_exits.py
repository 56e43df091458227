"""Threshold search and budgeted evaluation: the walk over the images written out, ties, edges, promises."""

import math
import random

import pytest
import torch
from torch import Tensor

from dvt import exits
from dvt.exits import EVERYBODY, NOBODY


def walk(confidence: list[list[float]], shares: Tensor) -> list[float]:
    """The published procedure for one budget, image by image."""
    last, count = len(confidence) - 1, len(confidence[0])
    done, thresholds = [0] * count, [NOBODY] * (last + 1)
    for k in range(last):
        quota = math.floor(float(torch.tensor(float(count)) * shares[k]))
        met = 0
        for i in sorted(range(count), key=lambda i: -confidence[k][i]):
            if not done[i]:
                met += 1
                if met == quota:
                    thresholds[k] = confidence[k][i]
                    break
        for i in range(count):
            done[i] += confidence[k][i] >= thresholds[k]
    thresholds[last] = EVERYBODY
    return thresholds


def leave_one_by_one(confidence, correct, gmacs, thresholds) -> tuple[float, float, list[int], list[int]]:
    """Accuracy, cost, images per exit and exit per image under one row of thresholds."""
    exit_count, count = len(confidence), len(confidence[0])
    hits, left, chosen = 0, [0] * exit_count, []
    for i in range(count):
        k = next((k for k in range(exit_count) if confidence[k][i] >= thresholds[k]), exit_count)
        chosen.append(k)
        if k < exit_count:
            left[k] += 1
            hits += correct[k][i]
    return (
        100 * hits / count,
        sum(number / count * cost for number, cost in zip(left, gmacs, strict=True)),
        left,
        chosen,
    )


def scores(kind: int, seed: int) -> tuple[Tensor, Tensor, list[float]]:
    """Confidences with no, some, or nothing but ties; whether they are right; costs."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    exit_count, count = draw.choice([2, 3, 3, 3, 4]), draw.choice([1, 2, 5, 11, 19, 20, 60, 257])
    confidence = torch.rand(exit_count, count, generator=generator)
    if kind:
        confidence = (confidence * (levels := (None, 8, 3, 1)[kind])).floor() / levels
    correct = torch.rand(exit_count, count, generator=generator) < 0.7
    return confidence, correct, [round(draw.uniform(0.1, 1), 3) + k for k in range(exit_count)]


@pytest.mark.parametrize("kind", [0, 1, 2, 3], ids=["distinct", "few-ties", "many-ties", "all-same"])
def test_equals_the_walk_and_the_loop(kind):
    for seed in range(12):
        confidence, correct, gmacs = scores(kind, seed)
        others, _, _ = scores(0, seed)  # thresholds are applied to other images than they were found on
        shares = exits.published_shares(len(confidence))
        found = exits.find_thresholds(confidence, shares)
        assert found.tolist() == [walk(confidence.tolist(), row) for row in shares]
        for images in (confidence, others):
            outcome = exits.evaluate_thresholds(images, correct, gmacs, found)
            for row, thresholds in enumerate(found.tolist()):
                top1, cost, left, chosen = leave_one_by_one(images.tolist(), correct.tolist(), gmacs, thresholds)
                assert outcome.top1_percent[row].item() == pytest.approx(top1, rel=1e-12)
                assert outcome.gmacs[row].item() == pytest.approx(cost, rel=1e-6)
                assert outcome.exit_counts[row].tolist() == left
                if row % 20 == 0:
                    assert exits.first_exit(images, found[row]).tolist() == chosen


def test_quota_is_a_share_of_all_and_ties_leave_together():
    confidence = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1], [0.2] * 8, [0.3] * 8])
    # 2 of 8 are asked for; three share the second place. Then 5 are asked for, and only 4 are left
    found = exits.find_thresholds(confidence, torch.tensor([0.25, 0.7, 0.05]))
    assert found.tolist() == [0.5, NOBODY, EVERYBODY]
    counts = exits.evaluate_thresholds(confidence, confidence > 0.15, [1, 2, 3], found).exit_counts
    assert counts.tolist() == [[4, 0, 4]]
    # a quota of zero leaves the exit to nobody
    assert exits.find_thresholds(confidence, torch.tensor([0.1, 0.5, 0.4])).tolist() == pytest.approx(
        [NOBODY, 0.2, EVERYBODY]
    )


def test_an_image_that_passes_nothing_is_wrong_and_free():
    confidence = torch.tensor([[0.2, 0.9], [0.3, 0.9], [0.4, 0.9]])
    thresholds = torch.tensor([0.5, 0.5, 0.5])
    outcome = exits.evaluate_thresholds(confidence, torch.ones(3, 2, dtype=torch.bool), [1, 2, 4], thresholds)
    assert outcome.as_lists() == [[0.5], [50.0]]
    assert exits.first_exit(confidence, thresholds).tolist() == [3, 0]


def test_published_shares():
    shares = exits.published_shares()
    assert shares.shape == (59, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(59))
    torch.testing.assert_close(shares[:, 1] / shares[:, 0], torch.arange(1, 60) / 20)  # geometric with ratio u
    torch.testing.assert_close(shares[19], torch.full((3,), 1 / 3))
    torch.testing.assert_close(shares[0], torch.tensor([0.9501, 0.0475, 0.0024]), atol=5e-5, rtol=0)
    torch.testing.assert_close(shares[58], torch.tensor([0.0790, 0.2332, 0.6878]), atol=5e-5, rtol=0)


def test_on_distinct_confidences_the_shares_are_met():
    confidence = torch.rand(3, 1000, generator=torch.Generator().manual_seed(5))
    shares = exits.published_shares()
    counts = exits.evaluate_thresholds(
        confidence, confidence > 2, [1, 2, 3], exits.find_thresholds(confidence, shares)
    ).exit_counts
    assert torch.equal(counts[:, :2], (torch.tensor(1000.0) * shares[:, :2]).floor().long())


def test_prediction_takes_the_lowest_class_of_a_tie():
    confidence, prediction = exits.confidence_and_prediction(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]))
    assert prediction.tolist() == [1, 0]
    assert confidence[1].item() == pytest.approx(1 / 3)
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    confidence, prediction = exits.confidence_and_prediction(logits)
    assert confidence.dtype == torch.float32
    assert torch.equal(prediction, logits.argmax(-1))


@pytest.mark.parametrize("levels", [None, 12])
def test_a_budget_is_met_from_below(levels):
    confidence = torch.rand(3, 4000, generator=torch.Generator().manual_seed(1))
    if levels:
        confidence = (confidence * levels).floor() / levels
    right, gmacs = torch.ones(3, 4000, dtype=torch.bool), [0.47, 1.46, 3.5]
    for budget in (0.47, 0.48, 0.9, 1.46, 2.2, 3.4, 3.5):
        thresholds = exits.thresholds_for_budget(confidence, gmacs, budget)
        cost = exits.evaluate_thresholds(confidence, right, gmacs, thresholds).gmacs.item()
        assert cost <= budget + 1e-6
        assert cost > budget - (0.6 if levels else 0.003)
    for impossible in (0.4, 3.6):
        with pytest.raises(ValueError, match=r"first exit costs 0\.47, the last 3\.5"):
            exits.thresholds_for_budget(confidence, gmacs, impossible)


def test_a_stored_curve_is_read_from_below():
    thresholds, costs, gmacs = torch.arange(9.0).view(3, 3), [0.9, 1.5, 1.2], [0.5, 1.0, 2.0]
    assert exits.pick_budget(thresholds, costs, gmacs, 1.3).tolist() == [6, 7, 8]
    assert exits.pick_budget(thresholds, costs, gmacs, 2.0).tolist() == [3, 4, 5]
    assert exits.pick_budget(thresholds, costs, gmacs, 0.6).tolist() == [EVERYBODY] * 3
    with pytest.raises(ValueError, match="out of reach"):
        exits.pick_budget(thresholds, costs, gmacs, 2.1)
    with pytest.raises(ValueError, match="2 costs and 3 rows"):
        exits.pick_budget(thresholds, costs[:2], gmacs, 1.3)


def test_bad_input_is_named():
    confidence, shares = torch.rand(3, 4), exits.published_shares()
    right = torch.ones(3, 4, dtype=torch.bool)
    thresholds = exits.find_thresholds(confidence, shares)
    with pytest.raises(ValueError, match="are the folders empty"):
        exits.find_thresholds(torch.rand(3, 0), shares)
    with pytest.raises(ValueError, match="are the folders empty"):
        exits.evaluate_thresholds(torch.rand(3, 0), right[:, :0], [1, 2, 3], thresholds)
    with pytest.raises(ValueError, match="no image"):
        exits.anytime_top1_percent(right[:, :0])
    with pytest.raises(ValueError, match="nan"):
        exits.find_thresholds(confidence.clone().fill_(math.nan), shares)
    with pytest.raises(ValueError, match=r"K = 3 exits, got \(59, 2\)"):
        exits.find_thresholds(confidence, shares[:, :2])
    with pytest.raises(ValueError, match=r"K = 3 exits, got \(59, 2\)"):
        exits.evaluate_thresholds(confidence, right, [1, 2, 3], thresholds[:, :2])
    with pytest.raises(ValueError, match="correct must be bool"):
        exits.evaluate_thresholds(confidence, right.float(), [1, 2, 3], thresholds)
    for costs in ([1, 2], [3, 2, 1], [0, 1, 2]):
        with pytest.raises(ValueError, match="3 positive cumulative costs"):
            exits.evaluate_thresholds(confidence, right, costs, thresholds)
    with pytest.raises(ValueError, match="must be positive"):
        exits.exit_shares(0.0)

"""What the claims are measured with: stages that share nothing, costs read off lines, and every run at test size."""

from pathlib import Path

import pytest
import torch

from common.ledger.evidence import Job, load_claims
from common.tests.few_images import few_images
from dvt import evidence, main, models
from dvt.costs import count_exits
from dvt.evidence import RUNS, at_cost, weights
from dvt.losses import summed_loss
from dvt.models import create_model
from dvt.models.cascade import Cascade
from dvt.throughput import FULL


def test_every_run_measures_what_the_claims_compare(tmp_path: Path, monkeypatch) -> None:
    few_images(monkeypatch, tmp_path, train=slice(360), val=slice(120))
    entry = models.MODELS["DVT_desk"]
    tiny = models.Entry("deit", entry.options | {"embed_dim": 24, "depth": 1}, entry.stages)
    monkeypatch.setitem(models.MODELS, "DVT_desk", tiny)
    monkeypatch.setattr(evidence, "RECIPE", evidence.RECIPE.replace("--epochs 8", "--epochs 2"))
    monkeypatch.setattr(evidence, "LIVE", "--epochs 1")
    monkeypatch.setattr(evidence, "PASSES", 1)
    job = Job(3, tmp_path)
    arms = {}
    for name, run in RUNS.items():
        found = run.measure(job)
        assert not found.keys() & arms.keys(), name
        arms |= found
    for claim in load_claims("dvt"):
        for comparison in claim.comparisons:
            for arm in (*comparison.arm, *comparison.against):
                assert comparison.metric in arms[arm], arm
    assert all(0 <= values["top1_percent"] <= 100 for values in arms.values())

    costs = {name: [arms[f"exit {k} with {name}"]["mmacs"] for k in (1, 2, 3)] for name in evidence.NETWORKS}
    assert all(costs["none"][0] == found[0] < costs["none"][1] < costs["none"][2] for found in costs.values())
    assert costs["none"][1] < costs["both"][1]
    single = [arms[f"single: {grid}"] for grid in evidence.GRIDS]
    assert sum(values["mmacs"] for values in single) == pytest.approx(costs["none"][2])
    for k, values in enumerate(single, 1):  # the same network, by two programs
        assert values["top1_percent"] == pytest.approx(arms[f"exit {k} with none"]["top1_percent"], abs=1e-4)
        timed = arms[f"timed single {evidence.GRIDS[k - 1]}"]
        assert timed["top1_percent"] == pytest.approx(values["top1_percent"], abs=1e-4)
    assert arms["best single@3x3"] == single[0]
    assert arms["best single@6x6"] in single
    assert arms["early exit: exit 1"]["top1_percent"] == pytest.approx(arms["exit 1 with both"]["top1_percent"])
    assert arms[f"timed {FULL}"]["top1_percent"] == pytest.approx(arms["exit 3 with both"]["top1_percent"], abs=1e-4)
    assert arms[f"timed {FULL}"]["microseconds"] > arms["timed exit 1"]["microseconds"] > 0
    for name in evidence.shown():  # early exit that happens gives the answers that are counted
        counted, timed = arms[f"early exit: {name}"], arms[f"timed {name}"]
        assert timed["top1_percent"] == pytest.approx(counted["top1_percent"], abs=1.0)
    assert [arm for arm in arms if arm.startswith("live: ")] == list(arms)[-4:]
    assert torch.export.load(tmp_path / "live-both.pt2").module()(torch.zeros(3, 3, 32, 32))[2].shape == (3, 10)

    # thresholds are found on held-out images of the training set, which the reported ones are not part of
    torch.save(create_model("DVT_desk", num_classes=10).state_dict(), weights(job, "both"))
    assert len(evidence.score(job, evidence.open_cascade(job, "both"), evidence.FITTED).correct[0]) == 60
    assert len(evidence.score(job, evidence.open_cascade(job, "both"), evidence.TESTED).correct[0]) == 120


def test_stages_without_reuse_are_trained_as_if_alone() -> None:
    torch.manual_seed(0)
    model = create_model("DVT_desk", num_classes=10, feature_reuse=False, relation_reuse=False)
    assert isinstance(model, Cascade)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    criterion = torch.nn.CrossEntropyLoss()
    summed_loss(criterion, model(images), targets)[0].backward()
    for stage in model.stages:
        together = [parameter.grad for parameter in stage.parameters()]
        alone = torch.autograd.grad(criterion(stage(images), targets), list(stage.parameters()))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other)
    assert main.parse_args(evidence.words(Job(0, Path()), "none")).clip_grad is None  # its norm would couple them


def test_the_desk_network_has_three_exits_of_growing_grids() -> None:
    with torch.device("meta"):
        model = create_model("DVT_desk", num_classes=10)
    assert isinstance(model, Cascade)
    assert [f"{rows}x{columns}" for rows, columns in (stage.grid for stage in model.stages)] == list(evidence.GRIDS)
    assert len(count_exits(model)) == 3


def test_a_cost_between_two_settings_is_that_of_their_mixture() -> None:
    assert at_cost([20.0, 5.0, 10.0], [90.0, 50.0, 80.0], 15.0) == pytest.approx(85.0)
    assert at_cost([20.0, 5.0, 10.0], [90.0, 50.0, 80.0], 6.0) == pytest.approx(56.0)
    assert at_cost([20.0, 5.0, 10.0], [90.0, 50.0, 80.0], 2.5) == pytest.approx(30.0)  # every second image is guessed
    assert at_cost([20.0, 5.0, 10.0], [90.0, 50.0, 80.0], 99.0) == pytest.approx(90.0)

"""What the claims are measured with: controls that change nothing at full size, costs read off lines, and the runs."""

from pathlib import Path

import pytest
import torch

from common.hosts import lean
from common.ledger.evidence import Job, load_claims
from hourglass_swag import evidence
from hourglass_swag.evidence import CONTROLS, RUNS, SWEEPS, Dropping, Pooling, between, measure_methods
from hourglass_swag.models import create


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = create("vit_desk").eval()
    for parameter in net.parameters():  # heads begin at zero
        torch.nn.init.normal_(parameter, std=0.05)
    return net


@pytest.mark.parametrize("method", [Pooling(2, 8), Dropping(2, 64)])
def test_controls_change_nothing_at_full_size(net, method) -> None:
    images = torch.rand(3, 3, 32, 32)
    fast = lean(net, method)
    assert torch.allclose(fast(images), net(images), atol=1e-5)
    assert torch.allclose(fast.features(images), lean(net).features(images), atol=1e-5)


@pytest.mark.parametrize(("method", "tokens"), [(Pooling(3, 5), 26), (Dropping(3, 25), 26)])
def test_controls_leave_as_many_tokens_as_clusters(net, method, tokens: int) -> None:
    fast = lean(net, method)
    assert fast.tokens_per_layer() == [65] * 3 + [tokens] * 6
    assert fast.features(torch.rand(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    assert lean(net, "hourglass", layer=3, clusters=25).gmacs() > fast.gmacs()


def test_dropping_keeps_each_kept_patch_and_others_in_each_image(net) -> None:
    torch.manual_seed(0)
    found = lean(net, Dropping(0, 20)).run(torch.rand(4, 3, 32, 32)).membership()[:, 1:, 1:]
    assert (found.sum(1) == 1).all()  # every patch has one token
    assert len({tuple(image.argmax(0).tolist()) for image in found}) == 4


def test_a_cost_between_two_settings_is_their_mixture() -> None:
    points = [{"mmacs": cost, "top1_percent": top1} for cost, top1 in ((20.0, 90.0), (10.0, 80.0), (5.0, 50.0))]
    assert between(points, 15.0) == {"mmacs": 15.0, "top1_percent": 85.0}
    assert between(points, 6.0) == pytest.approx({"mmacs": 6.0, "top1_percent": 56.0})
    assert between(points, 20.0) == points[0]
    assert between(points, 4.0) is between(points, 21.0) is None


def test_the_runs_measure_every_arm_of_the_claims(net, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    torch.save(net.state_dict(), folder / "weights.pth")
    monkeypatch.setattr(evidence, "SWEEPS", {family: [rows[0], rows[-1]] for family, rows in SWEEPS.items()})
    monkeypatch.setattr(evidence, "SIDES", (28, 12))
    arms = measure_methods(Job(0, tmp_path), images=40)
    for claim in load_claims("hourglass_swag"):
        for comparison in claim.comparisons:
            for arm in (*comparison.arm, *comparison.against):
                assert comparison.metric in arms[arm]
    assert arms["dense"]["cosine"] == 1.0
    assert all(-1 <= values["cosine"] <= 1 + 1e-6 and 0 <= values["top1_percent"] <= 100 for values in arms.values())
    assert arms["hourglass@0.7"]["mmacs"] == pytest.approx(0.7 * arms["dense"]["mmacs"])


def test_training_is_the_ordinary_program(tmp_path: Path) -> None:
    words = evidence.RECIPE.replace("--epochs 12", "--epochs 1 --warmup-epochs 0").replace("fashion", "digits")
    arms = evidence.train_dense(Job(0, tmp_path), words)
    assert 0 < arms["dense"]["top1_percent"] <= 100
    assert (tmp_path / "dense" / "weights.pth").is_file()
    assert list(RUNS) == ["dense", "methods", "live"]
    assert set(CONTROLS) < set(SWEEPS)


def test_the_live_run_trains_evaluates_and_exports(tmp_path: Path) -> None:
    words = evidence.LIVE.replace("--epochs 2", "--epochs 1").replace("fashion", "digits")
    arms = evidence.measure_live(Job(0, tmp_path), words, data_set="digits")
    assert list(arms) == [f"live: {name}" for name in evidence.LIVE_ROWS]
    assert all(10 < values["top1_percent"] <= 100 for values in arms.values())
    images = torch.rand(2, 3, 32, 32)
    program = torch.export.load(tmp_path / "live" / "hourglass.pt2").module()
    weights = tmp_path / "live" / "weights.pth"
    net = create("hourglass_vit_desk", clustering_location=2, num_cluster=16, image_size=32, weights=weights)
    assert torch.allclose(program(images), net.eval()(images), atol=1e-5)

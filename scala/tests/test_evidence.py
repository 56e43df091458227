"""What the claims are measured with, at test size: every arm is made, and the sides differ in what they should."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.ledger.evidence import Arms, Job, load_claims
from scala import evidence
from scala.evidence import RATIOS, RUNS

SMALL: dict[str, Any] = {"epochs": 1, "data": "--data-set digits --workers 0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def arms(folder: Path) -> Arms:
    """Of all runs, for one epoch of six steps, which trains the slim widths too."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "RECIPE", evidence.RECIPE.replace("--batch-size 50", "--batch-size 250"))
        patch.setattr(evidence, "JOINT", evidence.JOINT.replace("--full_warm_epoch 1", "--full_warm_epoch 0"))
        job = Job(5, folder)
        found |= evidence.train_separate(job, **SMALL) | evidence.slice_plain(job, data=SMALL["data"])
        found |= evidence.train_scala(job, **SMALL) | evidence.train_slimmable(job, **SMALL)
        found |= evidence.measure_live(job, **SMALL)
    return found


def test_the_runs_measure_every_arm_of_the_claims(arms: Arms) -> None:
    for claim in load_claims("scala"):
        for comparison in claim.comparisons:
            for arm in (*comparison.arm, *comparison.against):
                assert comparison.metric in arms[arm]
    assert list(arms) == [
        f"{family}: r = {ratio:g}" for family in ("separate", "sliced", "scala", "slimmable") for ratio in RATIOS
    ] + [f"live: r = {ratio:g}" for ratio in RATIOS]
    assert list(RUNS) == ["separate", "sliced", "scala", "slimmable", "live"]
    assert all(0 <= values["top1_percent"] <= 100 for values in arms.values())


def test_a_width_costs_the_same_however_it_was_trained(arms: Arms) -> None:
    for ratio in RATIOS:
        costs = {arms[f"{family}: r = {ratio:g}"]["mmacs"] for family in ("separate", "sliced", "scala", "slimmable")}
        assert len(costs) == 1
    assert arms["scala: r = 0.5"]["mmacs"] < 0.3 * arms["scala: r = 1"]["mmacs"]


def test_the_sliced_network_is_the_separate_one_of_full_width(arms: Arms) -> None:
    assert arms["sliced: r = 1"] == arms["separate: r = 1"]


def arguments(folder: Path, name: str) -> dict[str, Any]:
    found = torch.load(folder / name / "checkpoint.pth", weights_only=False)["args"]
    return {key: value for key, value in dict(found).items() if key != "output_dir"}


def test_both_sides_train_alike_but_for_what_is_compared(arms: Arms, folder: Path) -> None:
    del arms
    scala, slimmable, plain = (arguments(folder, name) for name in ("scala", "slimmable", "separate-1"))
    assert scala["seed"] == 5

    def differences(other: dict[str, Any]) -> dict[str, Any]:
        assert scala.keys() == other.keys()
        return {key: other[key] for key in scala if scala[key] != other[key]}

    assert differences(slimmable) == {"transfer_type": "US", "ce_coefficient": 0.0, "isolated_activation": False}
    assert differences(plain) == {"full_warm_epoch": 1, "granularity": 0.03125, "lr": 2e-3}
    narrow = arguments(folder, "separate-0.25")
    assert differences(narrow) == {"full_warm_epoch": 1, "granularity": 0.03125, "embed_dim": evidence.WIDTH // 4}


def test_the_live_run_exports_a_width(arms: Arms, folder: Path) -> None:
    del arms
    from scala.standalone import load_standalone

    images = torch.randn(2, 3, 32, 32)
    alone = load_standalone(folder / "live" / "half.safetensors")
    program = torch.export.load(folder / "live" / "half.pt2").module()
    torch.testing.assert_close(program(images), alone(images), rtol=1e-4, atol=1e-5)

"""What the claims are measured with: every run at the size of a test, and students that differ in one thing alone."""

from pathlib import Path

import pytest
import torch

from common.ledger.evidence import Arms, Job, load_claims
from common.tests.few_images import few_images
from sit import evidence, main
from sit.evidence import LEARNT, RATIOS, RUNS, mmacs, student_words


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Job, dict[str, dict[str, float]]]:
    """Job and arms of all runs: one epoch each, on every fortieth image."""
    job = Job(0, tmp_path_factory.mktemp("evidence"))
    arms: Arms = {}
    with pytest.MonkeyPatch.context() as patch:
        few_images(patch, job.folder, train=slice(None, None, 40), val=slice(None, None, 40))
        patch.setattr(evidence, "COMMON", evidence.COMMON.replace("--batch-size 128", "--batch-size 50"))
        for name in ("TEACHER", "STUDENT"):
            patch.setattr(evidence, name, f"{getattr(evidence, name)} --epochs 1 --linear-warmup 0")
        for name in ("LIVE_TEACHER", "LIVE_STUDENT"):
            patch.setattr(evidence, name, "")
        for run in RUNS.values():
            arms |= run.measure(job)
    return job, arms  # pyright: ignore[reportReturnType]


@pytest.mark.filterwarnings("ignore")
def test_the_runs_measure_every_arm_of_the_claims(measured) -> None:
    _, arms = measured
    for claim in load_claims("sit"):
        for comparison in claim.comparisons:
            for arm in (*comparison.arm, *comparison.against):
                assert comparison.metric in arms[arm]
    assert all(0 < values["top1_percent"] <= 100 for values in arms.values())
    assert {name for name in arms if name.startswith("live: ")} == {"live: teacher", "live: FRD 0.5"}
    assert list(RUNS)[-1] == "live"


def test_costs_are_what_a_deployed_network_executes(measured) -> None:
    _, arms = measured
    width, hidden, tokens = 64, 3 * 64, 16
    per_token = 4 * width * width + 2 * width * hidden
    blocks = 6 * ((tokens + 1) * per_token + 2 * (tokens + 1) ** 2 * width)
    stem = 9 * (16**2 * 3 * 16 + 8**2 * 16 * 32 + 4**2 * 32 * 64)
    assert arms["dense"]["mmacs"] == pytest.approx((stem + blocks + width * 10) / 1e6)
    for learnt in LEARNT:
        assert mmacs(0.5) == arms[f"{learnt}: 0.5"]["mmacs"] < arms[f"{learnt}: 0.7"]["mmacs"] < arms["dense"]["mmacs"]


def test_the_live_run_exports_what_it_trained(measured) -> None:
    job, _ = measured
    network = torch.export.load(job.folder / "live-student" / "student.pt2").module()
    assert network(torch.randn(5, 3, 32, 32)).shape == (5, 10)


def test_students_differ_only_in_what_they_learn_from(measured) -> None:
    job, _ = measured
    for ratio in RATIOS:
        found = {learnt: vars(main.parse_args(student_words(job, learnt, ratio))) for learnt in LEARNT}
        weights = {learnt: (one.pop("lambda_token"), one.pop("lambda_logits")) for learnt, one in found.items()}
        assert weights == {"labels": (0, 0), "logits": (0, 2), "FRD": (2, 2)}
        folders = {one.pop("output_dir") for one in found.values()}
        assert len(folders) == len(LEARNT)
        assert found["labels"] == found["logits"] == found["FRD"]
        heads = [_trained(Path(folder))["head.weight"] for folder in folders]
        assert not any(torch.equal(heads[0], other) for other in heads[1:])


def _trained(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=False)["model"]

"""The carried reference vectors, through the runner that takes any folder of the format."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.tests.reference import Case, read_cases, run_cases
from scala.tests import cases as runner

VECTORS = Path(__file__).parent / "vectors"
CASES, STORED = read_cases(VECTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_vector(case: Case) -> None:
    (result,) = run_cases([case], STORED, runner.find_runner)
    assert result.status == "pass", result.reason


def test_a_difference_fails_and_an_unknown_case_is_not_covered(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = next(case for case in CASES if case.name == "mlp")
    wrong = {key: value * (1 + 1e-7) for key, value in STORED.items() if key.startswith("mlp/")}
    unknown = Case("odd", 0, {"cls": "Frobnicator"}, "", (), {}, {"name": "odd"})
    failed, odd = run_cases([chosen, unknown], wrong, runner.find_runner)
    assert failed.status == "FAIL"
    assert "differs by" in failed.reason
    assert (odd.status, odd.reason) == ("not covered", "no runner for Frobnicator")
    assert runner.main([str(VECTORS), "--only", "draw_[01]"]) == 0
    assert "2 passed" in capsys.readouterr().out


def test_other_configurations_of_the_same_formats_run() -> None:
    """A plain network in training mode on two pictures, a step whose pictures have a seed of their own."""
    by_name = {case.name: case for case in CASES}
    plain = by_name["vit"]
    (result,) = run_cases([replace(plain, raw={**plain.raw, "mode": "train"})], STORED, runner.find_runner)
    assert result.status == "pass", result.reason
    rectangular = by_name["vit_rect"]
    drawn = f"fill.array('image-16x32', (2, 3, 16, 32), seed={rectangular.seed})"
    assert runner.read_images(replace(rectangular, text=drawn)).shape == (2, 3, 16, 32)
    step = by_name["step_plain"]
    described = {**step.raw["input"], "images": "step i: fill.image as usual, batch 4, size (16, 32), seed=i"}
    assert runner.step_batch(replace(step, raw={**step.raw, "input": described}), 1)[0].shape == (4, 3, 16, 32)
    described = {**step.raw["input"], "images": "step i: fill.image/array as usual, batch 4, size 32, seed=7+10*i"}
    other = replace(step, raw={**step.raw, "input": described})
    assert not runner.step_batch(other, 1)[0].equal(runner.step_batch(step, 1)[0])
    assert runner.step_batch(other, 1)[1].equal(runner.step_batch(step, 1)[1])

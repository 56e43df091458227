"""The carried reference vectors, through the runner that takes any folder of the format."""

from pathlib import Path

import pytest

from common.reference import Case, read_cases, run_cases
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

"""The carried reference vectors, and the runner itself."""

from pathlib import Path

import pytest

from common.reference import read_cases, run_cases
from uvc.tests import cases as runner

VECTORS = Path(__file__).parent / "vectors"
CASES, STORED = read_cases(VECTORS)
CASES += runner.more_cases(VECTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_vector(case):
    with runner.float64():
        (result,) = run_cases([case], STORED, runner.find_runner)
    if result.status == "not covered":
        pytest.skip(result.reason)
    assert result.status == "pass", result.reason

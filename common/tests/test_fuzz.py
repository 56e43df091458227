"""Every reader of files with damaged and odd ones, always the same; `python -m common.tests.fuzz` goes on for hours."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.tests.fuzz import READERS, attempt


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_odd_files_are_read_or_refused_by_name(name: str) -> None:
    @settings(max_examples=READERS[name].examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def read(data: st.DataObject) -> None:
        attempt(READERS[name], data)

    read()

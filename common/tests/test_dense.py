"""The documented example of a dense head: it learns, and works on restored features as it is."""

import importlib.util

import pytest

from common.run.files import ROOT


@pytest.mark.slow
def test_a_segmentation_head_on_restored_features() -> None:
    spec = importlib.util.spec_from_file_location("dense_example", ROOT / "docs" / "dense.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = example.main(steps=40)
    dense = rows.pop("dense")
    assert dense["dense_head_iou"] == dense["own_head_iou"] > 0.55  # one class alone would be below a third
    for row in rows.values():
        assert row["gmacs"] < 0.8 * dense["gmacs"]
        assert row["dense_head_iou"] > dense["dense_head_iou"] - 0.05
        assert row["own_head_iou"] > dense["own_head_iou"] - 0.05

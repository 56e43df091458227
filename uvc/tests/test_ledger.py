"""The ledger's adapter: published costs come out, and every other number says what it needs."""

from decimal import Decimal
from pathlib import Path

import pytest
import torch

from common.ledger.tables import NeedsCompute, NeedsWeights, load_tables
from common.measure.flops import CONVENTIONS
from common.run.files import ROOT
from uvc import ledger
from uvc.cost_model import CostModel

ROWS = {row.id: row for table in load_tables("uvc", root=ROOT) for row in table.rows if not row.cited}
COUNTED = [row for row in ROWS.values() if row.table in ("models", "log_blocks") or row.id == "small-dense"]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: row.id)
def test_published_costs_to_the_last_digit(row):
    found = ledger.costs(row)
    for name, published in row.published.items():
        if name in found:
            exponent = published.as_tuple().exponent
            assert round(Decimal(found[name].value), -exponent) == published
    assert set(row.published) <= set(found) | {"top1_percent"}


def test_the_plain_network_has_the_counted_cost():
    """Two counts that share nothing: the paper's rules, and the operations of a forward pass."""
    _, model = ledger.model_of(ROWS["small-dense"])
    full = float(CostModel(model, device=torch.device("cpu"), dtype=torch.float64).full)
    assert ledger.plain_macs(model) == full + 384 * 1000
    assert ledger.costs(ROWS["small-dense"])["macs_g"].value == pytest.approx((full + 384 * 1000) / 1e9)


@pytest.mark.parametrize("row", [row for row in COUNTED if row.table == "log_blocks"], ids=lambda row: row.id)
def test_networks_that_are_timed_cost_what_the_logs_say(row):
    with torch.device("meta"):
        (network, size), (dense, _) = ledger.build(row), ledger.build(ROWS[row.dense.split("/")[1]])
    real, full = (CONVENTIONS["uvc"].total(model.count().published) for model in (network, dense))
    assert 100 * real / full == pytest.approx(float(row.published["remaining_percent"]), abs=0.006)
    assert len(dense.blocks) == 12
    assert size == 224
    with pytest.raises(NeedsCompute):
        ledger.build(ROWS["small-uvc-50.41"])


def test_gmacs_of_compressed_rows_are_the_paper_s_own_arithmetic():
    found = ledger.costs(ROWS["small-uvc-50.41"])
    assert found["gmacs"].value == pytest.approx(0.5041 * 4.6)
    assert "4.5985" in found["gmacs"].source
    assert "remaining_percent" not in found  # nothing here measures it


def test_what_needs_a_training_run_says_so(tmp_path: Path):
    with pytest.raises(NeedsCompute):
        ledger.costs(ROWS["tiny-uvc"])
    options = {"data": tmp_path, "weights": tmp_path, "device": "cpu", "progress": False}
    with pytest.raises(NeedsCompute, match="run both stages"):
        ledger.accuracy(ROWS["small-uvc-50.41"], **options)
    with pytest.raises(NeedsWeights, match=r"deit_small_patch16_224-cd65a155\.pth"):
        ledger.accuracy(ROWS["small-dense"], **options)

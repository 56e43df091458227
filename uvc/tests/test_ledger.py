"""The ledger's adapter: published costs come out, and every other number says what it needs."""

from decimal import Decimal
from pathlib import Path

import pytest
import torch

from common.ledger.tables import NeedsCompute, NeedsWeights, load_tables
from common.measure.flops import CONVENTIONS
from common.run.files import ROOT
from uvc import desk, ledger
from uvc.cost_model import CostModel
from uvc.models import create
from uvc.structure import Structure

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


@pytest.mark.parametrize("budget", desk.BUDGETS)
def test_uniform_reduction_is_just_within_the_budget(budget):
    model = create(desk.MODEL)
    cost = CostModel(model, dtype=torch.float64)
    heads, neurons = desk.uniform_numbers(model, budget)
    nothing = torch.zeros(6, 4, dtype=torch.float64)

    def ratio(neurons):
        s = torch.tensor([[heads, neurons]], dtype=torch.float64).expand(6, 2)
        return float(cost.ratio(s, nothing, nothing))

    assert ratio(neurons) <= budget < ratio(neurons - 1)
    with pytest.raises(ValueError, match="cannot be met"):
        desk.uniform_numbers(model, 0.01)


def test_uniform_reduction_takes_the_same_from_every_block(tmp_path: Path):
    from uvc.loading import load_masked, save_masked
    from uvc.models.gates import register_masks

    dense = save_masked(tmp_path / "dense.pth.tar", register_masks(create(desk.MODEL)), model_type=desk.MODEL)
    model = load_masked(desk.reduce_uniformly(dense, tmp_path / "half.pth.tar", 0.5)).model
    blocks = Structure.from_model(model).blocks
    assert len({(len(block.heads), block.num_values, len(block.neurons)) for block in blocks}) == 1
    assert desk.nonzero_share(model) < 0.7


def test_the_structure_within_the_budget_is_chosen(tmp_path: Path):
    from common.run.checkpoint import save_atomic

    for epoch, cost, top1 in ((1, 100, 99), (2, 49, 80), (3, 50, 85), (4, 51, 90)):
        metrics = {"remaining_cost_percent": float(cost), "top1_percent": float(top1)}
        save_atomic({"model": {}, "uvc": {"metrics": metrics}}, tmp_path / f"{desk.MODEL}_{epoch}.pth.tar")
    assert desk.within_budget(tmp_path, 0.5) == tmp_path / f"{desk.MODEL}_3.pth.tar"
    assert desk.within_budget(tmp_path, 0.3) is None


def test_the_desk_s_commands_are_taken_by_the_parsers(tmp_path: Path):
    from uvc import baselines, joint_train, post_train

    baselines.parse_args(desk.DENSE.split())
    joint_train.parse_args([*desk.STAGE1.split(), "--budget", "0.5"])
    post_train.parse_args([*desk.FINE_TUNE.split(), "--epochs", "1"])

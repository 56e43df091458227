"""The ledger's adapter: published costs come out but for one, and accuracy goes through the row's own command."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models._factory import create_model

from common.ledger.gather import Request, build
from common.ledger.tables import NeedsWeights, load_tables
from common.run.files import ROOT
from common.tests.reference import fill_
from sit import ledger
from sit.tests.tools import miniature_imagenet

TABLES = {table.name: table for table in load_tables("sit", root=ROOT)}
ROWS = [row for name in ("students", "teachers") for row in TABLES[name].rows]


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """Every entry by (row, column), without what earlier runs kept."""
    tables = tuple(TABLES.values())
    found = build(tables, Request(columns=frozenset({"gmacs", "params_m"}), force=True, root=ROOT))
    assert found.failures == []
    return {(entry.row, entry.column): entry for entry in found.entries}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_costs_and_parameters_have_the_published_digits(row, entries):
    for column in ("gmacs", "params_m"):
        entry = entries[row.id, column]
        expected = "differs" if (row.id, column) == ("sit-m", "gmacs") else "reproduced"
        assert entry.status == expected, entry


def test_the_row_that_differs_says_what_was_counted(entries):
    entry = entries["sit-m", "gmacs"]
    assert entry.reproduced == pytest.approx(8.03664, abs=1e-5)
    assert "conv 0.715 + linear 6.844 + matmul 0.460" in entry.source
    assert "normalisation 0.017 G" in entry.source
    assert "slip of rounding" in entry.source


def test_accuracy_names_the_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NeedsWeights, match=r"sit_lvvit_tiny\.pth or sit_lvvit_tiny\.pth\.tar"):
        ledger.accuracy(ROWS[0], data=tmp_path, weights=tmp_path, device="cpu", progress=False)
    with pytest.raises(NeedsWeights, match="--weights DIR"):
        ledger.accuracy(ROWS[0], data=tmp_path, weights=None, device="cpu", progress=False)


def test_accuracy_through_the_row_s_own_command(tmp_path: Path) -> None:
    model = fill_(create_model("sit_lvvit_desk", distillation_type="frd"), 1)
    torch.save({"model": model.state_dict()}, tmp_path / "sit_lvvit_tiny.pth")
    miniature_imagenet(tmp_path)
    row = replace(ROWS[0], arguments="--distillation-type frd --model sit_lvvit_desk --input-size 32 --num_workers 0")
    found = ledger.accuracy(row, data=tmp_path, weights=tmp_path, device="cpu", progress=False)
    assert "9 images, sit_lvvit_tiny.pth" in found["top1_percent"].convention


def test_networks_are_timed_as_deployed():
    with torch.device("meta"):
        network, size = ledger.build(ROWS[4])
    assert size == 288
    assert network(torch.empty(1, 3, 288, 288, device="meta")).shape == (1, 1000)
    assert not any("rtsm" in key or "bn" in key for key in network.state_dict())

"""The desk experiment: trains by the real script, keeps what it trained, and reports what it measured."""

import pytest
import torch

from common.ledger import cache
from dvt import desk, models
from dvt.dynamic import DynamicClassifier
from dvt.models import create_model
from dvt.models.cascade import Cascade
from dvt.tests.test_pack import TINY


def test_desk_runs_once_and_keeps_its_networks(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "DVT_desk", TINY)
    short = ("--epochs", "1", "--warmup-epochs", "0", "--img-size", "24", "-b", "120")
    monkeypatch.setattr(desk, "NETWORKS", {name: (*words, *short) for name, words in desk.NETWORKS.items()})
    monkeypatch.setattr(desk, "PASSES", {"cpu": 1})
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    with pytest.raises(RuntimeError, match="with-reuse reached"):
        desk.run(tmp_path, device="cpu", force=False, progress=False)
    monkeypatch.setattr(desk, "FLOOR", 0.0)
    table = desk.run(tmp_path, device="cpu", force=False, progress=False)
    assert len(table.rows) == 2 * (1 + len(desk.FIXED) + len(desk.BUDGETS))
    by_name = {(row["method"], row["setting"]): row for row in table.rows}
    full, reused = by_name["without reuse", "full cascade"], by_name["with reuse", "full cascade"]
    assert full["mmacs"] < reused["mmacs"]
    assert full["speedup"] == full["realised"] == 1
    first = by_name["with reuse", "all leave at exit 1"]
    assert first["mmacs"] < by_name["with reuse", "all leave at exit 2"]["mmacs"] < reused["mmacs"]
    assert first["flops_ratio"] > 1
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("train/*/last.pth.tar"))]
    assert len(stamps) == 2
    monkeypatch.setattr(desk, "measure", lambda *_: [])
    desk.run(tmp_path, device="cpu", force=False, progress=False)
    assert stamps == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("train/*/last.pth.tar"))]


def test_the_desk_network_has_three_exits_of_growing_cost():
    with torch.device("meta"):
        model = create_model("DVT_desk", num_classes=10)
    assert isinstance(model, Cascade)
    assert [stage.grid for stage in model.stages] == [(2, 2), (4, 4), (6, 6)]
    assert DynamicClassifier(model, [0.5] * 3).thresholds == [0.5] * 3

"""The ledger's adapter: the published costs come out, and every other number says honestly what it needs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.loaders import DataError
from common.ledger.tables import NeedsWeights, load_tables
from common.measure.flops import count_operations
from common.run.files import ROOT
from hourglass_swag import ledger
from hourglass_swag.models import REGISTRY, Entry
from hourglass_swag.models.vision_transformer import SIZES, Size, VisionTransformer
from hourglass_swag.tools.flop_count import flop_count

TABLES = {table.name: table for table in load_tables("hourglass_swag", root=ROOT)}
COUNTED = [row for name in ("swag", "hourglass", "evit") for row in TABLES[name].rows]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: row.id)
def test_published_gflops_(row) -> None:
    """The count has the published digits, and the published tool's keys add up to it."""
    published = row.published["gmacs"]
    measured = ledger.costs(row)
    assert round(measured["gmacs"].value, -published.as_tuple().exponent) == pytest.approx(float(published))
    with torch.device("meta"):
        model, size = ledger.build(row)
        images = torch.empty(1, 3, size, size)
    assert measured["macs_g"].value == pytest.approx(count_operations(model, images).executed.macs / 1e9)
    assert sum(flop_count(model, (images,)).values()) == pytest.approx(measured["gmacs"].value, rel=1e-9)


def test_accuracy_names_the_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NeedsWeights, match=r"vit_l16_in1k\.torch or vit_l_16_swag-4f3808c9\.pth"):
        ledger.accuracy(COUNTED[0], data=tmp_path, weights=tmp_path, device="cpu", progress=False)


def test_accuracy_through_the_row_s_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network under a name of the registry, its published file in --weights, images in --data."""

    small = Size(patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    monkeypatch.setitem(SIZES, "l16", small)
    monkeypatch.setitem(REGISTRY, "vit_l16_in1k", Entry("l16", "vit_l16_in1k.torch", 2))
    model = VisionTransformer(32, **small.kwargs(), num_classes=2)
    torch.nn.init.normal_(model.head.layers.head.weight)
    torch.save(model.state_dict(), tmp_path / "vit_l16_in1k.torch")
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "val" / label).mkdir(parents=True)
        for index in range(2 + (label == "a")):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / label / f"{index}.png")
    row = replace(COUNTED[0], arguments="-m vit_l16_in1k -r 32")
    found = ledger.accuracy(row, data=tmp_path, weights=tmp_path, device="cpu", progress=False)
    assert found["top1_percent"].value * 5 / 100 == pytest.approx(round(found["top1_percent"].value * 5 / 100))
    assert found["top5_percent"].value == 100
    assert "5 images" in found["top1_percent"].convention
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no val split"):  # an ordinary error, which costs this row only
        ledger.accuracy(row, data=tmp_path / "empty", weights=tmp_path, device="cpu", progress=False)

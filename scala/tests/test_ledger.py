"""The ledger's adapter: published costs by three counts, accuracy and gains through the rows' own commands."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from common.ledger.tables import NeedsData, NeedsWeights, load_tables
from common.measure.flops import count_operations
from common.run.checkpoint import save_atomic
from common.run.files import ROOT
from scala import ledger, main_scala
from scala.engine_scala import AtRatio
from scala.models_scala import create
from scala.tests.conftest import write_pictures

TABLES = {table.name: table for table in load_tables("scala", root=ROOT)}
SHAPE = "--input-size 32 --patch-size 8 --embed-dim 32 --num-heads 4 --depth 1 --num-classes 2"


@pytest.mark.parametrize("name", ["widths", "width_grid"])
def test_costs_have_the_published_digits(name: str) -> None:
    for row in TABLES[name].rows[:: 7 if name == "width_grid" else 3]:  # the vectors hold all
        found = ledger.costs(row)
        for column, published in row.published.items():
            digits = published.as_tuple().exponent
            assert isinstance(digits, int)
            assert round(Decimal(repr(found[column].value)), -digits) == published, (row.id, column)


@pytest.mark.parametrize("row", TABLES["widths"].rows[::5], ids=lambda row: row.id)
def test_the_count_is_that_of_what_is_executed(row) -> None:
    with torch.device("meta"):
        model, ratio, side = ledger.build(row)
        images = torch.empty(1, 3, side, side)
    assert count_operations(AtRatio(model, ratio), images).executed.macs == ledger.costs(row)["macs_g"].value * 1e9


def test_scala_and_separate_rows_have_a_cost() -> None:
    for name in ("scala_s", "scala_b"):
        for row in TABLES[name].rows[::3]:
            assert ledger.costs(row)["gmacs"].value == pytest.approx(float(row.published["gmacs"]), abs=0.1)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    row = next(row for row in TABLES["scala_s"].rows if row.id == "s-x4-0.50")
    with pytest.raises(
        NeedsWeights, match=r"s-x4-0\.50\.pth or s-x4-0\.50/checkpoint\.pth or s-x4\.pth or .* or scala_s_x4\.pth"
    ):
        ledger.accuracy(row, data=tmp_path, weights=tmp_path, device="cpu", progress=False)


def test_accuracy_and_gain_through_the_rows_own_commands(
    tmp_path: Path, imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two small networks in --weights, under the names that the rows look for."""
    flags = ["--device", "cpu", "--workers", "0", "--batch-size", "8", *SHAPE.split(), "--data-path", str(imagenet)]
    for name, model, warm in (("s-x4", "deit_small_distilled_patch16_224_scala", "0"),
                              ("gain-vs-usnet", "deit_small_distilled_patch16_224_scala", "0"),
                              ("s-separate-0.50", "deit_tiny_patch16_224_scala", "1")):  # fmt: skip
        out = [
            "--output_dir",
            str(tmp_path / name),
            "--epochs",
            "1",
            "--full_warm_epoch",
            warm,
            "--granularity",
            "0.25",
        ]
        main_scala.main([*flags, "--model", model, "--granularity", "0.25", *out])

    def small(row):
        words = row.arguments.replace("0.0625", "0.25")
        return replace(row, arguments=f"{words} --batch-size 8 --workers 0 {SHAPE}")

    monkeypatch.setattr(ledger, "_baselines", lambda: {("s", "0.50"): small(separate)})
    rows = {row.id: row for table in TABLES.values() for row in table.rows}
    separate = rows["s-separate-0.50"]
    found = {
        name: ledger.accuracy(small(rows[name]), data=imagenet, weights=tmp_path, device="cpu", progress=False)
        for name in ("s-x4-0.50", "s-separate-0.50", "gain-vs-usnet-0.5")
    }
    assert "6 images" in found["s-x4-0.50"]["top1_percent"].convention
    assert "scala_s/s-separate-0.50" in found["gain-vs-usnet-0.5"]["top1_gain_points"].source
    again = main_scala.main([*flags, "--model", "deit_small_distilled_patch16_224_scala", "--eval", "--eval_ratio",
                             "0.5", "--resume", str(tmp_path / "gain-vs-usnet" / "checkpoint.pth")])  # fmt: skip
    expected = again["top1_percent"] - found["s-separate-0.50"]["top1_percent"].value
    assert found["gain-vs-usnet-0.5"]["top1_gain_points"].value == pytest.approx(expected)


def test_gains_find_their_baseline() -> None:
    for row in TABLES["gains"].rows:
        if "--model" in row.arguments:
            baseline = ledger.separate_row(row)
            assert baseline.series == "separate training"
            assert float(baseline.id.rpartition("-")[2]) == float(row.id.rpartition("-")[2])


def test_gains_of_other_backbones_are_over_the_same_class() -> None:
    row = next(row for row in TABLES["gains"].rows if row.id == "gain-uniformer-s-0.5")
    alone = ledger.separate_row(row)
    assert alone.id == "gain-uniformer-s-separate-0.5"
    full, narrow = ledger.costs(row), ledger.costs(alone)
    assert narrow["gmacs"].value == full["gmacs"].value
    with pytest.raises(NeedsWeights, match=r"gain-uniformer-s-separate-0\.5\.pth"):
        ledger.weights_of(alone, None)


def test_gain_of_probing_is_over_a_probe_of_the_separate_network(tmp_path: Path) -> None:
    row = next(row for row in TABLES["gains"].rows if row.id == "gain-ucf101-0.5")
    row = replace(row, arguments=row.arguments.replace("--epochs 50", "--epochs 1 --workers 0 --batch-size 2"))
    with pytest.raises(NeedsData, match="UCF101 in"):
        ledger.accuracy(row, data=tmp_path, weights=tmp_path, device="cpu", progress=False)
    write_pictures(tmp_path / "ucf101" / "train" / "Archery", splits={"one": 2, "two": 2}, classes=1)
    write_pictures(tmp_path / "ucf101" / "val" / "Archery", splits={"three": 2}, classes=1)
    for split in ("train", "val"):
        for clip in (tmp_path / "ucf101" / split / "Archery").iterdir():
            (clip / "n00000000").rename(clip.with_name(f"v_{clip.name}"))
            clip.rmdir()
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 4, "patch_size": 8, "input_size": 32}
    for name, model, warm in (("gain-ucf101", "deit_base_distilled_patch16_224_scala", 0),
                              ("b-separate-0.50", "deit_small_patch16_224_scala", 1)):  # fmt: skip
        options = {key: value for key, value in shape.items() if key != "input_size"}
        weights = create(model, img_size=32, num_classes=2, **options).state_dict()
        bound = {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25}
        arguments = {"model": model, "epochs": 1, "full_warm_epoch": warm, **bound, **shape}
        save_atomic({"model": weights, "args": arguments}, tmp_path / f"{name}.pth")
    found = ledger.accuracy(row, data=tmp_path, weights=tmp_path, device="cpu", progress=False)["top1_gain_points"]
    assert found.value == 0  # one class
    assert found.source.endswith("minus 100.000 % of scala_b/b-separate-0.50")
    assert found.convention.startswith("1 clips")

"""The table of what methods cost and keep, as typed."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

import leanvit
from common.data.transforms import eval_transform
from common.hosts import lean
from common.hosts.__main__ import main, methods, parse_args
from common.hosts.accuracy import measure_accuracy
from common.hosts.draw import CAPTION, MARGIN, TITLE, mosaic
from common.hosts.parts import COLUMNS, OWN, compile_all
from common.hosts.trade import Row, best_within, own_gmacs, tokens_of_patches
from common.run.errors import CheckpointError, UsageError
from common.run.files import ROOT
from common.tests.small_methods import Drop, Halve, Replace
from sit.models.slimming import TokenSlimmingModule

NAME = "test_vit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs in two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for label, name in enumerate(("china", "flower")):
        (root / "classes" / str(label)).mkdir(parents=True)
        image = Image.fromarray(load_sample_image(f"{name}.jpg"))
        image.save(root / f"{name}.png")
        for part in range(2):
            image.save(root / "classes" / str(label) / f"{part}.png")
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tome", [("tome", {})]),
        ("tome:r=16", [("tome", {"r": 16})]),
        ("tome:r=[8,8,0],prop_attn=False", [("tome", {"r": [8, 8, 0], "prop_attn": False})]),
        ("hourglass:layer=6,clusters=(16,12),temperature=auto", [
            ("hourglass", {"layer": 6, "clusters": (16, 12), "temperature": "auto"})
        ]),
        ("tome:r=8+evit:keep=0.7,layers=(3,)", [("tome", {"r": 8}), ("evit", {"keep": 0.7, "layers": (3,)})]),
        ("hourglass:temperature=1e+2+tome", [("hourglass", {"temperature": 100.0}), ("tome", {})]),
    ],
)  # fmt: skip
def test_methods_as_words(text: str, expected: Any) -> None:
    (wanted,) = methods(text)
    assert (wanted.text, wanted.methods) == (text, expected)


def test_alternatives_without_end_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"means 1099511627776 combinations; expected 1000 at most"):
        methods("tome:" + ",".join(["r=1|2"] * 40))


def test_alternatives_are_combined() -> None:
    found = methods("tome:r=4|8+evit:layers=(1,)|(2,3),keep=0.5")
    assert [wanted.text for wanted in found] == [
        "tome:r=4+evit:layers=(1,),keep=0.5",
        "tome:r=4+evit:layers=(2,3),keep=0.5",
        "tome:r=8+evit:layers=(1,),keep=0.5",
        "tome:r=8+evit:layers=(2,3),keep=0.5",
    ]
    assert found[3].methods == [("tome", {"r": 8}), ("evit", {"layers": (2, 3), "keep": 0.5})]


def test_a_file_stands_beside_the_methods(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A student with weights of its own, and one for other images."""
    net = timm.create_model(NAME)
    learned = nn.ModuleList([TokenSlimmingModule(net.embed_dim, 40)])
    file, other = tmp_path / "slim.safetensors", tmp_path / "other.safetensors"
    slim = leanvit.Slim((3,)).with_weights({"tsm": learned})
    leanvit.save(lean(net, slim), file)
    leanvit.save(lean(timm.create_model(NAME, img_size=96), "tome", r=2), other)
    words = [NAME, "--images", str(folder / "china.png"), "--rounds", "1", "--timing-seconds", "1", "--device", "cpu"]
    main([*words, "--methods", str(file), "--output", str(tmp_path / "page")])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(str(file)))
    assert " 41 " in row  # the class token and the 40 of the module
    assert f"fast = leanvit.load('{file}')" in printed
    assert leanvit.explain(net)["slim"].startswith("not possible: slim has modules that must be learned")
    with pytest.raises(
        UsageError, match=r"other\.safetensors cannot stand beside test_vit: its image size is \(96, 96\)"
    ):
        main([*words, "--methods", str(other)])
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        main([*words, "--methods", str(tmp_path / "nothing.safetensors")])
    with pytest.raises(SystemExit):
        main([*words, "--methods", str(file), "--onnx", str(file)])
    assert "slim.safetensors is read or written as something else" in capsys.readouterr().err
    assert Row("dense_student.safetensors", 1, 1.0, 0.0, 1.0, 1.0).kind == "dense_student.safetensors"


def test_accuracy_is_of_heads_for_the_same_classes(folder: Path) -> None:
    networks: dict[str, nn.Module] = {"dense": timm.create_model(NAME, num_classes=2)}
    networks["student"] = timm.create_model(NAME, num_classes=3)
    with pytest.raises(UsageError, match="student has 3 outputs, the dense network 2"):
        measure_accuracy(
            networks, lambda name, images: images, folder / "classes", eval_transform(160), dense="dense", batch_size=2,
            device=torch.device("cpu"),
        )  # fmt: skip


@pytest.mark.parametrize("text", ["tome:16", "tome:=3", "tome:r=3,16"])
def test_words_that_are_no_settings(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected name:key=value"):
        methods(text)


def test_the_table_and_the_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tome:r=9", "hourglass:layer=1,clusters=(4,4)+evit:layers=(3,)", "evit:restore=frozen", "evit:layers=(9,)"]
    rows = {row.name: row for row in main(
        [NAME, "--images", str(folder), "--methods", *words, "--rounds", "1", "--output", str(tmp_path), "--data",
         str(folder / "classes"), "--device", "cpu", "--budget-gmacs", "1"]
    )}  # fmt: skip
    output = capsys.readouterr().out
    assert "WARNING: random, as timm has none of this network" in output
    assert f"{words.pop()}  " in output
    assert re.search(r"not possible: .* must be a layer, 0 to 5, got 9$", output, re.MULTILINE)
    assert "Within 1.0 GMACs, the best of each kind, best first:\n  " in output
    assert all(name in output for name in rows)
    assert "accuracy: 5 nearest neighbours (cosine) and a linear probe" in output
    few = "of one pass of each network; too few to go by: raise --rounds and --timing-seconds"
    assert output.count(f"times: {few}") == 1
    assert f"times are {few}" in (tmp_path / "index.html").read_text()
    net = timm.create_model(NAME)
    dense = rows["dense"]
    assert (dense.patch_cosine, dense.class_cosine, dense.speedup) == (pytest.approx(1), pytest.approx(1), 1)
    assert dense.gmacs == lean(net).gmacs()
    assert rows["tome:r=9"].gmacs == lean(net, "tome", r=9).gmacs()
    assert rows["tome:r=9"].tokens == lean(net, "tome", r=9).tokens_per_layer()[-1]
    smaller = [row for name, row in rows.items() if name.startswith("dense at ")]
    assert 1 <= len(smaller) <= 3
    for word in words:
        row = rows[word]
        assert -1 <= row.patch_cosine < 1
        assert 0 <= row.own_gmacs < row.gmacs < dense.gmacs
        nearest = min(smaller, key=lambda other: abs(other.gmacs - row.gmacs))
        assert row.against_resizing == pytest.approx(row.patch_cosine - nearest.patch_cosine)
        assert row.realised == pytest.approx(row.speedup * row.gmacs / dense.gmacs)
    assert all(row.top1_percent is None and row.probe_percent in (0, 50, 100) for row in rows.values())
    written = json.loads((tmp_path / "trade.json").read_text())
    assert [row["name"] for row in written["rows"]] == list(rows)
    assert written["images"] == ["china.png", "flower.png"]
    assert list(written["not_possible"]) == ["evit:layers=(9,)"]
    strips = 1 + len(words) + len(smaller)
    for name in written["images"]:
        width, height = Image.open(tmp_path / name).size  # features, and tokens after a third, two thirds and all
        assert (width, height) == (4 * 160 + 3 * MARGIN, strips * (160 + TITLE + CAPTION + MARGIN) - MARGIN)


def test_time_by_part_and_compiled_networks(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    words = ["--methods", "tome:r=8", "ats", "smyrf:hashes=2"]
    where = ["--images", str(folder), "--output", str(tmp_path)]
    main([NAME, *where, *words, "--rounds", "1", "--explain", "--compile"])
    record = json.loads((tmp_path / "trade.json").read_text())
    explained, compiled = record["explained_ms"], record["compiled"]
    assert list(explained) == list(compiled) == ["dense", *words[1:]]
    for name, parts in explained.items():
        assert sum(parts[column] for column in COLUMNS) == pytest.approx(parts["all"], rel=0.5)  # medians
        assert parts["products"] > 0
        assert (parts[OWN] > 0) == (name != "dense")
    dense, tome = (next(row for row in record["rows"] if row["name"] == name) for name in ("dense", "tome:r=8"))
    assert explained["dense"]["promised"] == pytest.approx(explained["dense"]["all"])
    assert explained["tome:r=8"]["promised"] == pytest.approx(
        explained["dense"]["all"] * tome["gmacs"] / dense["gmacs"]
    )
    assert (
        compiled["dense"]["graph_breaks"] == compiled["tome:r=8"]["graph_breaks"] == 0 < compiled["ats"]["graph_breaks"]
    )
    assert all(each["recompilations"] == 0 for each in compiled.values())
    assert "compiled, over the same eager" in capsys.readouterr().out


def test_what_cannot_be_compiled_is_told(monkeypatch) -> None:
    def fail(network: object) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    found = compile_all({"dense": torch.nn.Identity()}, torch.ones(1), rounds=1, limit_s=None)
    assert found == {"dense": "RuntimeError: no compiler"}


def test_budgets_name_the_best_of_each_kind() -> None:
    rows = [
        Row("dense", 101, 10.0, 0.0, 1.0, 1.0, ms_per_image=5.0),
        Row("dense at 128 pixels", 65, 6.0, 0.0, 0.9, 0.9, ms_per_image=3.0),
        Row("tome:r=4", 80, 8.0, 0.1, 0.99, 0.9, ms_per_image=4.5, against_resizing=0.05),
        Row("tome:r=9", 60, 6.0, 0.1, 0.95, 0.9, ms_per_image=4.0, against_resizing=0.05),
        Row("tome:r=12", 50, 5.0, 0.1, 0.85, 0.9, ms_per_image=3.5, against_resizing=-0.05),
        Row("tome:r=9+evit:keep=0.5", 30, 4.0, 0.1, 0.8, 0.9, ms_per_image=6.0, against_resizing=-0.05),
    ]
    lines = best_within(rows, gmacs=6.0).splitlines()
    assert lines[0].startswith("Within 6.0 GMACs")
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "tome:r=9", "dense at 128 pixels", "tome:r=9+evit:keep=0.5"
    ]  # fmt: skip
    assert "tome:r=9: 6.000" in best_within(rows, ms=4.2).splitlines()[1]
    assert "the least is 4.000 GMACs, 3.000 ms" in best_within(rows, gmacs=1.0)
    rows = [replace(row, top1_percent=80 - row.gmacs) for row in rows]
    assert (
        "tome:r=9+evit:keep=0.5: 4.000 GMACs, 6.00 ms per image, top-1 76.00"
        in best_within(rows, gmacs=9.0).splitlines()[1]
    )


def test_weights_at_another_size(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    net = timm.create_model(NAME)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    rows = main([NAME, "--img-size", "96", "--weights", str(tmp_path / "weights.pth"), "--methods", "tome:r=0",
                 "--images", str(folder / "china.png"), "--rounds", "1", "--device", "cpu"])  # fmt: skip
    assert "WARNING" not in capsys.readouterr().out
    assert [row.name for row in rows] == ["dense", "tome:r=0"]  # no smaller image costs as much
    assert all(row.patch_cosine == pytest.approx(1) for row in rows)
    net.set_input_size(img_size=(96, 96))
    assert rows[0].gmacs == lean(net).gmacs()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_vitt", "--methods", "tome"], "timm has no network 'test_vitt'; near are test_vit"),
        ([NAME, "--methods", "tom"], "there is no method 'tom', did you mean 'tome'"),
        ([NAME, "--methods", "tome:q=1"], "tome has no setting 'q'"),
        ([NAME, "--methods", "tome+hourglass:layer=2"], "tome at layer 0 breaks the grid"),
        (["swin_tiny_patch4_window7_224", "--methods", "tome"], "SwinTransformer is not a host"),
        ([NAME, "--methods", "tome", "--img-size", "33"], "fails on an image of its own size, 33x33: Input height"),
        ([NAME, "--methods", "tome", "--weights", "nowhere.pth"], "nowhere.pth"),
        ([NAME, "--methods", "tome", "--images", "nowhere"], "expected an image or a folder with some"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, folder: Path) -> None:
    images = [] if "--images" in words else ["--images", str(folder)]
    with pytest.raises((UsageError, CheckpointError), match=message):
        main([*words, *images, "--rounds", "1", "--device", "cpu"])


def test_flags_are_understood_without_torch() -> None:
    code = "import sys, common.hosts.__main__ as c; c.parse_args(['x', '--methods', 'tome:r=1', '--images', 'x'])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules, 'numpy' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(SystemExit):
        parse_args([NAME, "--methods", "tome"])  # without images


def test_what_belongs_to_the_method() -> None:
    """A method that computes the attention itself owns its products; one that only moves tokens owns none."""
    net = timm.create_model(NAME)
    tokens, width = net.patch_embed.num_patches + net.num_prefix_tokens, net.embed_dim
    assert own_gmacs(lean(net, Halve())) == own_gmacs(lean(net, Drop())) == 0
    assert own_gmacs(lean(net, Replace())) == pytest.approx(2 * tokens**2 * width / 1e9)


def test_tokens_of_patches_and_their_colours() -> None:
    net = timm.create_model(NAME).eval()
    rows, columns = net.patch_embed.grid_size
    halved, image = lean(net, Halve()), torch.randn(1, 3, *net.patch_embed.img_size)
    ((_, _, labels),) = tokens_of_patches(halved, image, [halved.plan.host.facts.depth])
    assert torch.equal(labels, torch.arange(rows * columns // 2).repeat_interleave(2).unflatten(0, (rows, columns)))
    image = torch.zeros(3, 4, 4)
    image[0, :, 1] = 1.0
    drawn = mosaic(image, torch.tensor([[0, 1], [0, 1]]))
    assert torch.equal(drawn[0, :, :2], torch.full((4, 2), 0.5))  # the mean of its two columns
    assert torch.equal(drawn[:, :, 2:], torch.zeros(3, 4, 2))

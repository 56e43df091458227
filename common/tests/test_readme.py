"""The first screen of the README: its Python runs, its image is small and drawn by this code, no number is typed."""

import re
import sys

import pytest
import torch
from PIL import Image

from common.run.files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = README.partition("\n## ")[0]


def test_the_six_lines_of_python_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", FIRST_SCREEN, re.DOTALL)
    assert len(code.splitlines()) <= 6
    with torch.device("meta"):  # every operation, on shapes alone: without half a minute of arithmetic
        exec(code, {})
    shapes, cost = capsys.readouterr().out.splitlines()
    assert shapes == "torch.Size([1, 1000]) torch.Size([1, 384, 14, 14])"
    assert re.fullmatch(r"101 tokens at the end, 3\.\d+ GMACs", cost)


def test_the_first_screen_says_how_to_start_and_types_no_count() -> None:
    assert re.findall(r"^(git clone|make reproduce|make test)\b", FIRST_SCREEN, re.MULTILINE) == [
        "git clone",
        "make reproduce",
        "make test",
    ]
    prose = re.sub(r"<!-- papers -->.*?<!-- end -->", "", README, flags=re.DOTALL)
    prose = re.sub(r"<!-- ledger -->.*?<!-- end -->", "", prose, flags=re.DOTALL)
    assert not re.search(r"\d+ (tables|values|rows)\b", prose)


def test_the_image_is_small_and_no_wider_than_two_pages() -> None:
    (name,) = re.findall(r"^!\[[^\]]*\]\((\S+)\)$", FIRST_SCREEN, re.MULTILINE)
    assert (ROOT / name).stat().st_size < 300_000
    with Image.open(ROOT / name) as image:
        assert 838 <= image.width <= 2 * 838


def test_the_image_is_drawn_by_the_documented_command(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "[`docs/overview.py`](docs/overview.py)" in FIRST_SCREEN
    monkeypatch.syspath_prepend(ROOT / "docs")
    overview = pytest.importorskip("overview")
    desk = {"clustering_location": 1, "num_cluster": 16}, {"tome_r": 4}, {"base_keep_rate": 0.5, "drop_loc": (1, 3)}
    names = ("hourglass_vit_desk", "tome_vit_desk", "e_vit_desk")
    methods = [(m[0], n, options, m[3]) for m, n, options in zip(overview.METHODS, names, desk, strict=True)]
    monkeypatch.setattr(overview, "METHODS", methods)
    monkeypatch.setattr(overview, "RESOLUTION", 32)
    monkeypatch.setattr(overview, "PATCHES", 8)
    with Image.open(overview.main(["--output", str(tmp_path / "overview.png")])) as image:
        assert image.width == 4 * overview.PANEL + 3 * overview.GAP
        panels = [image.convert("RGB").crop((x, 0, x + 288, 288)) for x in range(0, image.width, 300)]
    assert len({panel.tobytes() for panel in panels}) == 4
    sys.modules.pop("overview", None)

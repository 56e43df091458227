"""The notebook of docs/ runs, and what it shows is what a run gives."""

import os
from pathlib import Path
from typing import Any

import pytest

from common.run.files import ROOT

NOTEBOOK = ROOT / "docs" / "own_model.ipynb"


def said(cell: Any) -> str:
    """Text of a cell's outputs; warnings aside. A kernel cuts what is printed into as many outputs as it likes."""
    outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return "".join(each.get("text") or each.get("data", {}).get("text/plain", "") for each in outputs)


@pytest.mark.slow
def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -e .[dev]")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e .[dev]")
    pytest.importorskip("ipykernel", reason="pip install -e .[dev]")
    assert NOTEBOOK.stat().st_size < 100_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    shown = [said(cell) for cell in notebook.cells if cell.cell_type == "code"]
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell, before in zip((cell for cell in notebook.cells if cell.cell_type == "code"), shown, strict=True):
        assert before or cell.source.endswith(";")
        if "rows = main(" not in cell.source:  # which prints times
            assert said(cell) == before, cell.source

"""ONNX and torch.export: what is written is read back, and nothing stays that computes something else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.run import export
from common.run.errors import ExportError, OutputError
from common.run.export import difference, export_onnx, export_program
from common.tests.full_disk import fill_disk

IMAGES = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 5)

    def forward(self, pixels: Tensor, extra: Any = None) -> dict[str, Tensor]:
        x = self.inner(pixels.flatten(1))
        return {"logits": x, "doubled": 2 * x}


class Guesses(Network):
    """Its output's size depends on the images."""

    def forward(self, pixels: Tensor, extra: Any = None) -> Any:
        return pixels.flatten(1)[:, : int(pixels.amax())]


def network(kind: type[Network] = Network) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def test_difference_is_of_one_image_and_of_all() -> None:
    net = network()
    expected = net(IMAGES)
    assert difference(net, IMAGES, expected, "x") < 1e-6
    with pytest.raises(ExportError, match="x gives other outputs than the network: off by"):
        difference(net, IMAGES, {key: value + 0.01 for key, value in expected.items()}, "x")
    with pytest.raises(ExportError, match="x gives other outputs"):  # the mean couples images
        difference(lambda x: net(x - x.mean()), IMAGES, net(IMAGES - IMAGES.mean()), "x")
    with pytest.raises(ExportError, match="off by nan"):
        difference(net, IMAGES * torch.nan, expected, "x")


def test_a_program_for_any_batch(tmp_path: Path) -> None:
    net = network()
    assert export_program(net, IMAGES, tmp_path / "made" / "net.pt2") < 1e-5
    program = torch.export.load(tmp_path / "made" / "net.pt2").module()
    five = torch.cat([IMAGES, IMAGES[:2]])
    torch.testing.assert_close(program(five), net(five))
    with pytest.raises(ExportError, match=r"other\.pt2 gives other outputs"):
        export_program(net, IMAGES, tmp_path / "other.pt2", expected=[torch.zeros(3, 5), torch.zeros(3, 5)])
    with pytest.raises(ExportError, match=r"other\.pt2: torch\.export cannot write this network"):
        export_program(network(Guesses), IMAGES, tmp_path / "other.pt2")
    with pytest.raises(ExportError, match="training mode"):
        export_program(net.train(), IMAGES, tmp_path / "other.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["net.pt2"]


def test_a_program_on_a_full_disk_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, room=1000)
    with pytest.raises(OutputError, match=r"x\.pt2 \(No space left on device\)"):
        export_program(network(), IMAGES, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_onnx_for_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e .[export]")
    net = network()
    assert export_onnx(net, IMAGES, tmp_path / "net.onnx", outputs=["logits", "doubled"]) < 1e-5
    monkeypatch.setattr(export, "ONE_FILE", 100)  # bytes: the weights go beside it
    assert export_onnx(net, IMAGES, tmp_path / "large.onnx", outputs=["logits", "doubled"]) < 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"net.onnx", "large.onnx", "large.onnx.data"}
    five = torch.cat([IMAGES, IMAGES[:2]])
    for name in ("net", "large"):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (doubled,) = session.run(["doubled"], {"images": five.numpy()})
        torch.testing.assert_close(torch.from_numpy(doubled), net(five)["doubled"].detach())
    with pytest.raises(ExportError, match=r"other\.onnx gives other outputs"):
        export_onnx(net, IMAGES, tmp_path / "other.onnx", expected=[torch.zeros(3, 5), torch.zeros(3, 5)])
    assert not (tmp_path / "other.onnx").exists()


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnxr") else name)
    with pytest.raises(ExportError, match=r"net\.onnx: ONNX needs onnxruntime: pip install 'leanvit\[export\]'"):
        export_onnx(network(), IMAGES, tmp_path / "net.onnx")

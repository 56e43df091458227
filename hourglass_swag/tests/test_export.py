"""Published names as files: written and compared, or refused with the reason; the network stays as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from common.hosts.export import export_torch
from common.run.errors import ExportError
from common.tests.reference import fill_
from hourglass_swag import export
from hourglass_swag.models import create

pytestmark = pytest.mark.slow


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.torch"
    torch.save(fill_(create("vit_desk"), 1).state_dict(), path)
    return path


def words(name: str, *more: str) -> list[str]:
    flags = {
        "hourglass_vit_desk": ["-l", "2", "-n", "16"],
        "tome_vit_desk": ["--tome_r", "4"],
        "e_vit_desk": ["--drop_loc", "2", "4"],
        "evo_vit_desk": ["--evo_prune_ratio", "0.5"],
    }
    return ["-m", name, *flags.get(name, []), *more]


@pytest.mark.parametrize("name", ["vit_desk", "hourglass_vit_desk", "e_vit_desk", "evo_vit_desk", "act_vit_desk"])
def test_programs(name: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "net.pt2"
    errors = export.main(words(name, "--weights", str(weights), "--torch-export", str(path)))
    assert errors[str(path)] < 1e-5
    assert "largest difference of the logits" in capsys.readouterr().out
    images = torch.randn(5, 3, 32, 32)
    assert torch.export.load(path).module()(images).shape == (5, 10)


@pytest.mark.parametrize("name", ["vit_desk", "e_vit_desk"])  # every method: common/tests/test_hosts_export.py
def test_onnx(name: str, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install -e .[export]")
    path = tmp_path / "net.onnx"
    assert export.main(words(name, "--weights", str(weights), "--onnx", str(path)))[str(path)] < 1e-5


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ["--no-pretrained", "--torch-export", str(tmp_path / "net.pt2")]
    with pytest.raises(ExportError, match="ats cannot be exported: how many tokens survive is read from the images"):
        export.main(["-m", "ats_vit_desk", "--ats_blocks_indexes", "3", "--ats_drop_tokens", *path])
    with pytest.raises(ExportError, match="smyrf with padded=False couples the images of a batch"):
        export.main(["-m", "smyrf_vit_desk", *path])
    with pytest.raises(ValueError, match="a flag of another method"):
        export.main(["-m", "vit_desk", "--tome_r", "4", *path])
    with pytest.raises(SystemExit):
        export.parse_args(["-m", "vit_desk"])
    assert "give --onnx FILE or --torch-export FILE" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_patched_network_is_as_usable_as_before(tmp_path: Path) -> None:
    net: Any = fill_(create("tome_vit_desk", tome_r=4), 1).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = net(images)
    assert export_torch(net, tmp_path / "net.pt2") < 1e-5
    assert torch.equal(copy.deepcopy(net)(images), expected)
    net.r = 2
    assert net(images).shape == (2, 10)
    assert torch.equal(net._tome_info["size"].sum(1), torch.full((2, 1), 65.0))

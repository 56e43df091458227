"""Small programs around the networks: torch.hub, strip, export."""

from pathlib import Path

import pytest
import torch
from timm.models._factory import create_model

from common.run.checkpoint import CheckpointError
from common.run.files import ROOT
from common.tests.reference import fill_
from sit import export, hubconf, strip
from sit.models import SIZES

FOLDER = str(ROOT / "sit")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = fill_(create_model("sit_lvvit_desk", distillation_type="frd", num_classes=7), 2)
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_hub_entries(checkpoint: Path):
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert entries == set(SIZES)
    assert hubconf.dependencies == ["torch", "torchvision", "timm"]
    model = torch.hub.load(FOLDER, "sit_lvvit_desk", source="local", weights=checkpoint, num_classes=7)
    logits, tokens = model(IMAGES)  # pyright: ignore[reportCallIssue]
    assert [kept.shape[1] for kept in tokens] == [64, 32, 32, 16, 16, 8, 8, 8]
    light = torch.hub.load(FOLDER, "sit_lvvit_desk", source="local", weights=checkpoint, num_classes=7, deployed=True)
    assert torch.allclose(light(IMAGES), logits, atol=1e-5)  # pyright: ignore[reportCallIssue]
    assert "16 blocks of width 384" in vars(hubconf)["sit_lvvit_small"].__doc__
    with pytest.raises(CheckpointError, match="pass weights=FILE"):
        torch.hub.load(FOLDER, "sit_lvvit_tiny", pretrained=True, source="local")


def test_strip(checkpoint: Path, tmp_path: Path, capsys):
    strip.main([str(checkpoint), str(tmp_path / "small.pth")])
    printed = capsys.readouterr().out
    assert "removed aux_head (2 keys), rtsm.1 to rtsm.7 (84 keys)" in printed
    model = torch.hub.load(FOLDER, "sit_lvvit_desk", source="local", weights=tmp_path / "small.pth", num_classes=7)
    assert model(IMAGES)[0].shape == (2, 7)  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["onnx", "pt2", "pt"])
def test_export(checkpoint: Path, tmp_path: Path, capsys, suffix: str):
    """Logits compared at another batch than the one exported with."""
    words = ["--model", "sit_lvvit_desk", "--num-classes", "7", "--weights", str(checkpoint)]
    error = export.main([*words, "--output", str(tmp_path / f"sit.{suffix}")])
    assert error < 1e-5
    assert "largest difference of the logits" in capsys.readouterr().out


def test_export_of_another_form_is_refused(capsys):
    with pytest.raises(SystemExit):
        export.parse_args(["--output", "sit.tflite"])
    assert "its suffix must be one of .onnx, .pt2, .pt" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_other_stages_is_exported(tmp_path: Path):
    """With the flags that the refusal recommends."""
    stages = {"keeping_ratio": 0.7, "stage_blocks": (4, 4)}
    model = fill_(create_model("sit_lvvit_desk", distillation_type="frd", num_classes=7, **stages), 2)
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    words = ["--model", "sit_lvvit_desk", "--num-classes", "7", "--weights", str(tmp_path / "other.pth")]
    words += ["--output", str(tmp_path / "sit.pt")]
    with pytest.raises(CheckpointError, match=r"put out \[44\] tokens.*another --keeping-ratio, --stage-blocks"):
        export.main(words)
    assert export.main([*words, "--keeping-ratio", "0.7", "--stage-blocks", "4", "4"]) < 1e-5

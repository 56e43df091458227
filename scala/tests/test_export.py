"""A slice as a model of its own: equal logits in timm, in our class, in torch.export and under onnxruntime."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.run.checkpoint import CheckpointError, load_strict, save_atomic
from common.run.errors import ExportError, UsageError
from common.run.export import export_onnx, export_program
from scala import benchmark, export, loading
from scala.models_mobilenet import MobileNetV2_scala
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala
from scala.models_uniformer import UniFormer_scala
from scala.slicing import WidthError, make_grid
from scala.standalone import (
    METADATA_KEY,
    Standalone,
    describe,
    load_standalone,
    save_standalone,
    standalone_state,
)

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
NAME = "deit_so_tiny_patch16_224_scala"


def random_(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(1 + noise.abs() if "var" in name else 0.2 * noise + (value.ndim == 1) * 0.5)
    return model.double().eval()


def pictures(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (DistilledVisionTransformer_scala, {}),
        (DistilledVisionTransformer_scala, {"init_values": 0.3}),
        (VisionTransformer_scala, {}),
        (VisionTransformer_scala, {"global_pool": "avg", "qkv_bias": False}),
        (VisionTransformer_scala, {"no_embed_class": True, "fc_norm": True}),
        (VisionTransformer_scala, {"global_pool": "", "num_classes": 0}),
        (VisionTransformer_scala, {"class_token": False, "global_pool": "avg", "init_values": 0.3}),
        (VisionTransformer_scala, {"init_values": 0.3, "official_layer_scale": True}),
        (VisionTransformer_scala, {"mlp_ratio": 3.0, "img_size": (16, 24)}),
    ],
)
def test_timm_and_our_class_give_the_logits_of_the_slice(network: type[nn.Module], options: dict[str, Any]) -> None:
    model = random_(network(**TINY | options))
    size = options.get("img_size", (16, 16))
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ratio in make_grid(0.25, 1.0, 0.25).ratios:
        standalone = Standalone.from_json(describe(model, ratio).to_json())
        state = standalone_state(model, ratio)
        theirs = standalone.build_timm().double().eval()
        load_strict(theirs, state)
        ours: Any = standalone.build_ours().double().eval()
        load_strict(ours.model, state)
        with torch.no_grad():
            expected = model(x, ratio)
            torch.testing.assert_close(theirs(x), expected, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(ours(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["mobilenet", "uniformer"])
def test_slices_of_the_other_backbones_are_networks_of_their_own(name: str, tmp_path: Path) -> None:
    small = {"depths": (1, 1, 1, 1), "widths": (16, 16, 32, 32), "heads": (2, 2), "overlap": True}
    model: Any = (
        MobileNetV2_scala(img_size=32, num_classes=3, granularity=0.0625)
        if name == "mobilenet"
        else UniFormer_scala(img_size=32, num_classes=3, granularity=0.25, **small)
    )
    random_(model)
    with torch.no_grad():
        for ratio in (0.25, 0.3125, 1.0) if name == "mobilenet" else (0.25, 0.75):
            standalone = describe(model, ratio)
            alone: Any = standalone.build_ours().double().eval()
            load_strict(alone.model, standalone_state(model, ratio))
            torch.testing.assert_close(alone(pictures(32)), model(pictures(32), ratio), rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="timm has no class"):
        standalone.build_timm()
    save_standalone(tmp_path / "slice.safetensors", standalone_state(model.float(), 0.25), describe(model, 0.25))
    assert load_standalone(tmp_path / "slice.safetensors")(pictures(32).float()).shape == (2, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As training writes it."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, num_classes=5)
    arguments = {
        "model": NAME, "smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25, "input_size": 32,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    save_atomic({"model": model.state_dict(), "model_ema": None, "args": arguments}, path)
    return path


def test_command_writes_a_file_that_timm_loads(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "half.safetensors"
    results = export.main(["--checkpoint", str(checkpoint), "--ratio", "0.5", "--output", str(output)])
    assert results["half.safetensors"] < 1e-5
    model = timm.create_model(NAME, img_size=32, num_classes=5)
    model.load_state_dict(torch.load(checkpoint)["model"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    counts = model.count_parameters(0.5) / 1e6
    assert last == f"{output}: {counts:.6f} M parameters, {results['gmacs']:.4f} GMACs"
    # by hand, without a line of ours: the JSON's arguments, timm's class, its strict loading
    described = json.loads(output.with_suffix(".json").read_text())
    with safe_open(output, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()[METADATA_KEY]) == described
    theirs = timm.models.vision_transformer.VisionTransformer(
        **described["timm"]["arguments"], norm_layer=partial(nn.LayerNorm, eps=described["norm_eps"])
    )
    theirs.load_state_dict(state)
    x = pictures(32).float()
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), model.eval()(x, 0.5), rtol=1e-4, atol=1e-5)


def test_torch_export_and_onnx_give_the_same_logits_at_any_batch_size(tmp_path: Path) -> None:
    model = random_(DistilledVisionTransformer_scala(**TINY | {"depth": 1})).float()
    alone = describe(model, 0.5).load(standalone_state(model, 0.5))
    images = pictures(16).float()
    with torch.no_grad():
        expected = model(images, 0.5)
    assert export_program(alone, images, tmp_path / "slice.pt2", expected=expected) < 1e-5
    assert export_onnx(alone, images, tmp_path / "slice.onnx", expected=expected) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slice.onnx", "slice.pt2"]
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "slice.onnx", providers=["CPUExecutionProvider"])
    five = torch.cat([images, images, images[:1]])
    (logits,) = session.run(None, {"images": five.numpy()})
    np.testing.assert_allclose(logits[:2], expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match=r"other\.pt2 gives other outputs"):
        export_program(alone, images, tmp_path / "other.pt2", expected=expected + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slice.onnx", "slice.pt2"]


def run_export(checkpoint: Path, folder: Path, *words: str) -> dict[str, float]:
    return export.main(["--checkpoint", str(checkpoint), "--output", str(folder / "x"), *words])


def test_untrained_and_impossible_widths_are_refused(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"--ratio 0\.375 was not trained; the trained ones are 0\.25, 0\.5, 0\.75, 1"):
        run_export(checkpoint, tmp_path, "--ratio", "0.375")
    with pytest.raises(WidthError, match="multiples of 3/96"):
        run_export(checkpoint, tmp_path, "--ratio", "0.3", "--allow-untrained")
    with pytest.raises(UsageError, match=r"--smallest_ratio 0\.5 contradicts .*trained with 0\.25"):
        run_export(checkpoint, tmp_path, "--ratio", "0.5", "--smallest-ratio", "0.5")
    assert not list(tmp_path.iterdir())
    caplog.set_level("WARNING", logger="scala")
    loading.logger.propagate = True
    run_export(checkpoint, tmp_path, "--ratio", "0.375", "--allow-untrained")
    assert load_standalone(tmp_path / "x.safetensors").embed_dim == 36


def test_files_of_the_official_trainer_say_what_they_are(checkpoint: Path, tmp_path: Path) -> None:
    """They hold an argparse.Namespace."""
    content = torch.load(checkpoint)
    torch.save(content | {"args": argparse.Namespace(**content["args"], bce_loss=False)}, tmp_path / "official.pth")
    assert run_export(tmp_path / "official.pth", tmp_path, "--ratio", "0.25")["x.safetensors"] < 1e-5


def test_files_that_do_not_say_enough_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint)["model"]
    bare = tmp_path / "bare.pth"
    save_atomic(state, bare)
    with pytest.raises(CheckpointError, match="give --model NAME"):
        run_export(bare, tmp_path, "--ratio", "0.5")
    with pytest.raises(UsageError, match="no sliceable network 'resnet50'"):
        run_export(bare, tmp_path, "--ratio", "0.5", "--model", "resnet50")
    with pytest.raises(CheckpointError, match="does not fit"):
        run_export(bare, tmp_path, "--ratio", "0.5", "--model", "deit_tiny_patch16_224_scala")
    run_export(bare, tmp_path, "--ratio", "0.5", "--model", NAME, "--input-size", "32")
    with pytest.raises(SystemExit, match=r"must end in \.safetensors"):
        export.parse_args(["--checkpoint", "x", "--ratio", "1", "--output", "x.onnx"])
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_standalone(tmp_path / "other.safetensors")


def test_benchmark_compares_the_three_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", NAME, "--ratios", "0.25", "0.5", "--batch-size", "1", "--rounds", "2", "--warmup", "0"]
    rows = benchmark.main([*words, "--device", "cpu", "--output", str(tmp_path / "speeds.json")])
    written = json.loads((tmp_path / "speeds.json").read_text())
    assert written["rows"] == rows
    assert [(row["ratio"], row["width"]) for row in rows] == [(0.25, 24), (0.5, 48)]
    assert all(set(row["speeds"]) == {"timm", "stand-alone", "in place"} for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{max(row['in place / stand-alone'] for row in rows):.3f}"
    assert printed[0].startswith(f"{NAME}, batch 1, float32, {written['device']['name']}")

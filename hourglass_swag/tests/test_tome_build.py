"""The package tome by itself: its kernels against the plain form, its installation, its examples."""

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.measure.flops import count_operations
from common.tests.reference import build, image
from hourglass_swag.models.ops.tome import ops, patch
from hourglass_swag.models.vision_transformer import VisionTransformer
from hourglass_swag.tests import tome_kernels

SOURCE = Path(ops.__file__).parents[1]
ROOT = Path(__file__).parents[2]


def copy_source(folder: Path) -> Path:
    """The package without anything that was built."""
    ignore = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    return shutil.copytree(SOURCE, folder, ignore=ignore)


def run(words: Sequence[str], folder: Path, **environment: str) -> str:
    """Output of a command with this Python."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


# Kernels


@pytest.mark.slow
def test_kernels_interpreted_on_the_cpu():
    pytest.importorskip("triton", reason="triton is not installed")
    words = ["-m", "hourglass_swag.tests.tome_kernels"]
    assert "as plain PyTorch" in run(words, ROOT, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_without_a_gpu(dtype):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hourglass_swag.models.ops.tome.tome import kernels

    constants = {
        "propose": {"channels": 80, "WIDTH": 128, "TILE": 32, "STEP": 64},
        "accept": {"ORDERED": True, "WIDTH": 1024, "STEP": 8},
        "average": {"MERGED": 64, "WIDTH": 2048},
    }
    kinds = {"metric": dtype, "x": dtype, "out": dtype, "size": "fp32", "total": "fp32", "best": "fp32"}
    kinds |= dict.fromkeys(("partner", "keep", "source", "into"), "i64")
    for name, fixed in constants.items():
        kernel = getattr(kernels, name)
        signature = {word: f"*{kinds[word]}" if word in kinds else "i32" for word in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 2})
        assert built.asm["cubin"]
        assert built.metadata.shared <= 99 * 1024, "what a small GPU has"


@pytest.mark.gpu
def test_kernels_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in (*tome_kernels.SHAPES, *tome_kernels.LARGE):
        tome_kernels.compare(*shape, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_network_with_the_kernels(compiled):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = {"image_size": 24, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 32}
    images, outputs = image(2, 24).float().cuda(), {}
    for form in ("native", "fused"):
        network = patch.swag(build(VisionTransformer, 3, **options).float().cuda(), scatter=form)
        network.r = 5
        with torch.no_grad():
            counted = count_operations(network, images).executed
            outputs[form] = (torch.compile(network, fullgraph=True) if compiled else network)(images)
        outputs[f"{form} products"] = counted["matmul"], counted["linear"]
    torch.testing.assert_close(outputs["fused"], outputs["native"], rtol=1e-4, atol=1e-4)
    assert outputs["fused products"] == outputs["native products"]


# Installation


@pytest.mark.slow
def test_installation_by_pip_and_by_setup_py(tmp_path):
    """Into folders of its own."""
    source = copy_source(tmp_path / "source")
    say = "import site, sys; site.addsitedir(sys.argv[1]); import tome; print(tome.__file__)"
    ways = {
        "pip": ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "."],
        "develop": ["setup.py", "build", "develop", "--no-deps"],
        "install": ["setup.py", "build", "install", "--install-lib", str(tmp_path / "install")],
    }
    for way, words in ways.items():
        target = tmp_path / way
        run(words, source, PIP_TARGET=str(target), PIP_NO_BUILD_ISOLATION="0")
        where = run(["-c", say, str(target)], tmp_path).splitlines()[-1]
        expected = source if way == "develop" else target
        assert where == str(expected / "tome" / "__init__.py")
        (metadata,) = [*target.glob("leanvit_tome-*/METADATA"), *target.glob("leanvit_tome-*/PKG-INFO")]
        assert "Name: leanvit-tome\n" in metadata.read_text()
        assert "timm==" not in metadata.read_text()


# Examples


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes of two images of noise."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            pixels = generator.integers(0, 256, (250, 240, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "words", "last"),
    [
        ("0_validate_timm", ["{data}", "--model", "vit_tiny_patch16_224", "-r", "8", "--no-pretrained"], "r = 8: "),
        ("1_benchmark_timm", ["--model", "vit_tiny_patch16_224", "-r", "8", "--batch-size", "1", "--runs",
                              "3"], "r = 8: "),
        ("2_visualize_timm", ["{data}/a/0.png", "--model", "vit_tiny_patch16_224", "-r", "8", "--no-pretrained",
                              "--output", "{data}/out.png"], "101 tokens left"),
        ("3_schedules_swag", ["--model", "vit_b16_in1k", "--resolution", "64", "-r", "1", "--batch-size", "1", "--runs",
                              "2"], "first layer alone: "),
        ("4_train_mae", ["{data}", "--model", "vit_tiny_patch16_224", "-r", "8", "--no-pretrained", "--batch-size",
                         "2"], "loss "),
    ],
)  # fmt: skip
def test_examples_run(example, words, last, images, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SOURCE))
    words = [word.format(data=images) for word in words]
    device = [] if example.startswith("2") else ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [example, *words, *device])
    runpy.run_path(str(SOURCE / "examples" / f"{example}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)
    if example.startswith("2"):
        assert Image.open(images / "out.png").size == (448, 224)

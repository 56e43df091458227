"""The package tome by itself: its operators against the plain form, built anew; its installation; its examples."""

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
from filelock import FileLock
from PIL import Image

from common.tests.reference import array, build, image
from hourglass_swag.models.ops.tome import merge, ops, patch
from hourglass_swag.models.vision_transformer import VisionTransformer

SOURCE = Path(ops.__file__).parents[1]
ARCHITECTURES = "8.0;9.0"


def copy_source(folder: Path) -> Path:
    """The package without anything that was built."""
    ignore = shutil.ignore_patterns("_C*", "build", "*.egg-info", "__pycache__")
    return shutil.copytree(SOURCE, folder, ignore=ignore)


def run(words: Sequence[str], folder: Path, **environment: str) -> str:
    """Output of a command with this Python."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def has_nvcc() -> bool:
    return torch.version.cuda is not None and shutil.which("nvcc") is not None


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, str]:
    """Library and log of a build of everything that this machine can build; once for all test processes."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tome-build"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            source = copy_source(folder / "source")
            (folder / "log").write_text(run(["setup.py", "build", "--build-lib", str(folder / "lib")], source))
    (library,) = (folder / "lib" / "tome").glob("_C*.so")
    return library, (folder / "log").read_text()


@pytest.fixture
def operator(built, monkeypatch) -> frozenset[str]:
    """Kinds of device of the operator, loaded for the duration of a test."""
    monkeypatch.setattr(ops, "_devices", None)
    return ops.load(iter([built[0]]))


def sample(batch: int, num_tokens: int, width: int, r: int, *, device: str = "cpu"):
    """Tokens, sizes and a matching."""
    x, size, metric = (
        torch.from_numpy(array(name, shape)).to(device)
        for name, shape in (
            ("x", (batch, num_tokens, width)), ("size", (batch, num_tokens, 1)), ("metric", (batch, num_tokens, 5)),
        )
    )  # fmt: skip
    return x, size.abs() + 1, merge.bipartite_soft_matching(metric, r, class_token=True)[0]


def compare_with_plain(x: torch.Tensor, size: torch.Tensor, matching: merge.Matching, dtype: torch.dtype) -> None:
    """The operator errs at most twice as much as plain PyTorch of the same type, both against float64."""
    x, size = x.to(dtype), size.to(ops.accumulation_type(dtype))
    for weights in (size, None):
        matching.scatter = "native"
        exact, total = matching.average(x.double(), None if weights is None else weights.double())
        plain, _ = matching.average(x, weights)
        matching.scatter = "fused"
        got, got_total = matching.average(x, weights)
        assert got.dtype == dtype
        assert got_total.dtype == ops.accumulation_type(dtype)
        torch.testing.assert_close(got_total.double(), total, rtol=1e-6, atol=0)
        allowed = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float64).eps
        assert (got - exact).abs().max() <= allowed


SHAPES = [(1, 3, 1, 1), (2, 17, 7, 5), (3, 40, 64, 20), (2, 70, 33, 35)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
def test_everything_this_machine_can_build_is_built(built, operator):
    assert operator == ({"cpu", "cuda"} if has_nvcc() else {"cpu"})
    if has_nvcc():
        assert "code=sm_80" in built[1]
        assert "code=sm_90" in built[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_on_the_cpu(operator, shape, dtype):
    compare_with_plain(*sample(*shape), dtype)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1370, 1280, 685), (2, 300, 1024, 40)])
def test_operator_on_the_gpu(built, operator, shape, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if "cuda" not in operator:
        pytest.skip("no nvcc")
    compare_with_plain(*sample(*shape, device="cuda"), dtype)


@pytest.mark.slow
def test_operator_is_a_good_citizen(operator):
    """Schema, shape function and gradient, by torch's own check; also where a token is in no group."""
    x, size, matching = sample(2, 9, 3, 3)
    kth = merge.kth_bipartite_soft_matching(x, 4)[0]
    for each in (matching, kth):
        for weights in (size, None):
            indices = tuple(index.contiguous() for index in (each.keep, each.source, each.into))
            arguments = (x.clone().requires_grad_(), weights, *indices)
            torch.library.opcheck(torch.ops.tome.merge_wavg.default, arguments)
            assert torch.autograd.gradcheck(lambda x, rest=arguments[1:]: ops.merge_wavg(x, *rest)[0], arguments[:1])


@pytest.mark.slow
def test_weights_with_a_gradient_take_the_plain_form(operator):
    x, size, matching = sample(1, 9, 3, 3)
    size.requires_grad_()
    matching.average(x, size)[0].sum().backward()
    assert size.grad is not None


@pytest.mark.slow
def test_operator_refuses_what_it_cannot_do(operator):
    x, size, matching = sample(1, 9, 3, 3)
    keep, source, into = matching.keep, matching.source, matching.into
    call = torch.ops.tome.merge_wavg
    for arguments, error, message in (
        ((x, size, keep + 100, source, into), IndexError, "position 10. of 9 tokens"),
        ((x, size, keep, source - 100, into), IndexError, "position -.* of 9 tokens"),
        ((x, size, keep, source, into + 100), IndexError, "into holds 10., there are 6 rows"),
        ((x, size.float(), keep, source, into), RuntimeError, "size must be Double for Double tokens, got Float"),
        ((x[0], size, keep, source, into), RuntimeError, r"x must be \(B, N, C\)"),
        ((x, size, keep.int(), source, into), RuntimeError, "must be int64"),
        ((x, size, keep, source[:, :2].contiguous(), into), RuntimeError, "differ in length: 2, 3"),
        ((x.transpose(1, 2), size, keep, source, into), RuntimeError, "size must be"),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_network_with_the_operator(operator, compiled):
    options = {"image_size": 24, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    networks = [patch.swag(build(VisionTransformer, 3, **options), scatter=form) for form in ("native", "auto")]
    runnable = []
    for network in networks:
        network.r = 5  # pyright: ignore[reportAttributeAccessIssue]
        runnable.append(torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network)
    plain, fused = (network(image(2, 24)) for network in runnable)
    torch.testing.assert_close(fused, plain)
    gradients = [torch.autograd.grad(out.square().sum(), list(network.parameters()), allow_unused=True)
                 for out, network in zip((plain, fused), networks, strict=True)]  # fmt: skip
    torch.testing.assert_close(gradients[1], gradients[0])


# Installation


@pytest.mark.slow
def test_installation_by_pip_and_by_setup_py(tmp_path):
    """Without operators, whose build is tested above; into folders of its own."""
    source = copy_source(tmp_path / "source")
    say = "import site, sys; site.addsitedir(sys.argv[1]); import tome; print(tome.__file__, sorted(tome.ops.load()))"
    ways = {
        "pip": (["-m", "pip", "install", "--no-build-isolation", "--no-deps", "."], {}),
        "develop": (["setup.py", "build", "develop", "--no-deps"], {}),
        "install": (["setup.py", "build", "install", "--install-lib", str(tmp_path / "install")], {}),
    }
    for way, (words, environment) in ways.items():
        target = tmp_path / way
        run(words, source, TOME_OPERATORS="none", PIP_TARGET=str(target), **environment)
        where = run(["-c", say, str(target)], tmp_path).splitlines()[-1]
        expected = source if way == "develop" else target
        assert where == f"{expected / 'tome' / '__init__.py'} []"
        (metadata,) = [*target.glob("leanvit_tome-*/METADATA"), *target.glob("leanvit_tome-*/PKG-INFO")]
        assert "Name: leanvit-tome\n" in metadata.read_text()
        assert "timm==" not in metadata.read_text()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TOME_OPERATORS": "gpu"}, "TOME_OPERATORS must be one of auto, none, cpu, cuda, got 'gpu'"),
        ({"TOME_OPERATORS": "cpu", "CXX": "/nowhere/c++"}, "but there is no C++ compiler (/nowhere/c++)"),
        ({"TOME_OPERATORS": "cuda", "CUDA_HOME": "/nowhere"}, "TOME_OPERATORS=cuda, but "),
        ({"CXX": "/nowhere/c++"}, "no operators are built: there is no C++ compiler"),
    ],
)
def test_what_cannot_be_built_is_said(environment, message, monkeypatch, capsys):
    for name in ("TOME_OPERATORS", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "CUDA_HOME" in environment:  # torch looked for it when it was imported
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", environment["CUDA_HOME"])
    choose = runpy.run_path(str(SOURCE / "setup.py"), run_name="setup")["choose"]
    if environment.get("TOME_OPERATORS"):
        with pytest.raises(SystemExit, match="tome: ") as stopped:
            choose()
        assert message in str(stopped.value)
    else:
        assert choose() == "none"
        assert message in capsys.readouterr().err


def test_an_nvcc_of_another_cuda_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.2")
    find_missing = runpy.run_path(str(SOURCE / "setup.py"), run_name="setup")["find_missing"]
    assert find_missing(cuda=True) == "nvcc is that of CUDA 9, torch is built for CUDA 13.2"


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

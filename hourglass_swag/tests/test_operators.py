"""The compiled operators of ACT and SMYRF: built from a copy of their folder, then compared in a process of its own."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.run.files import ROOT

OPS = ROOT / "hourglass_swag" / "models" / "ops"
TESTS = Path(__file__).parent
HAS_NVCC = shutil.which("nvcc") is not None and torch.version.cuda is not None

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    return result.stdout + result.stderr


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a copy; folder that holds the package with the library, and what was printed."""
    copy = folder / "ops"
    shutil.copytree(OPS, copy, ignore=shutil.ignore_patterns("build", "*.so", "tome", "__pycache__", "*.egg-info"))
    text = run([sys.executable, "setup.py", "build", "--build-lib", "lib"], copy, MAX_JOBS="2", **environment)
    return copy / "lib", text


def check(folder: Path, *words: str) -> str:
    """What ``check_operators`` prints."""
    command = [sys.executable, "-m", "hourglass_swag.tests.check_operators", str(folder), *words]
    return run(command, ROOT, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_build_and_compare(tmp_path: Path) -> None:
    """Everything that this machine can build; the CUDA part for two architectures."""
    folder, text = build(tmp_path, **({"TORCH_CUDA_ARCH_LIST": "8.0;9.0"} if HAS_NVCC else {}))
    if HAS_NVCC:
        assert "arch=compute_80,code=sm_80" in text
        assert "arch=compute_90,code=sm_90" in text
    else:
        assert "only the CPU part is built" in text
    printed = check(folder)
    assert f"devices: cpu {'cuda ' if HAS_NVCC else ''}meta" in printed
    assert "all agree" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not HAS_NVCC, reason="needs a CUDA device and nvcc")
def test_operators_on_a_gpu(tmp_path: Path) -> None:
    assert "all agree" in check(build(tmp_path)[0], "--device", "cuda")


def test_kernels_thread_by_thread_on_the_cpu(tmp_path: Path) -> None:
    """The CUDA kernels without a GPU."""
    source, headers = TESTS / "emulated_kernels.cpp", OPS / "ACT" / "extensions" / "csrc"
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-w", "-I", str(headers), str(source), "-o", "emulated"]
    run(command, tmp_path)
    assert run(["./emulated"], tmp_path).count(": same") == 6


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("gpu", "must be one of auto, none, cpu, cuda"), ("cpu", "LEANVIT_OPERATORS=cpu, but there is no C++ compiler")],
)
def test_setup_refuses_what_it_cannot_build(tmp_path: Path, wanted: str, message: str) -> None:
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(OPS / name, tmp_path)
    environment = os.environ | {"LEANVIT_OPERATORS": wanted, "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_an_nvcc_of_another_cuda_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to build with it: the CPU part alone is better than an error."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.2")
    find_missing = runpy.run_path(str(OPS / "setup.py"), run_name="setup")["find_missing"]
    assert find_missing(cuda=True) == "nvcc is that of CUDA 9, torch is built for CUDA 13.2"

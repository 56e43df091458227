"""Builds the operators of ACT (adaptive clustering, weighted sum, broadcast) and SMYRF, one library for CPU and CUDA.

    python setup.py build develop     (the published way; also: build install)
    pip install .                     (or -e . ; --no-build-isolation does without fetching setuptools)

A build is for the torch of this environment. ``develop`` puts the library beside its sources, where this checkout finds
it; ``install`` and pip put it into the package ``leanvit_ops``. With a C++ compiler the CPU part is built, with nvcc
and a CUDA build of torch the CUDA part too (ACT alone; SMYRF has none); what is left out is said. Nothing else of this
folder is installed. Without any of this, both methods run in plain PyTorch.

Environment: LEANVIT_OPERATORS = auto (default), none, cpu or cuda: what to build; cpu and cuda fail where they cannot.
TORCH_CUDA_ARCH_LIST: CUDA architectures; by default those of the GPUs present, or "8.0;9.0+PTX" where there is none.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools
from setuptools import setup
from setuptools.command.develop import develop
from setuptools.command.install import install

HERE = Path(__file__).resolve().parent
PACKAGE = "leanvit_ops"
FOLDER = "compiled"  # of the package
CPU_SOURCES = ["ACT/extensions/csrc/operators.cpp", "smyrf/csrc/cluster_attention.cpp"]
CUDA_SOURCES = ["ACT/extensions/csrc/operators_cuda.cu"]
HEADERS = ["ACT/extensions/csrc/checks.h", "ACT/extensions/csrc/kernels.cuh"]
CHOICES = ("auto", "none", "cpu", "cuda")
PORTABLE_ARCHITECTURES = "8.0;9.0+PTX"
OLDEST_SETUPTOOLS = 77
PIP_INSTALL = [sys.executable, "-m", "pip", "install", "--no-deps"]


def say(text: str) -> None:
    print(f"{PACKAGE}: {text}", file=sys.stderr, flush=True)


def find_torch() -> str | None:
    """Make torch importable; what is wrong, if anything is.

    pip's isolated build hides the packages of the environment, but the library must fit that environment's torch.
    """
    try:
        import torch as _
    except ImportError:
        for folder in {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}:
            site.addsitedir(folder)
        try:
            import torch as _  # noqa: F401
        except ImportError as error:
            return f"torch cannot be imported ({error}); install it first, and try --no-build-isolation with pip"
    return None


def find_toolkit() -> None:
    """Set CUDA_HOME to a toolkit that has headers, and let those that it lacks come from torch's packages.

    torch takes the folder above ``nvcc``, which may be a mere link.
    """
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
    if not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ):
        for folder in [*folders, Path("/usr/local/cuda")]:
            if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
                os.environ["CUDA_HOME"] = str(folder)
                break
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    headers = Path(torch.__file__).parent.parent / "nvidia" / f"cu{major}" / "include"
    if headers.is_dir():
        more = [os.environ["CPATH"]] if os.environ.get("CPATH") else []
        os.environ["CPATH"] = os.pathsep.join([*more, str(headers), str(headers / "cccl")])


def find_missing(cuda: bool) -> str | None:
    """What the build of the CPU or the CUDA part lacks, in words."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    if not cuda:
        return None
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        return "there is no nvcc (CUDA_HOME)"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or version[1] != torch.version.cuda.partition(".")[0]:
        return f"nvcc is that of CUDA {version and version[1]}, torch is built for CUDA {torch.version.cuda}"
    return None


def choose() -> str:
    """The part to build: none, cpu, or cuda (which includes the CPU's)."""
    wanted = os.environ.get("LEANVIT_OPERATORS", "auto")
    if wanted not in CHOICES:
        sys.exit(f"{PACKAGE}: LEANVIT_OPERATORS must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "none":
        return wanted
    if missing := find_torch():
        sys.exit(f"{PACKAGE}: {missing}")
    find_toolkit()
    if missing := find_missing(cuda=False):
        if wanted != "auto":
            sys.exit(f"{PACKAGE}: LEANVIT_OPERATORS={wanted}, but {missing}")
        say(f"nothing is built: {missing}; ACT and SMYRF run in plain PyTorch")
        return "none"
    if wanted == "cpu":
        return wanted
    if missing := find_missing(cuda=True):
        if wanted == "cuda":
            sys.exit(f"{PACKAGE}: LEANVIT_OPERATORS=cuda, but {missing}")
        say(f"only the CPU part is built: {missing}")
        return "cpu"
    return "cuda"


def extensions(part: str) -> list[Any]:
    """The library with the operators."""
    if part == "none":
        return []
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    name, headers = f"{PACKAGE}._C", {"depends": HEADERS}
    if part == "cpu":
        return [CppExtension(name, CPU_SOURCES, extra_compile_args=["-O3"], **headers)]
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", PORTABLE_ARCHITECTURES)
    flags = {"cxx": ["-O3"], "nvcc": ["-O3"]}
    return [CUDAExtension(name, [*CPU_SOURCES, *CUDA_SOURCES], extra_compile_args=flags, **headers)]


class Develop(develop):
    """``setup.py develop``: the library beside its sources, then an editable install in this environment."""

    def run(self) -> None:
        build = self.get_finalized_command("build_ext")
        build.inplace = True
        self.run_command("build_ext")
        if self.distribution.have_run.get("build_ext"):  # by ``build``, before this
            build.copy_extensions_to_source()
        command = [*PIP_INSTALL, "--no-build-isolation", "-e", str(HERE)]
        subprocess.check_call(command, env={**os.environ, "LEANVIT_OPERATORS": "none"})


class Install(install):
    """``setup.py install``: what ``pip install .`` does, with what ``build`` has compiled."""

    def run(self) -> None:
        if self.root:  # called by bdist_wheel to fill a wheel
            super().run()
            return
        wheels = HERE / "build" / "wheel"
        shutil.rmtree(wheels, ignore_errors=True)
        self.distribution.get_command_obj("bdist_wheel").dist_dir = str(wheels)
        self.run_command("bdist_wheel")
        (wheel,) = wheels.glob("*.whl")
        subprocess.check_call([*PIP_INSTALL, "--force-reinstall", str(wheel)])


def command_classes(part: str) -> dict[str, Any]:
    """Commands that differ from setuptools'."""
    classes: dict[str, Any] = {"develop": Develop, "install": Install}
    if part != "none":
        from torch.utils.cpp_extension import BuildExtension

        classes["build_ext"] = BuildExtension
    return classes


if __name__ == "__main__":
    os.chdir(HERE)
    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(
            f"{PACKAGE}: setuptools {setuptools.__version__} is too old: pip install 'setuptools>={OLDEST_SETUPTOOLS}'"
        )
    part = choose()
    setup(
        packages=[PACKAGE],
        package_dir={PACKAGE: FOLDER},
        ext_modules=extensions(part),
        cmdclass=command_classes(part),
    )

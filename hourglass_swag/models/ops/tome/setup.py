"""Installs the package ``tome`` and builds its operators.

    pip install --no-build-isolation -e .        (editable; without -e: a copy)
    python setup.py build develop                (the published way; also: install)

With a C++ compiler the CPU operator is built, with nvcc and a CUDA build of torch the CUDA operator too; whatever is
missing is said and left out, and the package then runs in plain PyTorch. A build must see the torch it is for, so pip
needs --no-build-isolation; without that flag it installs the package without operators.

Environment: TOME_OPERATORS = auto (default), none, cpu or cuda: what to build; cpu and cuda fail where they cannot.
TORCH_CUDA_ARCH_LIST: CUDA architectures; by default those of the GPUs present, or "8.0;9.0+PTX" where there is none.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.develop import develop as Develop

HERE = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")
PORTABLE_ARCHITECTURES = "8.0;9.0+PTX"


def say(text: str) -> None:
    print(f"tome: {text}", file=sys.stderr, flush=True)


def find_toolkit() -> None:
    """Set CUDA_HOME to a toolkit that has headers: torch takes the folder above ``nvcc``, which may be a mere link."""
    if "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
    for folder in [*folders, Path("/usr/local/cuda")]:
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = str(folder)
            return


def find_missing(cuda: bool) -> str | None:
    """What the build of the operators lacks, in words."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return "torch cannot be imported (with pip: add --no-build-isolation)"
    if not cuda:
        compiler = os.environ.get("CXX", "c++").split()[0]
        return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        return "there is no nvcc (CUDA_HOME)"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is that of CUDA {version and version[1]}, torch is built for CUDA {torch.version.cuda}"
    return None


def choose() -> str:
    """The operators to build: none, cpu, or cuda (which includes the CPU)."""
    wanted = os.environ.get("TOME_OPERATORS", "auto")
    if wanted not in CHOICES:
        sys.exit(f"tome: TOME_OPERATORS must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "none":
        return wanted
    if missing := find_missing(cuda=False):
        if wanted != "auto":
            sys.exit(f"tome: TOME_OPERATORS={wanted}, but {missing}")
        say(f"no operators are built: {missing}; the package runs in plain PyTorch")
        return "none"
    if wanted == "cpu":
        return wanted
    if missing := find_missing(cuda=True):
        if wanted == "cuda":
            sys.exit(f"tome: TOME_OPERATORS=cuda, but {missing}")
        say(f"only the CPU operator is built: {missing}")
        return "cpu"
    return "cuda"


def extensions(operators: str) -> list:
    """The extension module with the operators."""
    if operators == "none":
        return []
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = ["-O3"]
    sources = ["tome/csrc/merge.cpp"]
    if operators == "cpu":
        return [CppExtension("tome._C", sources, extra_compile_args={"cxx": flags})]
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", PORTABLE_ARCHITECTURES)
    arguments = {"cxx": [*flags, "-DWITH_CUDA"], "nvcc": flags}
    return [CUDAExtension("tome._C", [*sources, "tome/csrc/merge_cuda.cu"], extra_compile_args=arguments)]


class DevelopInPlace(Develop):
    """``setup.py develop``: operators into the source tree, then an editable install in this environment."""

    def run(self) -> None:
        build = self.get_finalized_command("build_ext")
        built_elsewhere = self.distribution.have_run.get("build_ext")  # by a `build` on the same command line
        build.inplace = True
        self.run_command("build_ext")
        if built_elsewhere:
            build.copy_extensions_to_source()
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "-e", str(HERE)]
        if self.no_deps:
            command.append("--no-deps")
        subprocess.check_call(command, env={**os.environ, "TOME_OPERATORS": "none"})


def command_classes(operators: str) -> dict:
    """Commands that differ from setuptools'."""
    if operators == "none":
        return {"develop": DevelopInPlace}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension, "develop": DevelopInPlace}


if __name__ == "__main__":
    os.chdir(HERE)
    find_toolkit()
    operators = choose()
    setup(ext_modules=extensions(operators), cmdclass=command_classes(operators))

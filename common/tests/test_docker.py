"""The images without a Docker engine: their steps are commands of the Makefile, and they work in a clean folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.run.files import ROOT

IMAGES = ("docker/Dockerfile.cpu", "docker/Dockerfile.cuda")


def steps(image: str, instruction: str) -> list[str]:
    """Arguments of one kind of instruction, line continuations joined."""
    text = (ROOT / image).read_text().replace("\\\n", " ")
    return re.findall(rf"^{instruction} (.*)$", text, re.MULTILINE)


def extras_of(image: str) -> list[str]:
    """Extras of the project that an image installs."""
    (found,) = [line for line in steps(image, "ENV") if line.startswith("EXTRAS=")]
    return found.removeprefix("EXTRAS=").strip('"').split()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_needs_only_what_a_fresh_machine_needs(image: str) -> None:
    system, *ours = steps(image, "RUN")
    assert system.startswith("apt-get update && apt-get install")
    assert {"make", "g++", "git"} <= set(system.split())
    assert [re.sub(r"^(\w+=\w+ )+", "", line) for line in ours] == ["make dependencies", "make operators"]
    assert steps(image, "CMD") == ['["make", "reproduce"]']
    readme = (ROOT / "README.md").read_text()
    assert "make reproduce" in readme
    assert "make install" in readme


@pytest.mark.parametrize("image", IMAGES)
def test_packages_come_in_a_layer_before_the_source(image: str) -> None:
    text = (ROOT / image).read_text()
    assert text.index("COPY pyproject.toml constraints.txt Makefile ./") < text.index("RUN make dependencies")
    assert text.index("RUN make dependencies") < text.index("COPY . .") < text.index("make operators")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_no_development_tools(image: str) -> None:
    extras = extras_of(image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == set(project) - {"dev", "video", "serve"}  # the page is for the machine that it runs on
    installed = [name for extra in extras for name in project[extra]]
    assert not re.search(r"pytest|ruff|pyright|hypothesis|leanvit\[", " ".join(installed))


def test_the_cuda_image_builds_its_operators_for_gpus_or_fails() -> None:
    assert "RUN LEANVIT_OPERATORS=cuda make operators" in (ROOT / IMAGES[1]).read_text()


def test_the_cpu_image_takes_the_address_of_a_torch_without_cuda() -> None:
    assert steps(IMAGES[0], "ARG") == ["TORCH_INDEX"]
    for address in ("", "https://example.org/cpu"):
        environment = {**os.environ, "TORCH_INDEX": address}
        command = ["make", "--dry-run", "--always-make", "dependencies"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert ("--index https://example.org/cpu --index-strategy unsafe-best-match" in done.stdout) == bool(address)
        assert ("--index" in done.stdout) == bool(address)


@pytest.mark.slow
@pytest.mark.parametrize("image", IMAGES[:1])
def test_the_steps_run_in_a_clean_folder(image: str, tmp_path: Path) -> None:
    """COPY, then every RUN line but the system packages, then a command of the README inside."""
    if not shutil.which("make") or not (ROOT / ".git").exists():
        pytest.skip("needs make and a git checkout to copy")
    folder = tmp_path / "leanvit"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for line in subprocess.run(["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                               check=True).stdout.split():  # fmt: skip
        if (ROOT / line).is_file():
            shutil.copy(ROOT / line, folder / line)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"EXTRAS": " ".join(extras_of(image)), "LEANVIT_OPERATORS": "none"}
    base = getattr(sys, "_base_executable", sys.executable)
    for line in steps(image, "RUN")[1:]:
        done = subprocess.run(f"{line} PYTHON={base}", shell=True, cwd=folder, env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip
        if done.returncode and re.search(r"(?i)connect|resolve|network|offline|timed out", done.stderr):
            pytest.skip(f"{line}: no package index can be reached from here: {done.stderr.strip()[-200:]}")
        assert done.returncode == 0, done.stderr[-3000:]
    command = [".venv/bin/python", "-m", "common.reproduce", "hourglass_swag", "--table", "swag", "--columns", "gmacs"]
    printed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert "364.8" in printed
    assert "reproduced" in printed
    names = subprocess.run([".venv/bin/python", "-m", "pip", "list"], cwd=folder, capture_output=True, text=True,
                           check=True).stdout  # fmt: skip
    assert {"leanvit", "leanvit-ops", "leanvit-tome"} <= set(names.replace("_", "-").split())
    assert not re.search(r"(?m)^(pytest|ruff|basedpyright|hypothesis)\b", names)

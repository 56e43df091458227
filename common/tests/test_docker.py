"""The images without a Docker engine: their steps are the README's own command, and it works in a clean folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.run.files import ROOT

IMAGES = ("docker/Dockerfile.cpu", "docker/Dockerfile.cuda")


def steps(image: str, instruction: str) -> list[str]:
    """Arguments of one kind of instruction, line continuations joined."""
    text = (ROOT / image).read_text().replace("\\\n", " ")
    return re.findall(rf"^{instruction} (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_needs_only_what_a_fresh_machine_needs(image: str) -> None:
    system, *ours = steps(image, "RUN")
    assert system.startswith("apt-get update && apt-get install")
    assert " make " in system
    assert ours == ["make install"]
    assert steps(image, "CMD") == ['["make", "reproduce"]']
    readme = (ROOT / "README.md").read_text()
    assert "make reproduce" in readme
    assert "make install" in readme


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

"""Every program understands its flags, or refuses them, before it imports torch."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.run.files import ROOT

HEAVY = ("torch", "torchvision", "timm", "scipy", "sklearn")
NO_PROGRAMS = ("hourglass_swag/models/", "common/run/program.py", "common/run/torchrun.py", "docs/")
"""Build scripts and published examples with environments of their own, a docstring's example, torchrun's parser."""

BLOCKED = "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules.update(dict.fromkeys({heavy})); " + (
    "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def programs() -> list[str]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if "tests" in path.parts or name.startswith((".", *NO_PROGRAMS)):
            continue
        if re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE):
            found.append(name)
    return found


def start(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("program", programs())
def test_parsing_needs_no_torch(program: str, tmp_path: Path) -> None:
    script = str(ROOT / program)
    for words in (["--help"], ["--no-such-flag"]):
        done = start("-c", BLOCKED.format(heavy=HEAVY), script, *words, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        if words == ["--help"]:
            assert done.returncode == 0
            assert "usage:" in done.stdout
        else:
            assert done.returncode == 2
            assert "error: " in done.stderr.splitlines()[-1]


def test_a_mistyped_flag_takes_little_time(tmp_path: Path) -> None:
    """A large parser, in processor time of this machine; the names are those that -X importtime saw."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start("-X", "importtime", str(ROOT / "uvc/joint_train.py"), "--no-such-flag", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "common.run.cli" in imported
    assert not imported & set(HEAVY)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5

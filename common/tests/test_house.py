"""The plan of the house: imports point one way, no file names a machine, and what the docs say to type is accepted."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from common.ledger.results import RecordError
from common.ledger.tables import TableError, load_tables
from common.run.errors import EXPECTED
from common.run.files import ROOT

PAPERS = ("scala", "hourglass_swag", "dvt", "sit", "uvc")


def tracked() -> list[Path]:
    """Files of the repository: git's list, or all but the ignored folders where there is no git."""
    try:
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        names = [
            str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not re.search(r"/\.|__pycache__|egg-info", str(p))
        ]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PAPERS)
def test_no_module_hides_one_of_the_standard_library(package):
    """A script's own folder comes first on the path."""
    names = {path.stem for path in (ROOT / package).glob("*.py")} | {path.name for path in (ROOT / package).glob("*/")}
    assert not names & sys.stdlib_module_names


def test_imports_point_one_way() -> None:
    for package in ("common", *PAPERS):
        forbidden = set(PAPERS) - {package}
        for path in (ROOT / package).rglob("*.py"):
            if package == "common" and "tests" in path.parts:
                continue  # this test, for one, asks the papers' parsers
            wrong = forbidden & set(imported(path))
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


ROOMS = {
    "run": set(),
    "data": {"run"},
    "measure": {"run"},
    "hosts": {"data", "measure", "run"},
    "ledger": {"measure", "data", "run"},
}
"""Room of ``common/`` -> the rooms that it may import; modules beside the rooms may be imported by all but ``run``."""


def modules_imported(path: Path, *, at_start: bool = False) -> set[str]:
    """Modules of this repository that a file imports, each with those that hold it; ``at_start``: not in functions."""

    def nodes(tree: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield node
            yield from nodes(node)

    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in nodes(tree) if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("common", *PAPERS)}


def test_rooms_import_downwards() -> None:
    for room, allowed in ROOMS.items():
        for path in (ROOT / "common" / room).rglob("*.py"):
            rooms = {name.split(".")[1] for name in modules_imported(path) if name.count(".")} & ROOMS.keys()
            assert rooms <= allowed | {room}, f"{path.relative_to(ROOT)} imports {sorted(rooms - allowed - {room})}"


def test_only_entry_points_and_what_the_ledger_asks_import_the_ledger() -> None:
    for paper in PAPERS:
        inner = ("arguments.py", "build.py", "loading.py", "engine.py", "losses.py", "models", "methods")
        for path in (ROOT / paper).rglob("*.py"):
            if path.relative_to(ROOT / paper).parts[0] in inner:
                assert not any(name.startswith("common.ledger") for name in modules_imported(path)), path
    for path in (ROOT / "common").glob("*.py"):
        if any(name.startswith("common.ledger") for name in modules_imported(path)):
            assert "__main__" in path.read_text(), f"{path.relative_to(ROOT)} is no entry point"


def test_the_house_has_no_circle() -> None:
    """No module needs, while it is imported, one that needs it."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("common", *PAPERS)
        for path in (ROOT / package).rglob("*.py")
        if "tests" not in path.parts
    }
    needs = {name: (modules_imported(path, at_start=True) & files.keys()) - {name} for name, path in files.items()}
    try:
        tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_models_see_neither_parser_nor_loop() -> None:
    for paper in PAPERS:
        for path in (ROOT / paper / "models").rglob("*.py"):
            if "examples" in path.parts:  # scripts of a package that can be installed by itself
                continue
            text = path.read_text()
            assert not re.search(
                r"^\s*(import|from) (argparse|common\.(run.engine|data|run.cli))\b", text, re.MULTILINE
            ), path


def test_no_machine_and_no_registry_is_written_down() -> None:
    registry = re.compile(r"(index-url|find-links|\bpypi\.org/simple|https?://[^ \"']+/simple\b)")
    machine = re.compile(r"(?<![\w.])/(home/[a-z]+|root|Users/\w+)/")
    for path in tracked():
        if path.suffix in (".npz", ".png") or path == Path(__file__):
            continue
        text = path.read_text(errors="ignore")
        assert not registry.search(text), f"{path} names a package registry"
        assert not machine.search(text), f"{path} names a folder of one machine"


def commands() -> list[tuple[str, str]]:
    """(where, command) of every python or torchrun line of the READMEs, the scripts and the tables."""
    found: list[tuple[str, str]] = []
    for path in tracked():
        if path.name == "README.md":
            blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
            for block in blocks:
                for variable, words in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
                    block = block.replace(f"${variable}", words)
                found += [(str(path.relative_to(ROOT)), line) for line in block.splitlines()]
    for table in load_tables():
        for row in table.rows:
            found += [(f"{table.path.name}/{row.id}", row.command(name)) for name in row.published if not row.cited]
    return [(where, re.sub(r"(^|\s)#.*", "", line)) for where, line in found]


def script_of(command: str) -> tuple[str, list[str]] | None:
    """(module, its words) of a command that starts one of our own programs which exists already."""
    words = shlex.split(command.partition(" > ")[0])
    if "-m" in words and words[0].endswith("python") and words[words.index("-m") + 1].startswith("common."):
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") and (ROOT / word).is_file()]
    if not scripts:
        return None
    return words[scripts[0]][:-3].replace("/", "."), words[scripts[0] + 1 :]


def test_documented_commands_are_accepted_by_the_real_parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program that is documented offers ``parse_args(argv)``, which takes the documented words."""
    (tmp_path / "DIR").mkdir()  # what a command calls DIR must exist for some of them
    monkeypatch.chdir(tmp_path)
    seen = set()
    for where, command in commands():
        found = script_of(command)
        if found is None:
            continue
        parse_args = getattr(importlib.import_module(found[0]), "parse_args", None)
        if parse_args is None:
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                parse_args(found[1])
        except SystemExit as error:
            if error.code:  # --print_config and the like end with 0
                pytest.fail(f"{where}: {command}: refused ({error.code})")
        if file := command.partition(" > ")[2].strip():  # which a later command reads
            (tmp_path / file).write_text(printed.getvalue())
        seen.add(found[0])
    assert {"common.reproduce", "hourglass_swag.imagenet_1k_eval", "hourglass_swag.get_flops_fps"} <= seen


def test_every_program_of_common_reports_mistakes_and_closed_pipes_alike() -> None:
    programs = [file for file in (ROOT / "common").glob("*.py") if "__main__" in file.read_text()]
    assert len(programs) > 4
    for file in programs:
        assert "run(main)" in file.read_text(), file
    for error in (TableError, RecordError):
        assert issubclass(error, EXPECTED)

"""Measurements made elsewhere: record files, and the command that files them.

    python -m common.results add FILE [FILE ...]     # check, and put under <paper>/results/
    python -m common.results list [PAPER ...]

A record file (JSON) says what was measured, on which device, with which versions, by which command, from which commit.
``make gpu`` writes one per part, ``hourglass_swag/get_flops_fps.py --output`` one per run. The ledger shows filed
values as ``recorded``, so a file is checked strictly before it is filed.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from common.ledger.reading import Reader, not_empty
from common.ledger.tables import COLUMNS, TableError, load_tables, papers
from common.run.errors import DataError
from common.run.files import ROOT, read_file, write_atomic
from common.run.flags import make_parser

FORMAT = 1


class RecordError(DataError):
    """A record file that cannot be used; the message names file, record and key."""


DEEPEST = 20
"""How deep the values of a file may be nested."""


def _is_line(text: str) -> str:
    return "" if text.isprintable() and len(text) <= 1000 else "expected one line of at most 1000 characters"


def _names_something(text: str) -> str:
    return not_empty(text) or _is_line(text)


def _is_date(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return f"expected an ISO date, got {text!r}"
    return _is_line(text)


def _describes_device(device: Mapping[str, Any]) -> str:
    if not {"name", "type", "torch"} <= set(device):
        return "expected an object with at least name, type and torch"
    wrong = [key for key in ("name", "type", "torch") if not (isinstance(device[key], str) and device[key])]
    wrong += [key for key, value in device.items() if isinstance(value, str) and _is_line(value)]
    return f"expected one line of text under {wrong[0]}" if wrong else ""


def _is_positive(value: float) -> str:
    return "" if value > 0 else f"expected a positive number, got {value!r}"


def _is_measured(value: float) -> str:
    """A check; within these bounds, no ratio or difference overflows."""
    possible = 1e-9 <= value <= 1e15
    return _is_positive(value) or ("" if possible else f"expected a number from 1e-9 to 1e15, got {value!r}")


Line = Annotated[str, _names_something]
Positive = Annotated[float, _is_measured]


@dataclass(frozen=True)
class Origin:
    """Where the records of a file come from."""

    created: Annotated[str, _is_date]
    """date and time, ISO 8601"""
    commit: Line
    device: Annotated[Mapping[str, Any], _describes_device]
    """``common.measure.benchmark.describe_device``: name, driver, versions"""
    command: Annotated[str, not_empty]
    part: Annotated[str, _is_line] = ""
    """which part of a longer job; names the file"""
    left_out: Sequence[str] = ()
    """what the job did not get to"""
    tests: Mapping[str, Any] | None = None
    """``status`` and ``summary`` of a part that ran tests and measured nothing"""
    programs: Mapping[str, Any] = field(default_factory=dict)
    """``paper/program`` -> what a benchmark whose speeds are not rows of a table wrote"""
    rehearsal: bool = False
    """nothing was measured: the steps were gone through where there is no GPU"""
    path: Path | None = None

    @property
    def text(self) -> str:
        """One line for the ledger: device, versions, commit, date."""
        words = [str(self.device.get("name", "unknown device")), f"torch {self.device.get('torch', '?')}"]
        if driver := self.device.get("driver"):
            words.append(f"driver {driver}")
        return ", ".join([*words, f"commit {self.commit[:12]}", self.created[:10]])


NOWHERE = Origin("", "unknown", {}, "")
"""Of a record that is in no file yet."""


@dataclass(frozen=True)
class Record:
    """One measured number of one row."""

    paper: str
    table: str
    row: str
    column: str
    value: Positive
    reference_row: str | None = None
    """the dense row (``table/row`` or a row of the same table) that it was measured against, round by round"""
    reference_value: Positive | None = None
    ratio: Positive | None = None
    """median of the ratios of single rounds"""
    dtype: Line = "float32"
    batch_size: Annotated[int, _is_positive] = 1
    resolution: int | None = None
    compiled: bool = False
    rounds: int | None = None
    spread_percent: float | None = None
    peak_memory_mb: float | None = None
    cuda_graph: bool = False
    """the pass was captured as a CUDA graph and replayed"""
    origin: Origin = NOWHERE

    @property
    def reference_key(self) -> str:
        """``table/row`` of the row that it was measured against; empty if there is none."""
        reference = self.reference_row or ""
        return reference if "/" in reference or not reference else f"{self.table}/{reference}"

    def is_ratio_to(self, dense: str) -> bool:
        """Whether it says how fast the row is beside ``dense``, a ``table/row``."""
        return self.reference_key == dense and (self.ratio is not None or self.reference_value is not None)

    @property
    def conditions(self) -> str:
        """Precision, way of running and batch, in words."""
        way = ", compiled" if self.compiled else ", CUDA graph" if self.cuda_graph else ""
        return f"{self.dtype}{way}, batch {self.batch_size}"

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", {self.ratio:.3f} x {self.reference_row}"
        spread = "" if self.spread_percent is None else f", spread {self.spread_percent:.1f} %"
        return f"{self.table}/{self.row} {self.column}: {self.value:.2f} im/s at batch {self.batch_size}{ratio}{spread}"

    def as_dict(self) -> dict[str, Any]:
        """What a file holds about it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "origin"}


READER = Reader(RecordError)
OPTIONAL = ("tests", "programs", "rehearsal")
"""keys of a file that are written only if they say something"""


def render(records: Sequence[Record], origin: Origin) -> str:
    """The text of a record file.

    Raises:
        RecordError: if the file would not be valid.
    """
    head = {key: value for key, value in asdict(origin).items() if key != "path" and (key not in OPTIONAL or value)}
    content = {"format": FORMAT, **head, "records": [record.as_dict() for record in records]}
    text = json.dumps(content, indent=1) + "\n"
    parse(text, where="records")
    return text


def write_records(path: Path, records: Sequence[Record], origin: Origin) -> None:
    """Write a record file atomically: the file is either complete or not there.

    Raises:
        RecordError: if the file would not be valid.
    """
    write_atomic(path, render(records, origin))


def parse(text: str, *, where: str) -> tuple[Origin, list[Record]]:
    """What a file says, checked except for the names of tables and rows.

    Raises:
        RecordError: if anything is missing, unknown, of the wrong type, or more than a file may hold.
    """
    try:
        data = json.loads(text, parse_int=_parse_int, object_pairs_hook=_parse_object)
    except ValueError as error:
        raise RecordError(f"{where}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise RecordError(f"{where}: its values are nested more than {DEEPEST} deep") from error
    found = data.pop("format", None) if isinstance(data, dict) else type(data).__name__
    if found != FORMAT:
        raise RecordError(f"{where}: not a record file of format {FORMAT} (found {found!r})")
    records = data.pop("records", None)
    if not isinstance(records, list):
        raise RecordError(f"{where}: records: expected a list")
    _check_values(data, where)
    for index, entry in enumerate(records):
        _check_values(entry, f"{where}: record {index}")
    origin = READER.section(Origin, data, where, path=None)
    keys = {field.name for field in fields(Record)} - {"origin", "cuda_graph"}  # files written earlier lack the latter
    return origin, [
        READER.section(Record, entry, f"{where}: record {index}", keys, origin=origin)
        for index, entry in enumerate(records)
    ]


def _parse_int(digits: str) -> float:
    """An integer of 64 bits at most; a longer one is a number like any other, or infinite."""
    return int(digits) if len(digits) < 19 else float(digits)


def _parse_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _check_values(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what JSON can say, and the ledger cannot write."""
    if depth > DEEPEST:
        raise RecordError(f"{where}: nested more than {DEEPEST} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordError(f"{where}: expected text, got half of a character: {value!r}") from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: expected a finite number, got {value!r}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(key, where)
            _check_values(inner, f"{where}: {key}", depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_values(inner, f"{where}: {index}", depth + 1)


def check_rows(records: Sequence[Record], *, where: str, root: Path = ROOT) -> None:
    """Every record must belong to a row that exists: to a value it publishes, or to a speed-up over its dense row.

    Raises:
        RecordError: naming the record and the nearest thing that exists.
    """
    known = papers(root)
    read_tables = cache(load_tables)
    for index, record in enumerate(records):
        here = f"{where}: record {index}"
        if record.paper not in known:
            raise RecordError(f"{where}: there is no paper {record.paper!r}; the papers are {list(known)}")
        try:
            tables = {table.name: table for table in read_tables(record.paper, root=root)}
        except TableError as error:
            raise RecordError(f"{where}: cannot read the tables of {record.paper}: {error}") from error
        if record.table not in tables:
            raise RecordError(f"{here}: {record.paper} has no table {record.table!r}; the tables are {sorted(tables)}")
        rows = {row.id: row for row in tables[record.table].rows}
        if record.row not in rows:
            raise RecordError(f"{here}: table {record.table!r} has no row {record.row!r}; the rows are {sorted(rows)}")
        published = rows[record.row].published
        is_speed = record.column in COLUMNS and COLUMNS[record.column].kind == "speed"
        is_speedup = is_speed and bool(rows[record.row].dense) and record.ratio is not None
        if record.column not in published and not is_speedup:
            raise RecordError(
                f"{here}: row {record.row!r} publishes no {record.column!r}; it publishes {sorted(published)}"
            )
        key = record.reference_key
        if key and key not in {row.key for table in tables.values() for row in table.rows}:
            raise RecordError(f"{here}: reference_row: {record.paper} has no row {key!r}")
        if is_speed and (dense := rows[record.row].dense) and not record.is_ratio_to(dense):
            raise RecordError(
                f"{here}: reference_row and ratio: expected a ratio to {dense!r}, of which it is a speed-up"
            )


def load_records(paper: str, *, root: Path = ROOT) -> list[Record]:
    """All filed records of a paper, oldest first; each knows its file by ``record.origin.path``.

    Raises:
        RecordError: if a filed file is damaged.
    """
    records = [record for path in record_files(paper, root=root) for record in load_file(paper, path)]
    return sorted(records, key=lambda record: record.origin.created)


def record_files(paper: str, *, root: Path = ROOT) -> list[Path]:
    """The filed files of a paper, by name."""
    return sorted((root / paper / "results").glob("*.json"))


def load_file(paper: str, path: Path) -> list[Record]:
    """The records of one filed file.

    Raises:
        RecordError: if it is damaged, or of another paper.
    """
    where = f"{paper}/results/{path.name}"
    records = parse(_read(path, where), where=where)[1]
    if other := [record.paper for record in records if record.paper != paper]:
        raise RecordError(f"{where}: holds a record of {other[0]!r}")
    return [replace(record, origin=replace(record.origin, path=path)) for record in records]


def _read(path: Path, where: str) -> str:
    try:
        return read_file(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{where}: cannot be read: {error}") from error


def add(file: Path, *, force: bool = False, root: Path = ROOT) -> list[Path]:
    """Check a record file and file it, split by paper.

    Returns:
        The files written, under ``<paper>/results/``; none for a file that only tells how tests went.

    Raises:
        RecordError: if the file is not valid, or a file of that name is there already and differs (``force`` replaces
            it).
    """
    origin, records = parse(_read(file, str(file)), where=str(file))
    if origin.rehearsal:
        raise RecordError(f"{file}: is a rehearsal, in which nothing was measured; only what ran on a GPU is filed")
    if not records and origin.tests:
        return []
    if not records:
        raise RecordError(f"{file}: holds no records, so there is nothing to file")
    check_rows(records, where=str(file), root=root)
    programs = {name.split("/")[0] for name in origin.programs}
    if unknown := programs - set(papers(root)):
        raise RecordError(f"{file}: programs of {sorted(unknown)}, which is no paper")
    contents: dict[Path, str] = {}
    for paper in sorted({record.paper for record in records} | programs):
        own = {name: output for name, output in origin.programs.items() if name.split("/")[0] == paper}
        content = render([record for record in records if record.paper == paper], replace(origin, programs=own))
        part = origin.part or hashlib.sha256(content.encode()).hexdigest()[:8]
        name = "-".join(_slug(word) for word in (origin.device["name"], origin.created[:10], part))
        if len(name) > 200:
            raise RecordError(f"{file}: device and part: {len(name)} characters do not make a file name; shorten them")
        contents[root / paper / "results" / f"{name}.json"] = content
    if not force:
        for path, content in contents.items():
            if path.exists() and path.read_text(encoding="utf-8") != content:
                raise RecordError(
                    f"{path.relative_to(root)} exists already with other content; --force replaces it, or give the "
                    f"measurement another 'part' in {file}"
                )
    for path, content in contents.items():
        write_atomic(path, content)
    return list(contents)


def current_commit(root: Path = ROOT) -> str:
    """The environment variable COMMIT, else the commit of this checkout, with ``-dirty`` if files differ from it.

    A copied working tree has no history, or that of another checkout; without either the commit is "unknown".
    """
    if named := os.environ.get("COMMIT"):
        return named
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, status = (
            subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if status else "")


def now() -> str:
    """Date and time for ``created``, to the second, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("File measurements made elsewhere.", prog="python -m common.results")
    commands = parser.add_subparsers(dest="action", required=True)
    adding = commands.add_parser("add", help="check record files and put them under <paper>/results/")
    adding.add_argument("files", metavar="FILE", nargs="+", type=Path, help="record file (JSON)")
    adding.add_argument("--force", action="store_true", help="replace a filed record of the same name")
    listing = commands.add_parser("list", help="what is filed")
    listing.add_argument("papers", metavar="PAPER", nargs="*", help="papers to list (default: all)")
    args = parser.parse_args(argv)
    if unknown := sorted(set(getattr(args, "papers", ())) - set(papers())):
        parser.error(f"there is no paper {unknown[0]!r}; the papers are {', '.join(papers())}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 2 if a file was refused."""
    args = parse_args(argv)
    try:
        if args.action == "add":
            for file in args.files:
                filed = add(file, force=args.force)
                for path in filed:
                    print(f"{file} -> {path.relative_to(ROOT)}")
                if not filed:
                    print(f"{file}: tests only, nothing to file")
        else:
            for paper in args.papers or papers():
                for record in load_records(paper):
                    ratio = "" if record.ratio is None else f", {record.ratio:.3f} x {record.reference_row}"
                    print(
                        f"{paper} {record.table}/{record.row} {record.column} {record.value:.5g}{ratio} "
                        f"({record.dtype}, batch {record.batch_size}; {record.origin.text})"
                    )
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

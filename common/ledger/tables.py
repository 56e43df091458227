"""Published tables as data: what ``<paper>/tables/*.toml`` may say, read strictly.

A table file holds every row of one published table: settings, the exact command, the checkpoint and the published
values with their digits (numbers are read as ``Decimal``, so 88.0 stays 88.0). Anything unexpected is an error that
names file, row and key. How to write one is shown by ``hourglass_swag/tables/hourglass.toml``.
"""

import re
import string
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from common.ledger.reading import Reader, not_empty
from common.plots import Figure
from common.run.errors import DataError
from common.run.files import ROOT

Kind = Literal["cost", "speed", "accuracy"]


class TableError(DataError):
    """A table file that says something impossible; the message names file, row and key."""


class Unavailable(Exception):
    """A number that this machine or checkout cannot produce now; subclasses say what is missing.

    Args:
        command: produces the number; empty: the command of the row.
        reason: in words; empty: what the status means.
    """

    status = ""

    def __init_subclass__(cls, status: str) -> None:
        cls.status = status

    def __init__(self, command: str = "", reason: str = "") -> None:
        super().__init__(reason or command)
        self.command = command
        self.reason = reason


class NotImplementedYet(Unavailable, status="not implemented yet"):
    """The model of a row is not built yet; the argument names it."""

    def __init__(self, model: str = "") -> None:
        super().__init__("", f"{model} is not implemented yet" if model else "not implemented yet")


class NeedsWeights(Unavailable, status="needs weights"):
    """Needs a checkpoint."""


class NeedsData(Unavailable, status="needs data"):
    """Needs a data set."""


class NeedsGpu(Unavailable, status="needs gpu"):
    """Needs an accelerator."""


class NeedsCompute(Unavailable, status="needs compute"):
    """Needs a training run that is out of reach here."""


class Cited(Unavailable, status="cited"):
    """A baseline that the paper only quotes."""


NEEDS = {"data": NeedsData, "weights": NeedsWeights, "compute": NeedsCompute, "gpu": NeedsGpu}
"""What a value may need, as a table file names it."""


@dataclass(frozen=True)
class Column:
    """Meaning of a key under ``published``."""

    name: str
    kind: Kind
    label: str
    unit: str = ""


COLUMNS: Mapping[str, Column] = {
    column.name: column
    for column in (
        Column("gmacs", "cost", "GMACs", "G"),
        Column("stage_gmacs", "cost", "GMACs of the stage alone", "G"),
        Column("params_m", "cost", "parameters", "M"),
        Column("remaining_percent", "cost", "remaining FLOPs", "%"),
        Column("double_mmacs", "cost", "2 x MMACs", "M"),
        Column("fps", "speed", "FPS, batch 1", "images/s"),
        Column("throughput_ips", "speed", "throughput", "images/s"),
        Column("top1_percent", "accuracy", "top-1", "%"),
        Column("top5_percent", "accuracy", "top-5", "%"),
        Column("top1_gain_points", "accuracy", "top-1 gain", "points"),
        Column("top1_drop_points", "accuracy", "top-1 loss", "points"),
    )
}
"""Columns by name; besides these, ``<data set>_percent`` is an accuracy on another data set."""


def column(name: str) -> Column:
    """Meaning of a column.

    Raises:
        KeyError: if there is no such column.
    """
    if name in COLUMNS:
        return COLUMNS[name]
    if re.fullmatch(r"[a-z][a-z0-9]*_percent", name):
        return Column(name, "accuracy", name.removesuffix("_percent"), "%")
    raise KeyError(name)


@dataclass(frozen=True)
class Measured:
    """One number that was computed or measured here."""

    value: float
    convention: str
    """counting convention, or device and precision"""
    source: str
    """where the number comes from"""
    ratio: float | None = None
    """speed only: paired ratio to the dense row, if it was measured round by round; else the ratio of the values"""
    origin: str = ""
    """of a number from ``results/``: device, versions, commit and date"""


@dataclass(frozen=True)
class OwnTable:
    """Something measured here, on small real images, with nothing published digit by digit to compare to."""

    paper: str
    kind: Literal["claims", "live"]
    title: str
    columns: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[str]]]
    """what rows have in common, such as a claim, or nothing -> rows as text"""
    notes: Sequence[str] = ()
    figure: Figure | None = None

    @property
    def key(self) -> str:
        """Of its section in a page."""
        return f"{self.paper}-{self.kind}"


def _is_column(name: str) -> str:
    try:
        column(name)
    except KeyError:
        return f"is not a column; the columns are {sorted(COLUMNS)} and <data set>_percent"
    return ""


ColumnName = Annotated[str, _is_column]
Text = Annotated[str, not_empty]
Hash = Annotated[
    str, lambda v: "" if re.fullmatch("|[0-9a-f]{8,64}", v) else f"expected 8 to 64 hexadecimal digits, got {v!r}"
]
Tolerance = Annotated[Decimal, lambda v: f"must not be negative, got {v}" if v < 0 else ""]
Need = Annotated[str, lambda v: "" if v in NEEDS else f"must be one of {list(NEEDS)}, got {v!r}"]


@dataclass(frozen=True)
class Checkpoint:
    """Where published weights come from."""

    name: str
    url: str = ""
    sha256: Hash = ""
    """the hash, or the leading digits that the file name carries"""
    licence: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PerColumn:
    """What a table states for all of its rows, and a row for itself."""

    convention: Mapping[ColumnName, str] = field(default_factory=dict)
    tolerance: Mapping[ColumnName, Tolerance] = field(default_factory=dict)
    commands: Mapping[ColumnName, str] = field(default_factory=dict)
    needs: Mapping[ColumnName, Need] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row(PerColumn):
    """One row of a published table."""

    paper: str
    table: str
    id: str
    """unique in the paper"""
    method: Text
    setting: str = ""
    series: str = ""
    """what the row belongs to when drawn: a backbone, a training run"""
    label: str = ""
    """text at its point in a figure"""
    arguments: str = ""
    """command-line words of this row, the same for every command of the table"""
    variables: Mapping[str, str] = field(default_factory=dict)
    """further words for the command templates"""
    checkpoint: Checkpoint | None = None
    dense: str = ""
    """``table/row`` that the speed of this row is a ratio to; empty: the row is not compared"""
    cited: bool = False
    """a baseline that the paper only quotes"""
    published: Annotated[Mapping[ColumnName, Decimal], not_empty]
    approximate: frozenset[str] = frozenset()
    """columns that were read off a figure"""
    reasons: Mapping[ColumnName, str] = field(default_factory=dict)
    """why a value differs here, where known"""
    note: str = ""

    @property
    def key(self) -> str:
        """``table/row``."""
        return f"{self.table}/{self.id}"

    def command(self, name: str) -> str:
        """The command that prints the number of a column."""
        if template := self.commands.get(name):
            return " ".join(template.format_map(self.words).split())
        data = " --data DIR" if column(name).kind == "accuracy" else ""
        return f"python -m common.reproduce {self.paper} --table {self.table} --row {self.id} --columns {name}{data}"

    @property
    def words(self) -> dict[str, str]:
        """What the command templates may name."""
        words = {"arguments": self.arguments, "id": self.id}
        words["checkpoint"] = (self.checkpoint.url or self.checkpoint.name) if self.checkpoint else ""
        return words | dict(self.variables)


@dataclass(frozen=True, kw_only=True)
class Table(PerColumn):
    """One published table."""

    paper: Text
    table: Text
    title: Text
    source: Text
    dataset: str = ""
    note: str = ""
    plot: Mapping[str, str] = field(default_factory=dict)
    """``x`` and ``y``: columns to draw; ``overview``: name of a figure shared with other tables of the paper;
    ``panels = "series"``: that figure has a panel per series and a line per method"""
    order: int = 100
    """place among the tables of the paper"""
    checkpoints: Mapping[str, Checkpoint]
    rows: tuple[Row, ...]
    path: Path

    @property
    def name(self) -> str:
        """Of the table in its paper."""
        return self.table

    @property
    def columns(self) -> tuple[str, ...]:
        """Every published column: costs, then speeds, then accuracies, each in order of appearance."""
        order = {"cost": 0, "speed": 1, "accuracy": 2}
        seen = list(dict.fromkeys(name for row in self.rows for name in row.published))
        return tuple(sorted(seen, key=lambda name: (order[column(name).kind], seen.index(name))))

    def row(self, row_id: str) -> Row:
        """The row of that name.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if row.id == row_id:
                return row
        raise KeyError(row_id)


READER = Reader(TableError)


def papers(root: Path = ROOT) -> tuple[str, ...]:
    """Names of the packages that hold published tables."""
    return tuple(sorted({path.parent.parent.name for path in root.glob("*/tables/*.toml")}))


def load_tables(paper: str | None = None, *, root: Path = ROOT) -> tuple[Table, ...]:
    """Read the tables of one paper, or of all.

    Args:
        paper: name of the package; None for all, in alphabetical order. A paper's tables come in their ``order``.
        root: folder that holds the packages.

    Raises:
        TableError: if a file is not a valid table, or the paper has none.
    """
    names = papers(root)
    if paper is not None and paper not in names:
        raise TableError(f"there is no paper {paper!r} with tables; the papers are {list(names)}")
    result: list[Table] = []
    for name in names if paper is None else (paper,):
        tables = [
            load_table(path) for path in sorted((root / name / "tables").glob("*.toml")) if path.name != "claims.toml"
        ]
        result += _link(name, sorted(tables, key=lambda table: table.order))
    return tuple(result)


def load_table(path: Path) -> Table:
    """Read one table file; ``dense`` rows are only resolved by ``load_tables``, because they may be in another file.

    Raises:
        TableError: naming file, row and key.
    """
    where = "/".join(path.parts[-3:])
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (RecursionError, ValueError) as error:
        raise TableError(f"{where}: not valid TOML: {error}") from error
    rows, declared = data.pop("rows", []), data.pop("checkpoints", {})
    table = READER.section(Table, data, where, rows=(), checkpoints={}, path=path)
    if table.paper != path.parent.parent.name:
        raise TableError(f"{where}: paper: is {table.paper!r}, but the file lies in {path.parent.parent.name!r}")
    if table.table != path.stem:
        raise TableError(f"{where}: table: is {table.table!r}, but the file is called {path.name!r}")
    if not isinstance(rows, list) or not rows or not isinstance(declared, Mapping):
        raise TableError(f"{where}: expected [[rows]] sections, and [checkpoints.NAME] sections if any")
    checkpoints: dict[str, Checkpoint] = {}
    for name, entry in declared.items():
        here = f"{where}: checkpoint {name!r}"
        checkpoints[name] = READER.section(Checkpoint, entry, here, name=name)
        if not checkpoints[name].url and not checkpoints[name].note:
            raise TableError(
                f"{here}: url: is missing; if the address is not known, say in 'note' where the file comes from"
            )
    table = replace(table, checkpoints=checkpoints)
    table = replace(table, rows=tuple(_row(entry, f"{where}: ", index, table) for index, entry in enumerate(rows)))
    _check_table(table, where)
    return table


def _row(entry: dict[str, Any], where: str, index: int, table: Table) -> Row:
    row_id = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(row_id, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", row_id):
        raise TableError(
            f"{where}rows[{index}].id: must be lower-case letters, digits, '.', '_' and '-', got {row_id!r}"
        )
    where = f"{where}row {row_id!r}"
    checkpoint = entry.get("checkpoint", "")
    if not isinstance(checkpoint, str) or (checkpoint and checkpoint not in table.checkpoints):
        declared = sorted(table.checkpoints)
        raise TableError(f"{where}: checkpoint: {checkpoint!r} is not declared; declared are {declared}")
    own = {key: value for key, value in entry.items() if key != "checkpoint"}
    known = table.checkpoints.get(checkpoint)
    row = READER.section(Row, own, where, paper=table.paper, table=table.table, checkpoint=known)
    for key in ("approximate", "reasons", "tolerance"):
        if unpublished := sorted(set(getattr(row, key)) - set(row.published)):
            raise TableError(f"{where}: {key}: names columns without a published value: {unpublished}")
    label = row.label if "label" in entry else row.setting or row.method
    shared = {field.name: {**getattr(table, field.name), **getattr(row, field.name)} for field in fields(PerColumn)}
    row = replace(row, label=label, **shared)
    if not row.cited:
        _check_row(row, where)
    return row


def _check_row(row: Row, where: str) -> None:
    """What a row that can be reproduced must say about each of its columns."""
    for name in row.published:
        if not row.convention.get(name):
            raise TableError(f"{where}: convention.{name}: is missing here and in the table")
        if (column(name).kind != "cost" or name in row.approximate) and name not in row.tolerance:
            raise TableError(f"{where}: tolerance.{name}: is missing here and in the table")
        try:
            fields = {
                word for _, word, _, _ in string.Formatter().parse(row.commands.get(name, "")) if word is not None
            }
        except ValueError as error:
            raise TableError(f"{where}: commands.{name}: is not a valid template: {error}") from error
        if unknown := sorted(fields - set(row.words)):
            raise TableError(f"{where}: commands.{name}: uses {unknown}; known are {sorted(row.words)}")
        if "checkpoint" in fields and row.checkpoint is None:
            raise TableError(f"{where}: checkpoint: is missing, and commands.{name} uses it")


def _check_table(table: Table, where: str) -> None:
    counts = Counter(row.id for row in table.rows)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise TableError(f"{where}: rows: ids {twice} appear more than once")
    if unknown := sorted(set(table.plot) - {"overview", "panels", "x", "y"}):
        raise TableError(f"{where}: plot: unknown keys {unknown}; the keys are overview, panels, x and y")
    if table.plot.get("panels", "series") != "series":
        raise TableError(f"{where}: plot.panels: can only be 'series', got {table.plot['panels']!r}")
    for axis in ("x", "y") if table.plot else ():
        if table.plot.get(axis) not in table.columns:
            raise TableError(f"{where}: plot.{axis}: must be one of the published columns {list(table.columns)}")
    if unused := sorted(set(table.checkpoints) - {row.checkpoint.name for row in table.rows if row.checkpoint}):
        raise TableError(f"{where}: checkpoints: no row uses {unused}")


def _link(paper: str, tables: Sequence[Table]) -> list[Table]:
    """Resolve each row's ``dense`` to ``table/row`` and check what only all tables of a paper together show."""
    rows: dict[str, Row] = {}
    where: dict[str, str] = {}
    for row in (row for table in tables for row in table.rows):
        if row.id in where:
            raise TableError(
                f"{paper}/tables/{row.table}.toml: row {row.id!r}: the id is already used in table "
                f"{where[row.id]!r}; ids are unique in a paper"
            )
        where[row.id], rows[row.key] = row.table, row

    def resolved(row: Row) -> Row:
        if not row.dense:
            return row
        key = row.dense if "/" in row.dense else f"{row.table}/{row.dense}"
        problem = f"{paper}/tables/{row.table}.toml: row {row.id!r}: dense: "
        if key not in rows:
            raise TableError(f"{problem}there is no row {key!r}; write the id of a row, or table/row")
        speeds = [name for name in row.published if column(name).kind == "speed"]
        if missing := [name for name in speeds if name not in rows[key].published]:
            raise TableError(f"{problem}row {key!r} publishes no {missing}, so there is no ratio to it")
        return replace(row, dense=key)

    return [replace(table, rows=tuple(resolved(row) for row in table.rows)) for table in tables]

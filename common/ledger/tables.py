"""Published tables as data: what ``<paper>/tables/*.toml`` may say, read strictly.

A table file holds every row of one published table: settings, the exact command, the checkpoint and the published
values with their digits (numbers are read as ``Decimal``, so 88.0 stays 88.0). Anything unexpected is an error that
names file, row and key. How to write one is shown by ``hourglass_swag/tables/hourglass.toml``.
"""

import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from common.run.files import ROOT

Kind = Literal["cost", "speed", "accuracy"]
NEEDS = ("data", "weights", "compute")


class TableError(ValueError):
    """A table file that says something impossible; the message names file, row and key."""


class Unavailable(Exception):
    """A number that this machine or checkout cannot produce now; subclasses say what is missing."""

    status = ""

    def __init__(self, command: str = "", reason: str = "") -> None:
        super().__init__(reason or command)
        self.command = command
        """the command that produces the number; empty: the command of the row"""
        self.reason = reason


class NotImplementedYet(Unavailable):
    """The model of a row is not built yet; the argument names it."""

    status = "not implemented yet"

    def __init__(self, model: str = "") -> None:
        super().__init__("", f"{model} is not implemented yet" if model else "not implemented yet")
        self.model = model


class NeedsWeights(Unavailable):
    """Needs a checkpoint."""

    status = "needs weights"


class NeedsData(Unavailable):
    """Needs a data set."""

    status = "needs data"


class NeedsGpu(Unavailable):
    """Needs an accelerator."""

    status = "needs gpu"


class NeedsCompute(Unavailable):
    """Needs a training run that is out of reach here."""

    status = "needs compute"


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


@dataclass(frozen=True)
class DeskTable:
    """The paper's table at desk size: measured here, on small real pictures, with nothing published to compare to."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    """one mapping per row, by column: text, number or None"""
    notes: Sequence[str] = ()
    key: str = "desk"
    """name of the table in the report"""
    plot: Mapping[str, str] = field(default_factory=dict)
    """``x`` and ``y``: columns to draw; ``label``: column with the text of a point; ``series``: column that groups"""

    def __post_init__(self) -> None:
        if isinstance(self.notes, str):
            object.__setattr__(self, "notes", (self.notes,) if self.notes else ())
        for index, row in enumerate(self.rows):
            if unknown := sorted(set(row) - set(self.columns)):
                raise TableError(f"desk table {self.title!r}, row {index}: columns {unknown} are not declared")
        if unknown := sorted(set(self.plot.values()) - set(self.columns)):
            raise TableError(f"desk table {self.title!r}: plot names unknown columns {unknown}")


@dataclass(frozen=True)
class Checkpoint:
    """Where published weights come from."""

    name: str
    url: str = ""
    sha256: str = ""
    """the hash, or the leading digits that the file name carries"""
    licence: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a published table."""

    paper: str
    table: str
    id: str
    """unique in the paper"""
    method: str
    setting: str
    series: str
    """what the row belongs to when drawn: a backbone, a training run"""
    label: str
    """text at its point in a figure"""
    arguments: str
    """command-line words of this row, the same for every command of the table"""
    variables: Mapping[str, str]
    """further words for the command templates"""
    checkpoint: Checkpoint | None
    dense: str
    """``table/row`` that the speed of this row is a ratio to; empty: the row is not compared"""
    cited: bool
    """a baseline that the paper only quotes"""
    published: Mapping[str, Decimal]
    approximate: frozenset[str]
    """columns that were read off a figure"""
    reasons: Mapping[str, str]
    """why a value differs here, where known"""
    convention: Mapping[str, str]
    tolerance: Mapping[str, Decimal]
    commands: Mapping[str, str]
    needs: Mapping[str, str]
    note: str

    @property
    def key(self) -> str:
        """``table/row``."""
        return f"{self.table}/{self.id}"

    def command(self, name: str) -> str:
        """The command that prints the number of a column."""
        if template := self.commands.get(name):
            return " ".join(template.format_map(self._words()).split())
        data = " --data DIR" if column(name).kind == "accuracy" else ""
        return f"python -m common.reproduce {self.paper} --table {self.table} --row {self.id} --columns {name}{data}"

    def _words(self) -> dict[str, str]:
        words = {"arguments": self.arguments, "id": self.id}
        words["checkpoint"] = (self.checkpoint.url or self.checkpoint.name) if self.checkpoint else ""
        return words | dict(self.variables)


@dataclass(frozen=True)
class Table:
    """One published table."""

    paper: str
    name: str
    title: str
    source: str
    dataset: str
    note: str
    plot: Mapping[str, str]
    """``x`` and ``y``: columns to draw; ``overview``: name of a figure shared with other tables of the paper;
    ``panels = "series"``: that figure has a panel per series and a line per method"""
    order: int
    """place among the tables of the paper"""
    checkpoints: Mapping[str, Checkpoint]
    rows: tuple[Row, ...]
    path: Path

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


_TABLE_KEYS = frozenset(
    ("paper", "table", "title", "source", "dataset", "note", "plot", "convention", "tolerance", "commands", "needs")
) | {"checkpoints", "rows", "order"}
_ROW_KEYS = frozenset(
    ("id", "method", "setting", "series", "arguments", "variables", "checkpoint", "dense", "cited", "published")
) | {"label", "approximate", "reasons", "convention", "tolerance", "commands", "needs", "note"}


class _Reader:
    """Typed access to one mapping of a table file; every complaint starts with where it is."""

    def __init__(self, data: Mapping[str, Any], where: str, allowed: frozenset[str]) -> None:
        self.data = data
        self.where = where
        if unknown := sorted(set(data) - allowed):
            raise TableError(f"{where}: unknown keys {unknown}; the keys are {sorted(allowed)}")

    def fail(self, key: str, problem: str) -> TableError:
        return TableError(f"{self.where}: {key}: {problem}")

    def text(self, key: str, *, required: bool = False) -> str:
        value = self.data.get(key, "")
        if not isinstance(value, str):
            raise self.fail(key, f"expected text, got {value!r}")
        if required and not value:
            raise self.fail(key, "is missing")
        return value

    def whole(self, key: str, default: int) -> int:
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"expected a whole number, got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise self.fail(key, f"expected true or false, got {value!r}")
        return value

    def texts(self, key: str) -> dict[str, str]:
        value = self._mapping(key)
        for name, word in value.items():
            if not isinstance(word, str):
                raise self.fail(f"{key}.{name}", f"expected text, got {word!r}")
        return dict(value)

    def numbers(self, key: str) -> dict[str, Decimal]:
        result: dict[str, Decimal] = {}
        for name, value in self._mapping(key).items():
            if isinstance(value, bool) or not isinstance(value, int | Decimal):
                raise self.fail(f"{key}.{name}", f"expected a number with its published digits, got {value!r}")
            result[name] = Decimal(value)
            if not result[name].is_finite():
                raise self.fail(f"{key}.{name}", f"expected a finite number, got {value!r}")
        return result

    def names(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.fail(key, f"expected a list of column names, got {value!r}")
        return tuple(value)

    def per_column(self, values: Mapping[str, Any], key: str) -> None:
        """Every name in ``values`` must be a column."""
        for name in values:
            try:
                column(name)
            except KeyError:
                raise self.fail(
                    f"{key}.{name}", f"is not a column; the columns are {sorted(COLUMNS)} and <data set>_percent"
                ) from None

    def needs(self) -> dict[str, str]:
        needs = self.texts("needs")
        self.per_column(needs, "needs")
        for name, what in needs.items():
            if what not in NEEDS:
                raise self.fail(f"needs.{name}", f"must be one of {list(NEEDS)}, got {what!r}")
        return needs

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self.data.get(key, {})
        if not isinstance(value, Mapping):
            raise self.fail(key, f"expected a table of values, got {value!r}")
        return value


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
        tables = [load_table(path) for path in sorted((root / name / "tables").glob("*.toml"))]
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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"{where}: not valid TOML: {error}") from error
    top = _Reader(data, where, _TABLE_KEYS)
    paper, name = top.text("paper", required=True), top.text("table", required=True)
    if paper != path.parent.parent.name:
        raise top.fail("paper", f"is {paper!r}, but the file lies in {path.parent.parent.name!r}")
    if name != path.stem:
        raise top.fail("table", f"is {name!r}, but the file is called {path.name!r}")
    defaults = {key: top.texts(key) for key in ("convention", "commands")} | {"needs": top.needs()}
    tolerance = top.numbers("tolerance")
    for key, values in {**defaults, "tolerance": tolerance}.items():
        top.per_column(values, key)
    checkpoints = _checkpoints(top)
    entries = data.get("rows", [])
    if not isinstance(entries, list) or not entries:
        raise top.fail("rows", "a table needs at least one [[rows]]")
    rows = tuple(_row(entry, index, top, defaults, tolerance, checkpoints) for index, entry in enumerate(entries))
    table = Table(
        paper=paper,
        name=name,
        title=top.text("title", required=True),
        source=top.text("source", required=True),
        dataset=top.text("dataset"),
        note=top.text("note"),
        plot=top.texts("plot"),
        order=top.whole("order", 100),
        checkpoints=checkpoints,
        rows=rows,
        path=path,
    )
    _check_table(table, top)
    return table


def _checkpoints(top: _Reader) -> dict[str, Checkpoint]:
    result: dict[str, Checkpoint] = {}
    section = top.data.get("checkpoints", {})
    if not isinstance(section, Mapping):
        raise top.fail("checkpoints", f"expected [checkpoints.NAME] sections, got {section!r}")
    for name, entry in section.items():
        where = f"{top.where}: checkpoint {name!r}"
        if not isinstance(entry, Mapping):
            raise TableError(f"{where}: expected a section, got {entry!r}")
        reader = _Reader(entry, where, frozenset(("url", "sha256", "licence", "note")))
        checkpoint = Checkpoint(name, *(reader.text(key) for key in ("url", "sha256", "licence", "note")))
        if checkpoint.sha256 and not re.fullmatch(r"[0-9a-f]{8,64}", checkpoint.sha256):
            raise reader.fail("sha256", f"expected 8 to 64 hexadecimal digits, got {checkpoint.sha256!r}")
        if not checkpoint.url and not checkpoint.note:
            raise reader.fail("url", "is missing; if the address is not known, say in 'note' where the file comes from")
        result[name] = checkpoint
    return result


def _row(
    entry: Any,
    index: int,
    top: _Reader,
    defaults: Mapping[str, Mapping[str, str]],
    tolerance: Mapping[str, Decimal],
    checkpoints: Mapping[str, Checkpoint],
) -> Row:
    if not isinstance(entry, Mapping):
        raise top.fail(f"rows[{index}]", f"expected a [[rows]] section, got {entry!r}")
    row_id = entry.get("id")
    if not isinstance(row_id, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", row_id):
        raise top.fail(f"rows[{index}].id", f"must be lower-case letters, digits, '.', '_' and '-', got {row_id!r}")
    reader = _Reader(entry, f"{top.where}: row {row_id!r}", _ROW_KEYS)
    published = reader.numbers("published")
    if not published:
        raise reader.fail("published", "is missing; a row states at least one published value")
    own = {key: reader.texts(key) for key in ("convention", "commands")} | {"needs": reader.needs()}
    own_tolerance = reader.numbers("tolerance")
    approximate = reader.names("approximate")
    reasons = reader.texts("reasons")
    for key, values in {**own, "published": published, "tolerance": own_tolerance}.items():
        reader.per_column(values, key)
    for key, names in {"approximate": approximate, "reasons": reasons, "tolerance": own_tolerance}.items():
        if unpublished := sorted(set(names) - set(published)):
            raise reader.fail(key, f"names columns without a published value: {unpublished}")
    checkpoint = reader.text("checkpoint")
    if checkpoint and checkpoint not in checkpoints:
        raise reader.fail("checkpoint", f"{checkpoint!r} is not declared; declared are {sorted(checkpoints)}")
    row = Row(
        paper=top.text("paper"),
        table=top.text("table"),
        id=row_id,
        method=reader.text("method", required=True),
        setting=reader.text("setting"),
        series=reader.text("series"),
        label=reader.text("label") if "label" in entry else reader.text("setting") or reader.text("method"),
        arguments=reader.text("arguments"),
        variables=reader.texts("variables"),
        checkpoint=checkpoints[checkpoint] if checkpoint else None,
        dense=reader.text("dense"),
        cited=reader.flag("cited"),
        published=published,
        approximate=frozenset(approximate),
        reasons=reasons,
        convention={**defaults["convention"], **own["convention"]},
        tolerance={**tolerance, **own_tolerance},
        commands={**defaults["commands"], **own["commands"]},
        needs={**defaults["needs"], **own["needs"]},
        note=reader.text("note"),
    )
    _check_row(row, reader)
    return row


def _check_row(row: Row, reader: _Reader) -> None:
    """What a row that can be reproduced must say about each of its columns."""
    for name, value in row.tolerance.items():
        if value < 0:
            raise reader.fail(f"tolerance.{name}", f"must not be negative, got {value}")
    for name in () if row.cited else row.published:
        kind = column(name).kind
        if not row.convention.get(name):
            raise reader.fail(f"convention.{name}", "is missing here and in the table")
        if (kind != "cost" or name in row.approximate) and name not in row.tolerance:
            raise reader.fail(f"tolerance.{name}", "is missing here and in the table")
        template = row.commands.get(name, "")
        try:
            fields = {word for _, word, _, _ in string.Formatter().parse(template) if word is not None}
        except ValueError as error:
            raise reader.fail(f"commands.{name}", f"is not a valid template: {error}") from error
        if unknown := sorted(fields - set(row._words())):
            raise reader.fail(f"commands.{name}", f"uses {unknown}; known are {sorted(row._words())}")
        if "checkpoint" in fields and row.checkpoint is None:
            raise reader.fail("checkpoint", f"is missing, and commands.{name} uses it")


def _check_table(table: Table, top: _Reader) -> None:
    ids = [row.id for row in table.rows]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise top.fail("rows", f"ids {twice} appear more than once")
    if unknown := sorted(set(table.plot) - {"x", "y", "overview", "panels"}):
        raise top.fail("plot", f"unknown keys {unknown}; the keys are ['overview', 'panels', 'x', 'y']")
    if table.plot.get("panels", "series") != "series":
        raise top.fail("plot.panels", f"can only be 'series', got {table.plot['panels']!r}")
    for axis in ("x", "y"):
        if table.plot and table.plot.get(axis) not in table.columns:
            raise top.fail(f"plot.{axis}", f"must be one of the published columns {list(table.columns)}")
    if unused := sorted(set(table.checkpoints) - {row.checkpoint.name for row in table.rows if row.checkpoint}):
        raise top.fail("checkpoints", f"no row uses {unused}")


def _link(paper: str, tables: Sequence[Table]) -> list[Table]:
    """Resolve each row's ``dense`` to ``table/row`` and check what only all tables of a paper together show."""
    where: dict[str, str] = {}
    for table in tables:
        for row in table.rows:
            if row.id in where:
                raise TableError(
                    f"{paper}/tables/{table.name}.toml: row {row.id!r}: the id is already used in table "
                    f"{where[row.id]!r}; ids are unique in a paper"
                )
            where[row.id] = table.name
    rows = {row.key: row for table in tables for row in table.rows}
    linked: list[Table] = []
    for table in tables:
        resolved: list[Row] = []
        for row in table.rows:
            if row.dense:
                key = row.dense if "/" in row.dense else f"{table.name}/{row.dense}"
                problem = f"{paper}/tables/{table.name}.toml: row {row.id!r}: dense: "
                if key not in rows:
                    raise TableError(f"{problem}there is no row {key!r}; write the id of a row, or table/row")
                speeds = [name for name in row.published if column(name).kind == "speed"]
                if missing := [name for name in speeds if name not in rows[key].published]:
                    raise TableError(f"{problem}row {key!r} publishes no {missing}, so there is no ratio to it")
                row = replace(row, dense=key)
            resolved.append(row)
        linked.append(replace(table, rows=tuple(resolved)))
    return linked

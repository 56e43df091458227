"""The ledger: every published value against the one that comes out here, and what the missing ones need.

A paper takes part by a module ``<paper>/ledger.py``, found by name at run time, so that ``common`` imports no paper:

    costs(row) -> {column: Measured}                           parameters, GMACs; "macs_g" for plain GMACs
    speeds(rows, *, columns, device, progress) -> {(row id, column): Measured}      rows[0] is the dense row
    accuracy(row, *, data, weights, device, progress) -> {column: Measured}
    desk(*, folder, device, force, progress) -> DeskTable      the paper's experiment on small real pictures

Each may raise a subclass of ``common.ledger.tables.Unavailable``. A paper without such a module is not implemented yet.
"""

import hashlib
import importlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from common.ledger.cache import cached, source_files
from common.ledger.results import Record, load_records
from common.ledger.tables import (
    DeskTable,
    Measured,
    NotImplementedYet,
    Row,
    Table,
    Unavailable,
    column,
)
from common.run.files import ROOT

STATUSES: Mapping[str, str] = {
    "reproduced": "equal when rounded to the published digits, or within the stated tolerance",
    "differs": "not equal; the reason is given where it is known",
    "recorded": "measured earlier or elsewhere, or a value with nothing published to compare it to",
    "needs data": "needs a data set: --data DIR",
    "needs weights": "needs a published checkpoint",
    "needs gpu": "needs a GPU, or a speed column named with --columns",
    "needs compute": "needs a training run",
    "not implemented yet": "the model is not built yet",
    "cited": "a baseline that the paper only quotes",
}
"""Every status, with its meaning."""

KEYS = (
    "paper",
    "table",
    "row",
    "column",
    "published",
    "reproduced",
    "difference",
    "tolerance",
    "status",
    "convention",
    "source",
    "command",
)
"""Keys of an entry in JSON and CSV, in order."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One published value of one row, and what became of it."""

    paper: str
    table: str
    row: str
    column: str
    published: Decimal | None
    """as published; for a speed the ratio to the dense row"""
    reproduced: float | None
    difference: float | None
    tolerance: float | None
    """largest difference that counts as reproduced, in the unit of the difference"""
    status: str
    convention: str
    source: str
    command: str
    is_ratio: bool = False
    """published and reproduced are ratios to the dense row"""

    def as_dict(self) -> dict[str, Any]:
        """The entry under ``KEYS``, ready for JSON."""
        values = {key: getattr(self, key) for key in KEYS}
        if isinstance(self.published, Decimal):
            whole = self.published == self.published.to_integral_value() and self.published.as_tuple().exponent == 0
            values["published"] = int(self.published) if whole else float(self.published)
        return values


@dataclass(frozen=True)
class Failure:
    """An exception in one row; the others are not affected."""

    paper: str
    table: str
    row: str
    problem: str

    def __str__(self) -> str:
        where = "/".join(word for word in (self.paper, self.table, self.row) if word)
        return f"{where}: {self.problem}"


@dataclass
class Ledger:
    """All entries of a run, in the order of the tables."""

    tables: tuple[Table, ...] = ()
    entries: list[Entry] = field(default_factory=list)
    plain_gmacs: dict[tuple[str, str], float] = field(default_factory=dict)
    """(paper, table/row) -> plain multiply-accumulates in G, beside the paper's own convention"""
    failures: list[Failure] = field(default_factory=list)
    desk: list[tuple[str, DeskTable]] = field(default_factory=list)
    """(paper, table) of the experiments at desk size"""

    def counts(self) -> Counter[str]:
        """Entries per status, in the order of ``STATUSES``."""
        found = Counter(entry.status for entry in self.entries)
        return Counter({status: found[status] for status in STATUSES if found[status]})

    def of(self, table: Table) -> dict[tuple[str, str], Entry]:
        """(row, column) -> entry of one table."""
        return {(e.row, e.column): e for e in self.entries if (e.paper, e.table) == (table.paper, table.name)}


@dataclass(frozen=True)
class Request:
    """What to reproduce, and with what."""

    columns: frozenset[str] | None = None
    """None: all"""
    data: Path | None = None
    weights: Path | None = None
    device: str = "cpu"
    measure_speed: bool = False
    force: bool = False
    quiet: bool = True
    """no progress bars"""
    root: Path = ROOT


def select(tables: Iterable[Table], *, table: str | None = None, row: str | None = None) -> tuple[Table, ...]:
    """Tables and rows of the given names.

    Raises:
        ValueError: if nothing has that name; the message lists what there is.
    """
    chosen = tuple(tables)
    if table is not None:
        known = sorted({entry.name for entry in chosen})
        chosen = tuple(entry for entry in chosen if entry.name == table)
        if not chosen:
            raise ValueError(f"there is no table {table!r}; the tables are {', '.join(known)}")
    if row is not None:
        known = [entry.id for part in chosen for entry in part.rows]
        chosen = tuple(
            replace(part, rows=tuple(entry for entry in part.rows if entry.id == row))
            for part in chosen
            if any(entry.id == row for entry in part.rows)
        )
        if not chosen:
            raise ValueError(f"there is no row {row!r}; the rows are {', '.join(known)}")
    return chosen


def build(tables: Sequence[Table], request: Request, *, all_tables: Sequence[Table] | None = None) -> Ledger:
    """Work out every entry of some tables.

    Args:
        tables: what to reproduce, perhaps narrowed by ``select``.
        request: what to do and what is at hand.
        all_tables: complete tables of the same papers, where dense rows are looked up; ``tables`` if None.
    """
    ledger = Ledger(tables=tuple(tables))
    for paper in dict.fromkeys(table.paper for table in tables):
        own = [table for table in tables if table.paper == paper]
        known = [table for table in all_tables or tables if table.paper == paper]
        _Paper(paper, own, known, request, ledger).run()
    return ledger


def run_desk(papers: Iterable[str], request: Request, ledger: Ledger) -> None:
    """Run the desk experiment of each paper that has one; results go to ``ledger.desk``."""
    for paper in papers:
        try:
            adapter = find_adapter(paper)
            if adapter is None or not hasattr(adapter, "desk"):
                continue
            ledger.desk.append((paper, _desk(paper, adapter, request)))
        except Unavailable as missing:
            ledger.failures.append(Failure(paper, "", "", f"desk experiment: {missing}"))
        except Exception as error:  # one paper's failure must not lose the others
            ledger.failures.append(Failure(paper, "", "", f"desk experiment: {type(error).__name__}: {error}"))


def _desk(paper: str, adapter: ModuleType, request: Request) -> DeskTable:
    folder = request.root / ".cache" / "leanvit" / "desk" / paper

    def compute() -> dict[str, Any]:
        table = adapter.desk(folder=folder, device=request.device, force=request.force, progress=not request.quiet)
        return {
            "title": table.title,
            "columns": list(table.columns),
            "rows": [dict(row) for row in table.rows],
            "notes": list(table.notes),
            "key": table.key,
            "plot": dict(table.plot),
        }

    value = cached(
        ["desk", paper, request.device],
        compute,
        files=source_files(paper, root=request.root),
        force=request.force,
        folder=request.root / ".cache" / "leanvit",
    )
    return DeskTable(**value)


def find_adapter(paper: str) -> ModuleType | None:
    """The paper's ``ledger`` module; None if it has none.

    Raises:
        ImportError: if there is one, and it cannot be imported.
    """
    name = f"{paper}.ledger"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in (name, paper):
            return None
        raise


@dataclass
class _Paper:
    """Entries of one paper; what is known about its rows so far."""

    paper: str
    tables: Sequence[Table]
    known: Sequence[Table]
    request: Request
    ledger: Ledger
    adapter: ModuleType | None = None
    outcomes: dict[str, Mapping[str, Measured] | Unavailable] = field(default_factory=dict)
    """table/row -> costs, or why there are none"""
    speeds: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """(table/row, column) -> measured now"""
    dense_speeds: dict[tuple[str, str], Measured] = field(default_factory=dict)
    """(table/row, column) -> the dense row's speed in the same run"""
    speed_problems: dict[str, Unavailable] = field(default_factory=dict)
    records: dict[tuple[str, str], Record] = field(default_factory=dict)

    def run(self) -> None:
        try:
            self.adapter = find_adapter(self.paper)
            records = load_records(self.paper, root=self.request.root)
        except Exception as error:  # one paper's failure must not lose the others
            self._failed("", "", error)
            return
        self.records = _best(records)
        rows = [row for table in self.tables for row in table.rows if not row.cited]
        failed = self._find_costs(rows)
        rows = [row for row in rows if row.key not in failed]
        if self.request.measure_speed:
            self._measure_speeds([row for row in rows if not isinstance(self.outcomes.get(row.key), Unavailable)])
        pictures = self._bar(rows, "accuracy") if self.request.data else None
        for table in self.tables:
            for row in table.rows:
                if row.key in failed:
                    continue
                try:
                    self.ledger.entries += self._entries(table, row)
                except Exception as error:  # the other rows must not be lost
                    self._failed(table.name, row.id, error)
                if pictures is not None and not row.cited:
                    pictures.update()
        if pictures is not None:
            pictures.close()

    # ------------------------------------------------------------------------------------------------------ costs

    def _find_costs(self, rows: Sequence[Row]) -> set[str]:
        """Costs of every row; returns the rows that failed."""
        failed: set[str] = set()
        files = source_files(self.paper, root=self.request.root)
        paths = {table.name: table.path for table in self.tables}
        for row in self._bar(rows, "costs"):
            try:
                self.outcomes[row.key] = self._costs(row, (*files, paths[row.table]))
            except Unavailable as missing:
                self.outcomes[row.key] = missing
            except Exception as error:  # the other rows must not be lost
                failed.add(row.key)
                self._failed(row.table, row.id, error)
        return failed

    def _costs(self, row: Row, files: Sequence[Path]) -> Mapping[str, Measured]:
        if self.adapter is None:
            raise NotImplementedYet(self.paper)
        compute = self.adapter.costs
        value = cached(
            ["costs", self.paper, row.table, row.id],
            lambda: _pack(compute(row)),
            files=files,
            force=self.request.force,
            folder=self.request.root / ".cache" / "leanvit",
        )
        found = _unpack(value)
        if "macs_g" in found:
            self.ledger.plain_gmacs[self.paper, row.key] = found["macs_g"].value
        return found

    # ----------------------------------------------------------------------------------------------------- speeds

    def _measure_speeds(self, rows: Sequence[Row]) -> None:
        """Measure the rows of each table together with their dense row, which goes first."""
        adapter = self.adapter
        if adapter is None or not hasattr(adapter, "speeds"):
            return
        everything = {row.key: row for table in self.known for row in table.rows}
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if self._columns(row, "speed"):
                groups.setdefault((row.table, row.dense or row.key), []).append(row)
        for (_, dense), members in self._bar(list(groups.items()), "speeds"):
            together = [everything[dense], *(row for row in members if row.key != dense)]
            names = sorted({name for row in members for name in self._columns(row, "speed")})
            try:
                found = self._speeds(adapter, together, names)
            except Unavailable as missing:
                self.speed_problems |= {row.key: missing for row in members}
                continue
            except Exception as error:  # the other groups must not be lost
                for row in members:
                    self._failed(row.table, row.id, error)
                continue
            for row in together:
                for name in names:
                    if (row.id, name) in found and (everything[dense].id, name) in found:
                        self.speeds[row.key, name] = found[row.id, name]
                        self.dense_speeds[row.key, name] = found[everything[dense].id, name]

    def _speeds(self, adapter: ModuleType, rows: Sequence[Row], names: Sequence[str]) -> dict[Any, Measured]:
        request = self.request

        def compute() -> list[Any]:
            found = adapter.speeds(rows, columns=names, device=request.device, progress=not request.quiet)
            return [[row_id, name, *_fields(measured)] for (row_id, name), measured in found.items()]

        value = cached(
            ["speeds", self.paper, rows[0].key, [row.key for row in rows], list(names), _device_name(request.device)],
            compute,
            files=source_files(self.paper, root=request.root),
            force=request.force,
            folder=request.root / ".cache" / "leanvit",
        )
        return {(row_id, name): Measured(*fields) for row_id, name, *fields in value}

    # ---------------------------------------------------------------------------------------------------- entries

    def _columns(self, row: Row, kind: str | None = None) -> list[str]:
        wanted = self.request.columns
        return [
            name
            for name in row.published
            if (wanted is None or name in wanted) and (kind is None or column(name).kind == kind)
        ]

    def _entries(self, table: Table, row: Row) -> list[Entry]:
        if row.cited:
            return [
                self._entry(row, name, status="cited", source=f"quoted in: {table.source}")
                for name in self._columns(row)
            ]
        accuracy = self._accuracy(row) if self._columns(row, "accuracy") else {}
        makers = {"cost": self._cost, "speed": self._speed}
        return [
            makers[kind](row, name) if (kind := column(name).kind) in makers else self._accurate(row, name, accuracy)
            for name in self._columns(row)
        ]

    def _cost(self, row: Row, name: str) -> Entry:
        outcome = self.outcomes[row.key]
        if isinstance(outcome, Unavailable):
            return self._missing(row, name, outcome)
        if name in outcome:
            plain = self.ledger.plain_gmacs.get((self.paper, row.key))
            note = f"; plain MACs {plain:.6g} G" if plain is not None and name == "gmacs" else ""
            return self._compare(row, name, outcome[name], note)
        if need := row.needs.get(name):
            return self._recorded_or(row, name, f"needs {need}", f"the cost of this row depends on its {need}")
        raise LookupError(f"{self.paper}.ledger.costs returned no {name!r}, and the table does not say what it needs")

    def _accuracy(self, row: Row) -> Mapping[str, Measured] | Unavailable:
        """Evaluate a row if there is something to evaluate on; else say nothing."""
        outcome = self.outcomes[row.key]
        if isinstance(outcome, NotImplementedYet):
            return outcome
        adapter, request = self.adapter, self.request
        if request.data is None or adapter is None or not hasattr(adapter, "accuracy"):
            return {}

        def compute() -> dict[str, Any]:
            return _pack(
                adapter.accuracy(
                    row,
                    data=request.data,
                    weights=request.weights,
                    device=request.device,
                    progress=not request.quiet,
                )
            )

        try:
            value = cached(
                ["accuracy", self.paper, row.table, row.id, _device_name(request.device)]
                + [_listing(folder) for folder in (request.data, request.weights)],
                compute,
                files=source_files(self.paper, root=request.root),
                force=request.force,
                folder=request.root / ".cache" / "leanvit",
            )
        except Unavailable as missing:
            return missing
        return _unpack(value)

    def _accurate(self, row: Row, name: str, found: Mapping[str, Measured] | Unavailable) -> Entry:
        if isinstance(found, Unavailable):
            return self._missing(row, name, found)
        if name in found:
            return self._compare(row, name, found[name])
        need = row.needs.get(name, "data")
        return self._recorded_or(row, name, f"needs {need}", f"{STATUSES[f'needs {need}']}")

    def _speed(self, row: Row, name: str) -> Entry:
        outcome = self.outcomes[row.key]
        if isinstance(outcome, NotImplementedYet):
            return self._missing(row, name, outcome)
        measured = self.speeds.get((row.key, name))
        if measured is None:
            if row.key in self.speed_problems:
                return self._missing(row, name, self.speed_problems[row.key])
            need = row.needs.get(name, "gpu")
            return self._recorded_or(row, name, f"needs {need}", STATUSES[f"needs {need}"])
        if not row.dense:
            return self._absolute(row, name, measured.value, measured.convention, measured.source)
        ratio = measured.ratio or measured.value / self.dense_speeds[row.key, name].value
        return self._ratio(row, name, ratio, measured.value, measured.convention, measured.source)

    def _missing(self, row: Row, name: str, why: Unavailable) -> Entry:
        return self._recorded_or(row, name, why.status, why.reason or STATUSES[why.status], why.command)

    def _recorded_or(self, row: Row, name: str, status: str, reason: str, command: str = "") -> Entry:
        """The value recorded in ``results/``, or what is missing."""
        record = self.records.get((row.key, name))
        if record is None:
            return self._entry(row, name, status=status, source=reason, command=command)
        assert record.origin is not None
        convention = f"{record.dtype}, batch {record.batch_size}{', compiled' if record.compiled else ''}"
        source = f"recorded: {record.origin.text}"
        if column(name).kind != "speed":
            entry = self._compare(row, name, Measured(record.value, row.convention[name], source))
            return replace(entry, status="recorded")
        if not row.dense:
            return self._absolute(row, name, record.value, convention, source)
        reference = record.reference_row or ""
        same = (reference if "/" in reference else f"{row.table}/{reference}") == row.dense
        ratio = record.ratio
        if ratio is None and record.reference_value is not None:
            ratio = record.value / record.reference_value
        if not same or ratio is None:
            raise ValueError(f"{name}: the record in results/ is not a ratio to {row.dense!r}: {record.origin.path}")
        entry = self._ratio(row, name, ratio, record.value, convention, source)
        return replace(entry, status="recorded")

    def _absolute(self, row: Row, name: str, value: float, convention: str, source: str) -> Entry:
        """The dense row itself: its ratio is 1 by definition, so the value stands there without a comparison."""
        entry = self._entry(row, name, status="recorded", source=source)
        note = "; the baseline of the ratios, published on another device, so not compared"
        return replace(entry, reproduced=_round(value), convention=convention, source=source + note)

    def _ratio(self, row: Row, name: str, ratio: float, value: float, convention: str, source: str) -> Entry:
        """Published ratio to the dense row against the measured one."""
        entry = self._entry(row, name, status="")
        assert entry.published is not None
        published = float(entry.published)
        tolerance = float(row.tolerance[name]) * published
        difference = ratio - published
        status = "reproduced" if abs(difference) <= tolerance else "differs"
        source += f"; {value:.5g} {column(name).unit} measured"
        return replace(
            entry,
            reproduced=_round(ratio),
            difference=_round(difference),
            tolerance=_round(tolerance),
            status=status,
            convention=convention,
            source=f"{entry.source}; {source}{self._reason(row, name, status)}",
        )

    def _compare(self, row: Row, name: str, measured: Measured, note: str = "") -> Entry:
        """Published value against the one that came out, at the published digits or within the tolerance."""
        published = row.published[name]
        tolerance = max(half_unit(published), float(row.tolerance.get(name, 0)))
        difference = measured.value - float(published)
        status = "reproduced" if abs(difference) <= tolerance * (1 + 1e-9) + 1e-12 else "differs"
        return replace(
            self._entry(row, name, status=status),
            reproduced=_round(measured.value),
            difference=_round(difference),
            tolerance=_round(tolerance),
            convention=measured.convention or row.convention[name],
            source=measured.source
            + note
            + ("; published value read off a figure" if name in row.approximate else "")
            + self._reason(row, name, status),
        )

    def _reason(self, row: Row, name: str, status: str) -> str:
        return f"; differs: {row.reasons.get(name, 'the reason is not known')}" if status == "differs" else ""

    def _entry(self, row: Row, name: str, *, status: str, source: str = "", command: str = "") -> Entry:
        """Entry without a reproduced value."""
        published: Decimal | None = row.published[name]
        is_ratio = column(name).kind == "speed" and bool(row.dense) and not row.cited
        if is_ratio:
            dense = next(r for table in self.known for r in table.rows if r.key == row.dense)
            published = round(row.published[name] / dense.published[name], 3)
            absolute = f"published {row.published[name]} / {dense.published[name]} {column(name).unit} ({row.dense})"
            source = f"{absolute}; {source}" if source else absolute
        return Entry(
            paper=self.paper,
            table=row.table,
            row=row.id,
            column=name,
            published=published,
            reproduced=None,
            difference=None,
            tolerance=None,
            status=status,
            convention=row.convention.get(name, ""),
            source=source,
            command=command or row.command(name),
            is_ratio=is_ratio,
        )

    # ----------------------------------------------------------------------------------------------------- helpers

    def _bar(self, items: Sequence[Any], what: str) -> Any:
        """Progress bar over items, which appears when it has taken two seconds."""
        return tqdm(items, desc=f"{self.paper}: {what}", delay=2, leave=False, disable=self.request.quiet or not items)

    def _failed(self, table: str, row: str, error: Exception) -> None:
        self.ledger.failures.append(Failure(self.paper, table, row, f"{type(error).__name__}: {error}"))


def half_unit(published: Decimal) -> float:
    """Half of the last published digit: 275.8 gives 0.05, 392 gives 0.5."""
    exponent = published.as_tuple().exponent
    assert isinstance(exponent, int)
    return 0.5 * 10.0 ** min(exponent, 0)


def _best(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """One record per (table/row, column): an accelerator before a CPU, eager float32 as published, then the newest."""

    def rank(record: Record) -> tuple[bool, bool, bool, str]:
        assert record.origin is not None
        accelerator = record.origin.device.get("type") != "cpu"
        eager = not record.compiled and not record.cuda_graph
        return (accelerator, record.dtype == "float32", eager, record.origin.created)

    best: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (f"{record.table}/{record.row}", record.column)
        if key not in best or rank(record) >= rank(best[key]):
            best[key] = record
    return best


def _round(value: float) -> float:
    """Six decimals, so that files do not carry noise of the arithmetic.

    Raises:
        ValueError: if the value is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return round(value, 6)


def _fields(measured: Measured) -> list[Any]:
    return [measured.value, measured.convention, measured.source, measured.ratio]


def _pack(found: Mapping[str, Measured]) -> dict[str, list[Any]]:
    return {name: _fields(measured) for name, measured in found.items()}


def _unpack(value: Mapping[str, Sequence[Any]]) -> dict[str, Measured]:
    return {name: Measured(*fields) for name, fields in value.items()}


def _listing(folder: Path | None) -> list[Any] | None:
    """What tells one state of a folder from another without reading its files."""
    if folder is None:
        return None
    state = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if (place, name) != (str(folder), "train"))  # nothing trains here
        for name in sorted(names):
            found = os.stat(os.path.join(place, name))
            state.update(f"{place}/{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return [str(folder.resolve()), state.hexdigest()]


def _device_name(device: str) -> str:
    """Name of a device for the cache, so that a result of one machine is not taken for another's."""
    from common.measure.benchmark import device_name  # imports torch, which not every run needs

    return device_name(device)

"""What there is for each published value: computed now, kept in the cache, recorded in ``results/``, or missing.

A paper takes part by a module ``<paper>/ledger.py``, found by name at run time, so that ``common`` imports no paper:

    costs(row) -> {column: Measured}                           parameters, GMACs; "macs_g" for plain GMACs
    speeds(rows, *, columns, device, progress) -> {(row id, column): Measured}      rows[0] is the dense row
    accuracy(row, *, data, weights, device, progress) -> {column: Measured}

Each may raise a subclass of ``common.ledger.tables.Unavailable``. A paper without such a module is not implemented yet.
The module is imported when something must be computed: what the cache holds needs neither it nor torch.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from common.ledger import evidence
from common.ledger.cache import cached, source_files
from common.ledger.compare import BrokenAdapter, Ledger, compare
from common.ledger.results import Record, load_file, record_files
from common.ledger.tables import NEEDS, Cited, Measured, NotImplementedYet, OwnTable, Row, Table, Unavailable, column
from common.run.files import ROOT
from common.run.flags import Settings

Answer = Mapping[Any, Measured] | Unavailable
"""What an adapter says: values by column (speeds: by row and column), or why there are none."""


@dataclass(frozen=True)
class Request(Settings):
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
    verbose: bool = False
    """show what the programs of live runs print"""
    root: Path = ROOT

    @property
    def cache(self) -> Path:
        """Where computed results are kept."""
        return self.root / ".cache" / "leanvit"

    @property
    def running(self) -> dict[str, Any]:
        """What every question that computes is asked with."""
        return {"device": self.device, "progress": not self.quiet}

    def columns_of(self, row: Row, kind: str | None = None) -> list[str]:
        """Published columns of a row that are asked for, of one kind or of all."""
        wanted = [name for name in row.published if self.columns is None or name in self.columns]
        return [name for name in wanted if kind is None or column(name).kind == kind]


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
        narrowed = (replace(part, rows=tuple(entry for entry in part.rows if entry.id == row)) for part in chosen)
        chosen = tuple(part for part in narrowed if part.rows)
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
        known = {row.key: row for table in all_tables or tables if table.paper == paper for row in table.rows}
        with ledger.guard(paper):
            _build_paper(paper, own, known, request, ledger)
            if paper in evidence.papers(request.root):
                ledger.own.append(evidence.claims_table(paper, root=request.root))
    return ledger


def _build_paper(
    paper: str, tables: Sequence[Table], known: Mapping[str, Row], request: Request, ledger: Ledger
) -> None:
    rows = [(table, row) for table in tables for row in table.rows]
    records = _recorded(paper, {row.key: row for _, row in rows}, request, ledger)
    costs: dict[str, Answer] = {row.key: Cited("", f"quoted in: {table.source}") for table, row in rows if row.cited}
    for table, row in _bar([(table, row) for table, row in rows if not row.cited], f"{paper}: costs", request):
        with ledger.guard(paper, table.name, row.id):
            costs[row.key] = _costs(table, row, request, ledger)
    speeds: dict[str, Answer] = {}
    if request.measure_speed:
        built = [row for _, row in rows if isinstance(costs.get(row.key), Mapping)]
        speeds = _speeds(paper, built, known, request, ledger)
    for table, row in _bar(rows, f"{paper}: accuracy", request, quiet=request.data is None):
        if row.key not in costs:
            continue  # it failed
        with ledger.guard(paper, table.name, row.id):
            answers = dict.fromkeys(("cost", "speed", "accuracy"), costs[row.key])
            if not isinstance(costs[row.key], Cited | NotImplementedYet):
                answers |= {"speed": speeds.get(row.key, {}), "accuracy": _accuracy(row, request)}
            dense = known[row.dense] if row.dense else None
            ledger.entries += [
                compare(row, name, _find(row, name, answers[column(name).kind], records.get((row.key, name))), dense)
                for name in request.columns_of(row)
            ]


def _find(row: Row, name: str, answer: Answer, record: Measured | None) -> Measured | Unavailable:
    """What there is for one value: computed here, else recorded, else what is missing."""
    if not isinstance(answer, Unavailable) and name in answer:
        return answer[name]
    if record is not None:
        return record
    if isinstance(answer, Unavailable):
        return answer
    kind = column(name).kind
    need = row.needs.get(name, {"speed": "gpu", "accuracy": "data"}.get(kind, ""))
    if not need:
        raise LookupError(f"{row.paper}.ledger.costs returned no {name!r}, and the table does not say what it needs")
    return NEEDS[need]("", f"the cost of this row depends on its {need}" if kind == "cost" else "")


def _recorded(paper: str, rows: Mapping[str, Row], request: Request, ledger: Ledger) -> dict[tuple[str, str], Measured]:
    """What is filed for (table/row, column); a file or a record that cannot be used loses no other, nor any value."""
    records: list[Record] = []
    for path in record_files(paper, root=request.root):
        with ledger.guard(paper, what="results"):
            records += load_file(paper, path)
    found: dict[tuple[str, str], Measured] = {}
    for record in best_last(records):
        if row := rows.get(f"{record.table}/{record.row}"):
            with ledger.guard(paper, row.table, row.id):
                found[row.key, record.column] = _as_recorded(row, record)
    return found


def _as_recorded(row: Row, record: Record) -> Measured:
    """A record as a value to compare."""
    name = record.column
    is_speed = column(name).kind == "speed"
    ratio = record.ratio
    if is_speed and row.dense:
        if not record.is_ratio_to(row.dense):
            raise ValueError(f"{name}: the record in results/ is not a ratio to {row.dense!r}: {record.origin.path}")
        if ratio is None and record.reference_value is not None:
            ratio = record.value / record.reference_value
    text = record.origin.text
    convention = record.conditions if is_speed else row.convention[name]
    return Measured(record.value, convention, f"recorded: {text}", ratio, text)


def best_last(records: Iterable[Record]) -> list[Record]:
    """The records, those to prefer last: eager float32 as published, an accelerator before a CPU, then the newest."""

    def rank(record: Record) -> tuple[bool, bool, bool, str]:
        accelerator = record.origin.device.get("type") != "cpu"
        eager = not record.compiled and not record.cuda_graph
        return (record.dtype == "float32", accelerator, eager, record.origin.created)

    return sorted(records, key=rank)


# -------------------------------------------------------------------------------------------------- asking the papers


def has_adapter(paper: str) -> bool:
    """Whether the paper has a ``ledger`` module."""
    return bool(importlib.util.find_spec(paper) and importlib.util.find_spec(f"{paper}.ledger"))


def find_adapter(paper: str) -> ModuleType | None:
    """The paper's ``ledger`` module; None if it has none.

    Raises:
        BrokenAdapter: if there is one, and it cannot be imported.
    """
    if not has_adapter(paper):
        return None
    try:
        return importlib.import_module(f"{paper}.ledger")
    except ImportError as error:
        raise BrokenAdapter(f"{type(error).__name__}: {error}") from error


def _ask(
    paper: str,
    method: str,
    request: Request,
    job: Sequence[Any],
    *words: Any,
    files: Sequence[Path] = (),
    **options: Any,
) -> Any:
    """What a paper's adapter answers, as JSON has it and from the cache; None if it has no such method."""

    def compute() -> Any:
        with _programs():
            if (adapter := find_adapter(paper)) is None:
                raise NotImplementedYet(paper)
            found = getattr(adapter, method, lambda *_, **__: None)(*words, **options)
        return (
            [[key, asdict(one)] for key, one in found.items()]
            if isinstance(found, Mapping)
            else found and asdict(found)
        )

    sources = [*source_files(paper, root=request.root), *files]
    return cached([method, paper, *job], compute, files=sources, force=request.force, folder=request.cache)


def _measured(*words: Any, **options: Any) -> Answer:
    """Values that an adapter answers; what it cannot tell is returned, not raised. Arguments are those of ``_ask``."""
    try:
        found = _ask(*words, **options) or []
    except Unavailable as missing:
        return missing
    return {tuple(key) if isinstance(key, list) else key: Measured(**fields) for key, fields in found}


def _costs(table: Table, row: Row, request: Request, ledger: Ledger) -> Answer:
    """Costs of a row if a column needs them; plain multiply-accumulates go to ``ledger.plain_gmacs``."""
    if not any(request.columns_of(row, kind) for kind in ("cost", *["speed"] * request.measure_speed)):
        return {} if has_adapter(row.paper) else NotImplementedYet(row.paper)
    answer = _measured(row.paper, "costs", request, [row.table, row.id], row, files=[table.path])
    if isinstance(answer, Unavailable) or "macs_g" not in answer:
        return answer
    plain = ledger.plain_gmacs[row.paper, row.key] = answer["macs_g"].value
    if counted := answer.get("gmacs"):
        answer = {**answer, "gmacs": replace(counted, source=f"{counted.source}; plain MACs {plain:.6g} G")}
    return answer


def _accuracy(row: Row, request: Request) -> Answer:
    """Evaluate a row if there is something to evaluate on; else say nothing."""
    if request.data is None or not request.columns_of(row, "accuracy"):
        return {}
    folders = {"data": request.data, "weights": request.weights}
    job = [row.table, row.id, _device_name(request.device), *map(_listing, folders.values())]
    return _measured(row.paper, "accuracy", request, job, row, **folders, **request.running)


def _speeds(
    paper: str, rows: Sequence[Row], known: Mapping[str, Row], request: Request, ledger: Ledger
) -> dict[str, Answer]:
    """Measure the rows of each table together with their dense row, which goes first, and gets ratios to it."""
    found: dict[str, Answer] = {}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if request.columns_of(row, "speed"):
            groups.setdefault((row.table, row.dense or row.key), []).append(row)
    for (table, key), members in _bar(list(groups.items()), f"{paper}: speeds", request):
        dense = known[key]
        together = [dense, *(row for row in members if row.key != key)]
        names = sorted({name for row in members for name in request.columns_of(row, "speed")})
        job = [key, [row.key for row in together], names, _device_name(request.device)]
        with ledger.guard(paper, table, ", ".join(row.id for row in members)):
            answer = _measured(paper, "speeds", request, job, together, columns=names, **request.running)
            if isinstance(answer, Unavailable):
                found |= {row.key: answer for row in members}
                continue
            for row in together:
                found[row.key] = {
                    name: replace(speed, ratio=speed.ratio or speed.value / answer[dense.id, name].value)
                    for (row_id, name), speed in answer.items()
                    if row_id == row.id and (dense.id, name) in answer
                }
    return found


def run_live(paper: str, request: Request, ledger: Ledger) -> OwnTable | None:
    """Do a paper's live run, if it has one; what came out goes to ``ledger.own``, too."""

    def compute() -> Any:
        with _programs(sys.stdout):
            return evidence.live(
                paper, device=request.device, folder=request.cache / "live" / paper, verbose=request.verbose
            )

    with ledger.guard(paper, what="live run"):
        sources = source_files(paper, root=request.root)
        job = ["live", paper, _device_name(request.device)]
        found = cached(job, compute, files=sources, force=request.force, folder=request.cache)
        if found is not None:
            ledger.own.append(evidence.live_table(paper, *found, root=request.root))
            return ledger.own[-1]
    return None


# ------------------------------------------------------------------------------------------------------------- helpers


class _Screen:
    """A stream without the settings that some programs print first, as published: ``Namespace(...)``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if text.startswith("Namespace(") else self._stream.write(text)


@contextlib.contextmanager
def _programs(output: Any = None) -> Generator[None]:
    """Keep the ledger's output free of what a paper's programs and their libraries have to say.

    Args:
        output: where programs print to; None: standard error.
    """
    silent, out, err = warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout, contextlib.redirect_stderr
    screen: Any = _Screen(sys.stderr)
    with silent, out(output or screen), err(screen):
        try:
            yield
        except SystemExit as error:  # of a program's command line; the other rows must not be lost
            raise RuntimeError(str(error.code)) from error


def _bar(items: Sequence[Any], what: str, request: Request, quiet: bool = False) -> Any:
    """Progress bar over items, which appears when it has taken two seconds."""
    return tqdm(items, desc=what, delay=2, leave=False, disable=quiet or request.quiet or not items)


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

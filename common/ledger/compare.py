"""Every published value beside the one that comes out here, and what the two together mean.

Nothing is computed here: ``common.ledger.gather`` finds what there is for a value, ``compare`` makes its entry.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from common.ledger.tables import DeskTable, Measured, Row, Table, Unavailable, column

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
    *("paper", "table", "row", "column", "published", "reproduced", "difference", "tolerance", "status"),
    *("convention", "source", "command"),
)
"""Keys of an entry in JSON and CSV, in order."""


@dataclass(frozen=True)
class Recorded(Measured):
    """A number from ``results/``."""

    origin: str = ""
    """device, versions, commit and date"""


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
    """where the number comes from, or what is missing, in one line"""
    command: str
    is_ratio: bool = False
    """published and reproduced are ratios to the dense row"""
    reason: str = ""
    """why the value differs, or that this is not known"""
    origin: str = ""
    """of a recorded value: device, versions, commit and date"""

    def as_dict(self) -> dict[str, Any]:
        """The entry under ``KEYS``, ready for JSON."""
        values = {key: getattr(self, key) for key in KEYS}
        if self.published is not None:
            whole = self.published.as_tuple().exponent == 0
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
        return count_statuses(self.entries)

    @contextmanager
    def guard(self, paper: str, table: str = "", row: str = "", what: str = "") -> Iterator[None]:
        """Note an exception as a failure and go on: one row's failure must not lose the others."""
        try:
            yield
        except Exception as error:
            if isinstance(error, BrokenAdapter) and table:
                raise  # the paper's, not the row's
            words = [what, "" if isinstance(error, Unavailable | BrokenAdapter) else type(error).__name__, str(error)]
            self.failures.append(Failure(paper, table, row, ": ".join(word for word in words if word)))


class BrokenAdapter(ImportError):
    """A paper's ``ledger.py`` that cannot be imported."""


def count_statuses(entries: Any) -> Counter[str]:
    """Entries per status, in the order of ``STATUSES``; none of those that do not occur."""
    found = Counter(entry.status for entry in entries)
    return Counter({status: found[status] for status in STATUSES if found[status]})


def compare(row: Row, name: str, found: Measured | Unavailable, dense: Row | None) -> Entry:
    """The entry of one column of a row.

    A value is compared at the published digits or within the stated tolerance; a speed by its ratio to the dense row.

    Args:
        row: the published row.
        name: the column.
        found: what came out here or was recorded, or what is missing.
        dense: the row that a speed is a ratio to; None: the row is not compared.

    Raises:
        ValueError: if a value is not finite.
    """
    published = row.published[name]
    unit, is_speed = column(name).unit, column(name).kind == "speed"
    is_ratio = is_speed and dense is not None and not row.cited
    parts: list[str] = []
    if is_ratio and dense is not None:
        parts.append(f"published {published} / {dense.published[name]} {unit} ({dense.key})")
        published = round(published / dense.published[name], 3)
    entry = Entry(
        *(row.paper, row.table, row.id, name, published, None, None, None),
        status="recorded",
        convention=row.convention.get(name, ""),
        source="",
        command=row.command(name),
        is_ratio=is_ratio,
    )
    if isinstance(found, Unavailable):
        parts.append(found.reason or STATUSES[found.status])
        command = found.command or entry.command
        return replace(entry, status=found.status, source="; ".join(parts), command=command)
    parts.append(found.source)
    origin = found.origin if isinstance(found, Recorded) else ""
    convention = found.convention or entry.convention
    if is_speed and not is_ratio:
        parts.append("the baseline of the ratios, published on another device, so not compared")
        value = _finite(found.value)
        return replace(entry, reproduced=value, convention=convention, source="; ".join(parts), origin=origin)
    value = found.ratio if is_ratio and found.ratio is not None else found.value
    difference = value - float(published)
    if is_ratio:
        tolerance = float(row.tolerance[name]) * float(published)
        parts.append(f"{found.value:.5g} {unit} measured")
    else:
        tolerance = max(half_unit(published), float(row.tolerance.get(name, 0)))
        parts += ["published value read off a figure"] if name in row.approximate else []
    reason = ""
    if not abs(difference) <= tolerance * (1 + 1e-9) + 1e-12:
        reason = row.reasons.get(name, "the reason is not known")
        parts.append(f"differs: {reason}")
    return replace(
        entry,
        reproduced=_finite(value),
        difference=_finite(difference),
        tolerance=_finite(tolerance),
        status="recorded" if isinstance(found, Recorded) else "differs" if reason else "reproduced",
        convention=convention,
        source="; ".join(parts),
        reason=reason,
        origin=origin,
    )


def half_unit(published: Decimal) -> float:
    """Half of the last published digit: 275.8 gives 0.05, 392 gives 0.5."""
    exponent = published.as_tuple().exponent
    assert isinstance(exponent, int)
    return 0.5 * 10.0 ** min(exponent, 0)


def _finite(value: float) -> float:
    """The value to six decimals, so that files do not carry noise of the arithmetic."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return round(value, 6)

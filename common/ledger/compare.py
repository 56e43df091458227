"""Every published value beside the one that comes out here, and what the two together mean.

Nothing is computed here: ``common.ledger.gather`` finds what there is for a value, ``compare`` makes its entry.
"""

import math
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

from common.ledger.tables import Measured, OwnTable, Row, Table, Unavailable, column


class Status(NamedTuple):
    """What became of a value."""

    meaning: str
    tag: str
    """in the tables of the terminal"""
    group: str
    """column of the overviews that counts it"""


STATUSES: Mapping[str, Status] = {
    "reproduced": Status("equal when rounded to the published digits, or within the stated tolerance", "✓", "same"),
    "differs": Status("not equal; the reason is given where it is known", "✗", "differ"),
    "recorded": Status(
        "measured earlier or elsewhere, or a value with nothing published to compare it to", "rec", "measured"
    ),
    "needs data": Status("needs a data set: --data DIR", "data", "open"),
    "needs weights": Status("needs a published checkpoint", "weights", "open"),
    "needs gpu": Status("needs a GPU, or a speed column named with --columns", "gpu", "open"),
    "needs compute": Status("needs a training run", "compute", "open"),
    "not implemented yet": Status("the model is not built yet", "todo", "open"),
    "cited": Status("a baseline that the paper only quotes", "cited", "quoted"),
}
"""Every status, in the order in which they are counted."""

KEYS = (
    *("paper", "table", "row", "column", "published", "reproduced", "difference", "tolerance", "status"),
    *("convention", "source", "command"),
)
"""Keys of an entry in JSON and CSV, in order."""


@dataclass(frozen=True)
class Entry:
    """One published value of one row, and what became of it."""

    paper: str
    table: str
    row: str
    column: str
    published: Decimal
    """as published; for a speed the ratio to the dense row"""
    status: str
    convention: str
    source: str
    """where the number comes from, or what is missing, in one line"""
    command: str
    reproduced: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    """largest difference that counts as reproduced, in the unit of the difference"""
    absolute: Decimal | None = None
    """the published speed, where ``published`` and ``reproduced`` are ratios to the dense row"""
    approximate: bool = False
    """the published value was read off a figure"""
    reason: str = ""
    """why the value differs, or that this is not known"""
    origin: str = ""
    """of a recorded value: device, versions, commit and date"""

    def as_dict(self) -> dict[str, Any]:
        """The entry under ``KEYS``, ready for JSON."""
        whole = self.published.as_tuple().exponent == 0
        number = int(self.published) if whole else float(self.published)
        return {key: getattr(self, key) for key in KEYS} | {"published": number}

    @property
    def is_ratio(self) -> bool:
        """Published and reproduced are ratios to the dense row."""
        return self.absolute is not None

    @property
    def there(self) -> str:
        """The published value with its digits; ``x`` for a ratio to the dense row."""
        return f"{self.published:f}{'x' if self.is_ratio else ''}"

    @property
    def here(self) -> str:
        """The reproduced value, one digit more than published where it is compared."""
        if self.reproduced is None:
            return ""
        if self.is_ratio:
            return f"{self.reproduced:.3f}x"
        if column(self.column).kind == "speed":
            return f"{self.reproduced:.4g}" if self.reproduced < 1000 else f"{self.reproduced:.0f}"
        digits = max(-_exponent(self.published), 0)
        extra = 0 if digits >= 4 else 1 + (digits == 0)
        return f"{self.reproduced:.{digits + extra}f}"


@dataclass
class Ledger:
    """All entries of a run, in the order of the tables."""

    tables: tuple[Table, ...] = ()
    entries: list[Entry] = field(default_factory=list)
    plain_gmacs: dict[tuple[str, str], float] = field(default_factory=dict)
    """(paper, table/row) -> plain multiply-accumulates in G, beside the paper's own convention"""
    failures: list[str] = field(default_factory=list)
    """``paper/table/row: problem``: exceptions that did not affect the other rows"""
    own: list[OwnTable] = field(default_factory=list)
    """claims and live runs on small real images"""

    def counts(self) -> Counter[str]:
        """Entries per status, in the order of ``STATUSES``."""
        return count_statuses(self.entries)

    @contextmanager
    def guard(self, paper: str, table: str = "", row: str = "", what: str = "") -> Generator[None]:
        """Note an exception as a failure and go on: one row's failure must not lose the others."""
        try:
            yield
        except Exception as error:
            if isinstance(error, BrokenAdapter) and table:
                raise  # the paper's, not the row's
            kind = "" if isinstance(error, Unavailable | BrokenAdapter) else type(error).__name__
            where = "/".join(word for word in (paper, table, row) if word)
            self.failures.append(": ".join(word for word in (where, what, kind, str(error)) if word))


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
    parts: list[str] = []
    absolute = None
    if is_speed and dense is not None and not row.cited:
        absolute = published
        parts.append(f"published {published} / {dense.published[name]} {unit} ({dense.key})")
        published = round(published / dense.published[name], 3)
    common = {"absolute": absolute, "approximate": name in row.approximate}
    entry = partial(Entry, row.paper, row.table, row.id, name, published, **common)
    convention, command = row.convention.get(name, ""), row.command(name)
    if isinstance(found, Unavailable):
        parts.append(found.reason or STATUSES[found.status].meaning)
        return entry(found.status, convention, "; ".join(parts), found.command or command)
    parts.append(found.source)
    value, status, reason = found.value, "recorded", ""
    difference = tolerance = None
    if is_speed and absolute is None:
        parts.append("the baseline of the ratios, published on another device, so not compared")
    else:
        if absolute is not None:
            value = value if found.ratio is None else found.ratio
            tolerance = float(row.tolerance[name]) * float(published)
            parts.append(f"{found.value:.5g} {unit} measured")
        else:
            tolerance = max(half_unit(published), float(row.tolerance.get(name, 0)))
            parts += ["published value read off a figure"] if name in row.approximate else []
        difference = value - float(published)
        if not abs(difference) <= tolerance * (1 + 1e-9) + 1e-12:
            reason = row.reasons.get(name, "the reason is not known")
            parts.append(f"differs: {reason}")
        if not found.origin:
            status = "differs" if reason else "reproduced"
    return entry(
        status,
        found.convention or convention,
        "; ".join(parts),
        command,
        *map(_finite, (value, difference, tolerance)),
        reason=reason,
        origin=found.origin,
    )


def half_unit(published: Decimal) -> float:
    """Half of the last published digit: 275.8 gives 0.05, 392 gives 0.5."""
    return 0.5 * 10.0 ** min(_exponent(published), 0)


def _exponent(published: Decimal) -> int:
    exponent = published.as_tuple().exponent
    assert isinstance(exponent, int)
    return exponent


def _finite(value: float | None) -> float | None:
    """The value to six decimals, so that files do not carry noise of the arithmetic."""
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return round(value, 6)

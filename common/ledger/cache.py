"""A local cache of computed results, so that a second run of the main job recomputes nothing.

An entry is valid for one job, one state of the source files that the job depends on, and one set of versions (Python,
torch, torchvision, timm, NumPy). The files are JSON under ``.cache/leanvit/`` of the checkout and are never committed.
"""

import contextlib
import hashlib
import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache as memoise
from importlib import metadata
from pathlib import Path
from typing import Any

from common.run.files import ROOT, write_atomic

FOLDER = ROOT / ".cache" / "leanvit"
"""Where entries live."""

VERSIONED = ("torch", "torchvision", "timm", "numpy")

skipped: Counter[str] = Counter()
"""How many results of each kind this process took from the cache instead of computing them."""


@memoise
def versions() -> Mapping[str, str]:
    """Versions that a result may depend on; a package that is not installed is reported as such."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_files(paper: str, *, root: Path = ROOT) -> tuple[Path, ...]:
    """Python files that a paper's numbers may depend on: its own and ``common``'s, without their tests.

    Of the ledger only what measures: how a number is compared and shown does not change it.
    """
    shown = root / "common" / "ledger"
    files = [
        path
        for folder in (root / "common", root / paper)
        for path in folder.rglob("*.py")
        if "tests" not in path.relative_to(folder).parts and (path.parent != shown or path.stem == "speeds")
    ]
    return tuple(sorted(files))


def digest(files: Iterable[Path]) -> str:
    """Hash of names and contents of some files, in the order of their paths.

    Raises:
        FileNotFoundError: if one of them does not exist.
    """
    total = hashlib.sha256()
    for path in sorted(set(files)):
        total.update(f"{path.name}\0{_content_hash(path, path.stat().st_mtime_ns)}\n".encode())
    return total.hexdigest()


@memoise
def _content_hash(path: Path, modified_ns: int) -> str:
    """Hash of one file; ``modified_ns`` makes a file that was edited during the run a new question."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cached(
    job: Sequence[Any],
    compute: Callable[[], Any],
    *,
    files: Iterable[Path] = (),
    force: bool = False,
    folder: Path | None = None,
) -> Any:
    """Result of ``compute``, from the cache if this job was done with the same sources and versions.

    What is taken from the cache is counted in ``skipped`` under the first word of the job; ``report_skipped`` prints it
    once. An entry that cannot be read, or that belongs to another job, is computed again and replaced.

    Args:
        job: what is computed: words, numbers, lists; the first says the kind ("costs", "speeds", "live").
        compute: makes the result, which must survive JSON.
        files: source files whose content the result depends on.
        force: compute in any case, and replace the entry.
        folder: where the entries live; ``FOLDER`` if None.
    """
    key = {"job": list(job), "sources": digest(files), "versions": dict(versions())}
    text = json.dumps(key, sort_keys=True)
    slug = re.sub(r"[^\w.-]", "_", "-".join(str(part) for part in job if isinstance(part, str | int)))[:60]
    path = (folder or FOLDER) / f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not force and path.exists():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            entry = json.loads(path.read_text())
            if entry["key"] == json.loads(text):
                value = entry["value"]
                skipped[str(job[0])] += 1
                return value
        print(f"cache: {path} is damaged; computing it again", file=sys.stderr)
    value = compute()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(path, json.dumps({"key": key, "created": created, "value": value}, indent=1))
    return json.loads(json.dumps(value))


def report_skipped() -> str:
    """One line on what came from the cache, empty if nothing did."""
    if not skipped:
        return ""
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
    return f"Not computed again (same code and versions): {counts}. FORCE=1 or --force recomputes."

"""A made-up paper in a temporary folder: tables, an adapter and records, for the tests of the ledger."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TABLE = """
paper = "fakepaper"
table = "main"
title = "A made-up table"
source = "nowhere, 2024"
dataset = "ImageNet-1K"
note = "for tests"
plot = {x = "gmacs", y = "top1_percent"}

[convention]
gmacs = "macs"
params_m = "all parameters"
fps = "ratio to the dense row"
top1_percent = "centre crop"

[tolerance]
fps = 0.1
top1_percent = 0.2

[commands]
gmacs = "python fakepaper/cost.py {arguments}"
fps = "python fakepaper/speed.py {arguments}"
top1_percent = "python fakepaper/evaluate.py {arguments} --resume {checkpoint} DIR"

[checkpoints.weights]
url = "https://example.org/weights-0123abcd.pth"
sha256 = "0123abcd"
licence = "CC0"

[[rows]]
id = "dense"
method = "Dense"
series = "ViT"
arguments = "-m dense"
checkpoint = "weights"
published = {gmacs = 10.0, params_m = 5.25, fps = 100, top1_percent = 80.0}

[[rows]]
id = "half"
method = "Half"
series = "ViT"
setting = "r = 0.5"
arguments = "-m half -r 0.5"
checkpoint = "weights"
dense = "dense"
published = {gmacs = 5.0, fps = 180, top1_percent = 79.0}

[[rows]]
id = "slip"
method = "Half"
series = "ViT"
setting = "r = 0.4"
arguments = "-m half -r 0.4"
checkpoint = "weights"
dense = "dense"
published = {gmacs = 4.1, fps = 200, top1_percent = 78.0}
reasons = {gmacs = "a slip of rounding in the table"}

[[rows]]
id = "unknown"
method = "Sampled"
arguments = "-m sampled"
checkpoint = "weights"
published = {gmacs = 6.0, top1_percent = 77.5}
needs = {gmacs = "weights", top1_percent = "compute"}

[[rows]]
id = "later"
method = "Later"
arguments = "-m later"
checkpoint = "weights"
dense = "dense"
published = {gmacs = 7.0, fps = 120, top1_percent = 79.5}

[[rows]]
id = "other"
method = "Other"
series = "cited baselines"
cited = true
published = {gmacs = 6.5, top1_percent = 78.8}
"""

ADAPTER = """
from common.ledger.tables import Measured, NeedsWeights, NotImplementedYet

CALLS = []
COSTS = {"dense": 10.04, "half": 4.96, "slip": 4.02}
SPEEDS = {"dense": 50.0, "half": 95.0, "slip": 60.0}
TOP1 = {"dense": 80.15, "half": 78.5}


def costs(row):
    CALLS.append(("costs", row.id))
    if row.id == "later":
        raise NotImplementedYet("later_model")
    if row.id == "unknown":
        return {"params_m": Measured(5.25, "all parameters", "counted")}
    value = COSTS[row.id]
    plain = Measured(value - 0.5, "macs", "counted")
    return {"gmacs": Measured(value, "macs", "counted"), "params_m": Measured(5.254, "all", "counted"), "macs_g": plain}


def speeds(rows, *, columns, device, progress):
    CALLS.append(("speeds", [row.id for row in rows]))
    found = {row.id: Measured(SPEEDS[row.id], f"float32 on {device}", "timed") for row in rows}
    return {(row.id, name): found[row.id] for row in rows for name in columns}


def accuracy(row, *, data, weights, device, progress):
    CALLS.append(("accuracy", row.id))
    if row.id not in TOP1:
        raise NeedsWeights(f"fetch {row.id}", "the file is missing")
    return {"top1_percent": Measured(TOP1[row.id], "float32", f"evaluated on {data.name}")}

"""

CLAIMS = """
[[claims]]
id = "better"
claim = "New is better than old"
source = "Table 1"
published = "+2.0"
measured = "top-1"
note = "Nobody knows why."
comparisons = [
    { label = "at full width", arm = ["new"], against = ["old"] },
    { label = "x", arm = ["a"], against = ["b"] },
]
"""

EVIDENCE = """
from common.ledger.evidence import Run
from fakepaper.ledger import CALLS


def live(job):
    print("epoch 1/1 done")
    CALLS.append(("live", job.seed))
    return {"live: half": {"top1_percent": 84.5}, "live: later": {"top1_percent": 90.0}}


RUNS = {"live": Run("live", live)}
"""


def write_paper(root: Path, *, table: str = TABLE, adapter: str | None = ADAPTER, evidence: str = EVIDENCE) -> Path:
    """Write the package ``fakepaper`` under a folder; returns the path of its table."""
    package = root / "fakepaper"
    (package / "tables").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    if adapter is not None:
        (package / "ledger.py").write_text(adapter)
        (package / "evidence.py").write_text(evidence)
        (package / "tables" / "claims.toml").write_text(CLAIMS)
        for seed, (new, old) in enumerate([(85.0, 82.0), (86.0, 83.5), (84.0, 82.0)]):
            arms = {"new": new, "new: all": new, "old": old, "old: all": old, "live: half": new}
            path = package / "results" / "evidence" / f"seed-{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            measured = {arm: {"top1_percent": top1, "mmacs": 2.0} for arm, top1 in arms.items()}
            path.write_text(json.dumps({"paper": "fakepaper", "seed": seed, "runs": {"all": {"arms": measured}}}))
    path = package / "tables" / "main.toml"
    path.write_text(table)
    return path


@contextmanager
def importable(root: Path) -> Iterator[None]:
    """Let ``fakepaper`` be imported from a folder, freshly, and forget it afterwards."""
    sys.path.insert(0, str(root))
    try:
        forget()
        yield
    finally:
        sys.path.remove(str(root))
        forget()


def forget() -> None:
    """Drop the imported modules of the fake paper."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakepaper"]:
        del sys.modules[name]


def record(row: str, column: str, value: float, **more: object) -> dict[str, object]:
    """One record of the fake paper, as a file holds it."""
    return {
        "paper": "fakepaper",
        "table": "main",
        "row": row,
        "column": column,
        "value": value,
        "reference_row": None,
        "reference_value": None,
        "ratio": None,
        "dtype": "float32",
        "batch_size": 1,
        "resolution": 224,
        "compiled": False,
        "rounds": 10,
        "spread_percent": 1.0,
        "peak_memory_mb": None,
        **more,
    }


def write_records(root: Path, name: str, records: list[dict[str, object]], *, kind: str, created: str) -> None:
    """File records of one device under ``fakepaper/results/``."""
    folder = root / "fakepaper" / "results"
    folder.mkdir(exist_ok=True)
    content = {
        "format": 1,
        "created": created,
        "commit": "0123456789abcdef",
        "device": {"name": name, "type": kind, "torch": "2.15.0"},
        "command": "make gpu",
        "records": records,
    }
    (folder / f"{name}.json").write_text(json.dumps(content))

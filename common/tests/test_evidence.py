"""Evidence: claims are read strictly, runs resume one by one, and intervals are those of scipy."""

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from common.ledger import evidence
from common.ledger.evidence import (
    Comparison,
    Job,
    Run,
    claims_summary,
    claims_table,
    judge,
    load_claims,
    measure_seed,
    predicted,
    recorded,
)
from common.ledger.tables import TableError
from common.ledger.view import markdown_own
from common.tests.fake_paper import CLAIMS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "paper" / "tables").mkdir(parents=True)
    (tmp_path / "paper" / "tables" / "claims.toml").write_text(CLAIMS)
    return tmp_path


def write_seeds(root: Path, new: list[float], old: list[float]) -> None:
    for seed, (a, b) in enumerate(zip(new, old, strict=True)):
        path = evidence.record_file("paper", seed, root=root)
        path.parent.mkdir(parents=True, exist_ok=True)
        arms = {"new": {"top1_percent": a}, "old": {"top1_percent": b}}
        path.write_text(json.dumps({"paper": "paper", "seed": seed, "runs": {"all": {"arms": arms}}}))


def test_the_interval_is_that_of_the_paired_t_distribution(root: Path) -> None:
    new, old = [82.0, 84.5, 83.1, 85.0, 83.3], [81.0, 82.2, 83.0, 83.9, 82.6]
    write_seeds(root, new, old)
    found = judge(Comparison("", ["new"], ["old"]), recorded("paper", root=root))
    assert found is not None
    low, high = stats.ttest_rel(new, old).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.verdict == "shown"
    assert low < found.boot[0] < found.mean < found.boot[1] < high
    assert found.means == pytest.approx((np.mean(new), np.mean(old)))


def test_the_verdict_follows_the_interval(root: Path) -> None:
    for shift, verdict in ((2.0, "shown"), (-2.0, "refuted here"), (0.0, "open")):
        noise = np.array([0.3, -0.2, 0.1, -0.4, 0.2])
        write_seeds(root, (80 + shift + noise).tolist(), [80.0] * 5)
        found = judge(Comparison("", ["new"], ["old"]), recorded("paper", root=root))
        assert found is not None
        assert found.verdict == verdict
        assert verdict in markdown_own(claims_table("paper", root=root))


def test_the_smallest_effect_is_seen_with_the_power_that_is_stated() -> None:
    generator = np.random.default_rng(0)
    seen = []
    for _ in range(400):
        seeds = {
            seed: {"a": {"top1_percent": float(value)}, "b": {"top1_percent": 0.0}}
            for seed, value in enumerate(generator.normal(0, 1, 5))
        }
        found = judge(Comparison("", ["a"], ["b"]), seeds)
        assert found is not None
        seen.append(found.smallest)
    effect = float(np.median(seen))
    draws = generator.normal(effect, 1, (4000, 5))
    low = draws.mean(1) - stats.t.ppf(0.975, 4) * draws.std(1, ddof=1) / 5**0.5
    assert 0.7 < (low > 0).mean() < 0.9


def test_what_is_not_measured_is_said(root: Path) -> None:
    write_seeds(root, [80.0, 81.0, 82.0], [79.0, 80.5, 81.0])
    lines = markdown_own(claims_table("paper", root=root)).splitlines()
    assert "shown" in lines[4] or "open" in lines[4]
    assert lines[5].endswith("not measured yet |")
    assert "Nobody knows why." in lines[0]
    summary = claims_summary(["paper"], root=root).splitlines()
    assert re.fullmatch(
        r"\| \[paper\]\(paper/README.md\) \| New is better than old \| 1 (shown|open), 1 not measured yet \|",
        summary[2],
    )
    assert (
        judge(Comparison("", ["new"], ["old"]), {0: {"new": {"top1_percent": 1}, "old": {"top1_percent": 1}}}) is None
    )


def test_one_more_seed_comes_out_within_the_predicted_interval() -> None:
    draws = np.random.default_rng(0).normal(80, 2, (2000, 6))
    within = [low < draw[5] < high for draw in draws for low, high in [predicted(draw[:5].tolist())]]
    assert 0.93 < np.mean(within) < 0.97


def test_sides_of_several_arms_are_averaged() -> None:
    seeds = {
        n: {arm: {"top1_percent": n + value} for arm, value in (("a", 1.0), ("b", 3.0), ("c", 0.0))} for n in range(3)
    }
    found = judge(Comparison("", ["a", "b"], ["c"]), seeds)
    assert found is not None
    assert found.mean == pytest.approx(2.0)


def test_runs_resume_one_by_one_and_again_where_their_settings_change(root: Path, monkeypatch) -> None:
    calls: list[str] = []

    def run(name: str, fails: bool = False) -> Run:
        def measure(job: Job) -> Mapping[str, Mapping[str, float]]:
            calls.append(name)
            if fails:
                raise RuntimeError("stopped")
            return {name: {"top1_percent": float(job.seed)}}

        return Run(name, measure)

    class Module:
        RUNS: ClassVar = {"first": run("first"), "second": run("second", fails=True)}

    monkeypatch.setattr(evidence.importlib, "import_module", lambda name: Module)
    options = {"device": "cpu", "folder": root / "work", "root": root}
    with pytest.raises(RuntimeError, match="stopped"):
        measure_seed("paper", 3, **options)
    Module.RUNS = {"first": run("first"), "second": run("second")}
    path = measure_seed("paper", 3, **options)
    assert calls == ["first", "second", "second"]
    assert recorded("paper", root=root) == {3: {"first": {"top1_percent": 3.0}, "second": {"top1_percent": 3.0}}}
    content = json.loads(path.read_text())["runs"]["first"]
    assert {"commit", "created", "device", "seconds"} <= content.keys()
    Module.RUNS = {"first": Run("other", Module.RUNS["first"].measure), "second": run("second")}
    measure_seed("paper", 3, **options)
    assert calls[3:] == ["first"]


def test_with_an_output_the_records_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InThisProcess(ThreadPoolExecutor):
        def __init__(self, jobs: int, *ignored: object) -> None:
            super().__init__(jobs)

    class Module:
        RUNS: ClassVar = {"all": Run("set", lambda job: {"new": {"top1_percent": float(job.seed)}})}

    before = evidence.record_file("uvc", 0).read_bytes()
    monkeypatch.setattr(evidence.importlib, "import_module", lambda name: Module)
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", InThisProcess)
    words = ["uvc", "--seeds", "2", "--jobs", "1", "--device", "cpu", "--folder", str(tmp_path)]
    assert evidence.main([*words, "--output", str(tmp_path / "new.json")]) == 0
    seeds = json.loads((tmp_path / "new.json").read_text())
    assert [seed["runs"]["all"]["arms"]["new"]["top1_percent"] for seed in seeds] == [0.0, 1.0]
    assert evidence.record_file("uvc", 0).read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "Table 1"\n', "", "claim 'better': source: is missing"),
        ('arm = ["new"]', 'arm = "new"', r"arm: expected a list"),
        ('arm = ["new"]', "arm = []", r"arm: is missing"),
        ("note =", "notes =", r"unknown keys \['notes'\]"),
        ("[[claims]]", "[[claims", "claims.toml"),
        ("[[claims]]", "claims = 5", "claims.toml: claims: expected a list"),
    ],
)
def test_claims_are_read_strictly(root: Path, old: str, new: str, message: str) -> None:
    path = root / "paper" / "tables" / "claims.toml"
    path.write_text(CLAIMS.replace(old, new))
    with pytest.raises(TableError, match=message):
        load_claims("paper", root=root)


def test_a_damaged_record_is_named(root: Path) -> None:
    write_seeds(root, [1.0], [2.0])
    path = evidence.record_file("paper", 0, root=root)
    measured = '{"seed": 0, "runs": {"a": {"arms": {"x": {"top1_percent": %s}}}}}'
    for text in ("{", "[]", '{"runs": {}}', "[" * 9000, measured % '"much"', measured % f"1{'0' * 400}"):
        path.write_text(text)
        with pytest.raises(TableError, match=r"seed-0\.json is no record"):
            recorded("paper", root=root)


def test_a_paper_without_claims_is_refused(root: Path) -> None:
    with pytest.raises(TableError, match=r"nothing has no claims: .*\['paper'\]"):
        load_claims("nothing", root=root)


def test_every_claim_of_the_papers_is_measured_by_one_of_its_runs() -> None:
    for paper in evidence.papers():
        claims = load_claims(paper)
        assert claims
        assert len({claim.id for claim in claims}) == len(claims)
        assert all(claim.comparisons for claim in claims)

"""The carried reference vectors, and the runner itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.tests.reference import read_cases, run_cases
from hourglass_swag.tests import cases as runner

VECTORS = Path(__file__).parent / "vectors"
CASES, STORED = read_cases(VECTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_vector(case):
    (result,) = run_cases([case], STORED, runner.find_runner)
    assert result.status == "pass", result.reason


def test_command_reports_passes_failures_and_what_is_not_covered(tmp_path, capsys):
    chosen = {case.name: case for case in CASES if case.name in ("vit_token", "cluster_basic", "block_costs", "unpool")}
    arrays = {key: STORED[key].copy() for key in STORED if key.split("/")[0] in chosen}
    arrays["vit_token/output"][0, 0] *= 1 + 1e-6
    arrays["cluster_basic/hard_labels"][0, 0] += 1
    del arrays["unpool/naive"]
    entries = [dict(case.raw) for case in chosen.values()]
    entries += [
        {"name": "later", "build": {"class": "LaterViT"}, "outputs": {"later/output": [1]}},
        {"name": "odd", "build": {"function": "frobnicate"}},
        {"name": "broken", "build": {"class": "HourglassViT", "kwargs": {"num_layers": 1}}},
        chosen["vit_token"].raw | {"name": "renamed", "outputs": {"renamed/output": [2, 10], "renamed/new": [1]}},
        chosen["cluster_basic"].raw | {"name": "more", "outputs": {"more/centroids": [], "more/forgotten": []}},
    ]
    (tmp_path / "cases.json").write_text(json.dumps({"cases": entries}))
    np.savez(tmp_path / "cases.npz", **arrays)
    assert runner.main([str(tmp_path)]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "FAIL: output differs by" in lines["vit_token"]
    assert "FAIL: hard_labels differs by 1.00e+00, allowed is 0e+00" in lines["cluster_basic"]
    assert "FAIL: cases.npz has no array unpool/naive" in lines["unpool"]
    assert lines["block_costs"].endswith("pass")
    assert "not covered: no runner for LaterViT" in lines["later"]
    assert "not covered: no runner for frobnicate" in lines["odd"]
    assert "FAIL: TypeError" in lines["broken"]
    assert "not covered: output new of a network" in lines["renamed"]
    assert "output forgotten was not compared" in lines["more"]
    assert lines["1"] == "1 passed, 5 failed, 3 not covered, of 9 cases"
    assert runner.main([str(tmp_path), "--only", "block*"]) == 0


def test_other_seeds_sizes_and_ways_of_writing(tmp_path):
    """Values from this code, so only reading is tested: keyword and positional inputs, factors before and behind."""
    network = {"class": "HourglassViT", "kwargs": {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2,
               "hidden_dim": 8, "mlp_dim": 16, "num_cluster": [2, 3], "clustering_location": 1}}  # fmt: skip
    clustering = {"class": "TokenClusteringBlock", "kwargs": {"n_iters": 1}, "forward num_spixels": 4}
    entries = [
        {"name": "a", "build": network, "seed": 7, "input": "fill.image(3, 16, 7)",
         "outputs": {"a/output": []}},
        {"name": "b", "build": network, "seed": 7, "input": "fill.image(batch=3, size=16, seed=7)",
         "outputs": {"b/output": []}},
        {"name": "c", "build": clustering, "seed": 8, "input": "2.5 * fill.array('z', (1, 3, 4, 4), seed)  (a note)",
         "outputs": {"c/centroids": []}},
        {"name": "d", "build": clustering, "seed": 8, "input": "fill.array(\"z\", (1, 3, 4, 4), 8) * 2.5",
         "outputs": {"d/centroids": []}},
    ]  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(entries))
    np.savez(tmp_path / "cases.npz", nothing=np.zeros(1))
    written, _ = read_cases(tmp_path)
    computed: dict[str, np.ndarray] = {}

    class Keep(dict):
        """Stored arrays that agree with whatever is computed, to get hold of it."""

        def __contains__(self, key):
            return True

        def __getitem__(self, key):
            return np.zeros(0)

    for case in written:
        checks = runner.Checks(case, Keep())
        checks.close = lambda name, got, want, **_: computed.__setitem__(name, got)  # pyright: ignore[reportAttributeAccessIssue]
        runner.find_runner(case)(case, checks)
        computed[case.name] = computed.pop(case.outputs[0])
    assert np.array_equal(computed["a"], computed["b"])
    assert computed["a"].shape == (3, 8)
    np.testing.assert_allclose(computed["c"], computed["d"])
    assert np.abs(computed["c"]).max() > 1


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.rmdir(), "is not a folder"),
        (lambda folder: None, "has no cases.json"),
        (lambda folder: shutil.copy(VECTORS / "cases.json", folder), "has no cases.npz"),
        (lambda folder: [(folder / name).write_text("{") for name in ("cases.json", "cases.npz")], "not valid JSON"),
        (
            lambda folder: [(folder / name).write_text("[1]") for name in ("cases.json", "cases.npz")],
            "no list of cases",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, capsys, prepare, message):
    folder = tmp_path / "vectors"
    folder.mkdir()
    prepare(folder)
    assert runner.main([str(folder)]) == 2
    assert message in capsys.readouterr().err

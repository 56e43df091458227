"""The carried reference vectors, and the runner itself."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from common.tests.reference import read_cases, run_cases
from dvt.tests import cases as runner

VECTORS = Path(__file__).parent / "vectors"
CASES, STORED = read_cases(VECTORS)
CASES = [*CASES, *runner.more_cases(VECTORS)]
LARGE = ("full_DVT_T2t_vit_14", "full_DVT_Deit_small")
"""Networks of published size whose kind is tested in small, left to the command."""
QUICK = [case for case in CASES if case.name not in LARGE]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_reference_vector(case):
    (result,) = run_cases([case], STORED, runner.find_runner)
    assert result.status == "pass", result.reason


def write_folder(folder, names, change_entry=lambda entry: None, change_arrays=lambda arrays: None):
    entries = [json.loads(json.dumps(case.raw)) for case in CASES if case.name in names]
    for entry in entries:
        change_entry(entry)
    arrays = {key: STORED[key].copy() for key in STORED if key.split("/")[0] in names}
    change_arrays(arrays)
    (folder / "cases.json").write_text(json.dumps({"cases": entries}))
    np.savez(folder / "cases.npz", **arrays)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("performer_a", "y"),
        ("block_t2t_7to10", "relation"),
        ("sinusoid", "50x32"),
        ("threshold_tiny", "threshold"),
        ("schedule", "lr2"),
        ("grid_upsample", "7to10"),
    ],
)
def test_a_wrong_value_fails(tmp_path, capsys, name, output):
    def spoil(arrays):
        flat = arrays[f"{name}/{output}"].reshape(-1)
        flat[len(flat) // 2] += max(1e-6, 1e-6 * abs(flat[len(flat) // 2]))

    write_folder(tmp_path, [name], change_arrays=spoil)
    assert runner.main([str(tmp_path)]) == 1
    assert re.search(rf"FAIL: .*{output}", capsys.readouterr().out)


def test_sums_shapes_and_forgotten_outputs_are_compared(tmp_path, capsys):
    def change(entry):
        outputs = entry["outputs"]
        outputs["x"]["abssum"] *= 1 + 1e-7
        outputs["relation"]["shape"][0] = 3
        outputs["extra"] = outputs["x"]

    write_folder(tmp_path, ["block_t2t_7to10"], change)
    assert runner.main([str(tmp_path)]) == 1  # an output this code does not know is not covered, and says so
    assert "not covered: output extra" in capsys.readouterr().out

    def change_two(entry):
        change(entry)
        del entry["outputs"]["extra"]

    write_folder(tmp_path, ["block_t2t_7to10"], change_two)
    assert runner.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "abssum of x differs" in printed
    assert "relation has shape" in printed


def test_a_wrong_manifest_fails(tmp_path, capsys):
    write_folder(tmp_path, ["sinusoid"])
    manifest = json.loads((VECTORS / "manifest_T2t_vit_7.json").read_text())
    manifest["params"] += 1
    (tmp_path / "manifest_T2t_vit_7.json").write_text(json.dumps(manifest))
    assert runner.main([str(tmp_path)]) == 1
    assert "FAIL: params is 4310222" in capsys.readouterr().out
    (tmp_path / "manifest_T2t_vit_7.json").write_text("{")
    assert runner.main([str(tmp_path)]) == 2


def test_what_nobody_can_run_is_named(tmp_path, capsys):
    def rename(entry):
        entry["name"] = "odd"
        entry["build"] = {"class": "Frobnicator"}

    write_folder(tmp_path, ["performer_a"], rename)
    assert runner.main([str(tmp_path)]) == 1
    assert "not covered: no runner for Frobnicator" in capsys.readouterr().out


def test_settings_that_a_case_states_in_words_are_read(tmp_path, capsys):
    def longer(entry):
        entry["what"] = entry["what"].replace("T_max=60", "T_max=61")

    write_folder(tmp_path, ["transfer_schedule"], longer)
    assert runner.main([str(tmp_path)]) == 1
    assert "lr0 differs" in capsys.readouterr().out

    def sharper(entry):
        entry["input"] = entry["input"].replace("[1,2,3]", "[1,4,3]")

    write_folder(tmp_path, ["threshold_tiny"], sharper)
    assert runner.main([str(tmp_path)]) == 1
    assert "threshold differs" in capsys.readouterr().out


def test_a_backbone_alone_is_the_first_stage_of_a_cascade(tmp_path, capsys):
    """Stage 1 reuses nothing, so its names without their prefix, and its class, make the same case."""
    prefix = "less_less_token."

    def first_stage(entry):
        build = entry["build"]
        build |= {"class": "T2T_ViT", "tokens_type": build["tokens_type"][0]}
        kept = {name: value for name, value in entry["outputs"].items() if name.startswith(prefix)}
        entry["outputs"] = {name.removeprefix(prefix): value for name, value in kept.items()}

    write_folder(tmp_path, ["dvt_t2t_small_nn"], first_stage)
    assert runner.main([str(tmp_path)]) == 1  # weights are drawn by name: other numbers, but every output is compared
    printed = capsys.readouterr().out
    assert all(f"{name} differs" in printed for name in ("features", "relation.first", "relation.last"))

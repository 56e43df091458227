"""The carried reference vectors of ACT, SMYRF and Evo-ViT, and the files beside them."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.tests.reference import read_cases, run_cases
from hourglass_swag.tests import cases as runner
from hourglass_swag.tests.method_cases import more_cases

VECTORS = Path(__file__).parent / "vectors" / "methods"
CASES, STORED = read_cases(VECTORS)
CASES += more_cases(VECTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_vector(case):
    (result,) = run_cases([case], STORED, runner.find_runner)
    assert result.status == "pass", result.reason


def test_every_file_of_the_folder_is_run():
    kinds = {case.build.get("function") for case in CASES}
    files = {path.name for path in VECTORS.iterdir()}
    assert {"file: cost", "file: published", "file: manifest"} <= kinds
    assert {name for name in files if not name.startswith("manifest_")} == {
        "cases.json", "cases.npz", "cli.json", "cost_cases.json", "cost_published.json"
    }  # fmt: skip
    assert "cli" in {case.name for case in CASES}


def test_differences_are_found(tmp_path, capsys):
    """One wrong number in every kind of file, and another seed, draws and clusters that are not there."""
    wanted = ("ada_small", "act_attn_q", "smyrf_attn_even", "evo_block_pruned", "hash_small", "act_model", "evo_model")
    entries = {c["name"]: c for c in json.loads((VECTORS / "cases.json").read_text()) if c["name"] in wanted}
    entries["act_attn_q"]["clusters"]["clusters_q"] += 1
    entries["smyrf_attn_even"]["draws"] = 2
    entries["evo_block_pruned"]["seed"] += 1
    entries["act_model"]["params"] += 1
    arrays = {key: value.copy() for key, value in STORED.items() if key.split("/")[0] in wanted}
    arrays["ada_small/groups"][0, 0] += 1
    arrays["hash_small/hashes"][0, 0] += 1
    arrays["evo_model/cls_attn_before_sort"][0, 0, 0] *= 1 + 1e-6
    (tmp_path / "cases.json").write_text(json.dumps(list(entries.values())))
    np.savez(tmp_path / "cases.npz", **arrays)
    cost = json.loads((VECTORS / "cost_cases.json").read_text())[:1]
    cost[0]["flops"]["bmm"] += 400
    (tmp_path / "cost_cases.json").write_text(json.dumps(cost))
    published = [c for c in json.loads((VECTORS / "cost_published.json").read_text()) if "evo_vit_l16" in c["flags"]]
    published[0]["official_gflops"] += 1e-3
    (tmp_path / "cost_published.json").write_text(json.dumps(published[:1]))
    lines = json.loads((VECTORS / "cli.json").read_text())
    lines[1]["model_kwargs"]["act_q_hashes"] = 17
    (tmp_path / "cli.json").write_text(json.dumps(lines))
    manifest = json.loads((VECTORS / "manifest_act_vit_l16_in1k.json").read_text())
    manifest["state_dict"]["encoder.ln.bias"] = [1023]
    (tmp_path / "manifest_act_vit_l16_in1k.json").write_text(json.dumps(manifest))
    assert runner.main([str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == len(entries) + 4, "\n".join(failed)


@pytest.mark.parametrize("name", ["cost_cases.json", "cli.json"])
def test_a_damaged_file_is_named(tmp_path, capsys, name):
    (tmp_path / "cases.json").write_text("[]")
    np.savez(tmp_path / "cases.npz", nothing=np.zeros(1))
    (tmp_path / name).write_text("{")
    assert runner.main([str(tmp_path)]) == 2
    assert f"{name} is not valid JSON" in capsys.readouterr().err

"""The carried reference vectors, and the runner itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.tests.reference import array, fill_, read_cases, run_cases
from sit.models import LVViT
from sit.tests import cases as runner

VECTORS = Path(__file__).parent / "vectors"
CASES, STORED = read_cases(VECTORS)
# Of the published sizes the smallest alone: filling the others with random numbers takes half a minute. All of them are
# run by `python -m sit.tests.cases sit/tests/vectors`.
QUICK = [case for case in CASES if "factory" not in case.build or case.name == "sit_lvvit_tiny-frd"]


@pytest.mark.parametrize("case", [*QUICK, *runner.more_cases(VECTORS)], ids=lambda case: case.name)
def test_reference_vector(case):
    (result,) = run_cases([case], STORED, runner.find_runner)
    assert result.status == "pass", result.reason


def test_the_runner_finds_what_is_wrong(tmp_path, capsys):
    """A changed output, a changed fact, a missing array, and something that nobody knows how to run."""
    chosen = [case for case in CASES if case.name in ("tsm", "loss-frd", "student-eval", "step-none")]
    arrays = {key: STORED[key].copy() for key in STORED if key.split("/")[0] in {case.name for case in chosen}}
    arrays["tsm/weights"][0, 0, 0] += 1e-6
    arrays["loss-frd/losses"][2] *= 1 + 1e-6
    del arrays["student-eval/tokens_1"]
    entries = [dict(case.raw) for case in chosen]
    step = next(entry for entry in entries if entry["name"] == "step-none")
    entries.append({**step, "name": "other-step", "outputs": [], "printed": "## Using lr", "group_lr": {"rtsm": 1.0}})
    entries.append({"name": "odd", "build": {"cls": "Frobnicator"}})
    (tmp_path / "cases.json").write_text(json.dumps(entries))
    np.savez(tmp_path / "cases.npz", **arrays)
    facts = json.loads((VECTORS / "facts.json").read_text())
    facts["stages"][0]["keeped_patches"][1] += 1
    facts["inat"][0]["samples"][0][1] += 1
    facts["strange"] = [{}]
    sampler = facts["ra_sampler"][2]
    facts["ra_sampler"] = [sampler, {**sampler, "num_samples": 764}]
    manifest = json.loads((VECTORS / "manifest_teacher_lvvit_tiny.json").read_text())
    (tmp_path / "manifest_x.json").write_text(json.dumps(manifest | {"buffers": manifest["buffers"][1:]}))
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    assert runner.main([str(tmp_path)]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "FAIL: weights differs" in lines["tsm"]
    assert "FAIL: losses differs" in lines["loss-frd"]
    assert "FAIL: cases.npz has no array student-eval/tokens_1" in lines["student-eval"]
    assert lines["step-none"].endswith("pass")
    assert "FAIL: printed is" in lines["other-step"]
    assert "rate of rtsm differs" in lines["other-step"]
    assert lines["ra_sampler[0]"].endswith("pass")
    assert "FAIL: num_samples is 765, expected 764" in lines["ra_sampler[1]"]
    assert "FAIL: buffers is" in lines["manifest_x[0]"]
    assert "not covered: no runner for Frobnicator" in lines["odd"]
    assert "FAIL: keeped_patches is [16, 8, 4], expected [16, 9, 4]" in lines["stages[0]"]
    assert "FAIL: samples" in lines["inat[0]"]
    assert "not covered: no runner for facts of strange" in lines["strange[0]"]
    assert runner.main([str(tmp_path), "--only", "step*"]) == 0


def test_rectangular_images_and_what_is_not_covered(tmp_path, capsys):
    """Height before width; a case that nobody can run makes the runner fail."""
    options = {**next(case for case in CASES if case.name == "student-eval").build["kwargs"], "img_size": [32, 48]}
    model = fill_(LVViT(**options).double(), 7).eval()
    images = torch.from_numpy(array("image-32x48", (1, 3, 32, 48), 7))
    with torch.no_grad():
        logits, tokens = model(images)
    case = {
        "name": "wide", "seed": 7, "build": {"cls": "LVViT", "kwargs": options, "mode": "eval"},
        "input": "fill.array('image-32x48', (1, 3, 32, 48), seed)", "outputs": ["logits", "tokens_3"],
        "expect": {"num_patches": 6, "keeped_patches": [6, 3, 1]},
    }  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    np.savez(tmp_path / "cases.npz", **{"wide/logits": logits.numpy(), "wide/tokens_3": tokens[3].numpy()})
    assert runner.main([str(tmp_path)]) == 0
    (tmp_path / "cases.json").write_text(json.dumps([case, {"name": "odd", "build": {"cls": "Frobnicator"}}]))
    assert runner.main([str(tmp_path)]) == 1
    assert "1 passed, 0 failed, 1 not covered" in capsys.readouterr().out

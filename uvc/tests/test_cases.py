"""The carried reference vectors, and the runner itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.tests.reference import array, read_cases, run_cases
from uvc.tests import cases as runner

VECTORS = Path(__file__).parent / "vectors"
CASES, STORED = read_cases(VECTORS)
CASES += runner.more_cases(VECTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_vector(case):
    with runner.float64():
        (result,) = run_cases([case], STORED, runner.find_runner)
    assert result.status == "pass", result.reason


def test_texts_are_read_and_not_assumed(tmp_path, capsys):
    """Other schedules, losses, numbers of one digit and sizes that no text states."""
    entries, arrays = [], {}

    def add(name, like, what=("", ""), build=None, **values):
        (case,) = (case for case in CASES if case.name == like)
        entry = json.loads(json.dumps(dict(case.raw)).replace(*what)) | {"name": name}
        entry["outputs"] = {f"{name}/{output}": [] for output in values}
        entries.append(entry | ({"build": build} if build else {}))
        arrays.update({f"{name}/{output}": np.asarray(value) for output, value in values.items()})

    steps = np.array([0, 1, 2, 3, 4, 5])
    linear = 1e-3 * np.where(steps < 2, steps / 2, (8 - steps) / 6)
    linear[0] = 5e-4  # the first step of the warm-up
    add("stage1_linear", "stage1_iterations", ("cosine with 2", "linear with 2"), lr=linear)
    add(
        "stage1_plain", "stage1_iterations", ("KD soft alpha 0.1, ", ""), lr=[5e-4, *STORED["stage1_iterations/lr"][1:]]
    )
    add("lagrangian_z", "lagrangian_A", ("z=1.7", "z=2"), zloss=STORED["lagrangian_A/zloss"] / 1.7 * 2)
    scores = np.sort(array("least", (7,), 7) ** 2)
    numbers = {"function": "least_s_sum", "s": [0, 2.5, 4]}
    add(
        "least_s_sum_few",
        "least_s_sum",
        build=numbers,
        value=[0, scores[:3].sum(), scores[:4].sum()],
        grad=scores[[0, 3, 4]],
    )
    add(
        "bp_gmp_schedule_one",
        "bp_gmp_schedule",
        ("sparsity 0.6", "sparsity 1"),
        sparsity=STORED["bp_gmp_schedule/sparsity"] / 0.6,
    )
    (tmp_path / "cases.json").write_text(json.dumps(entries))
    np.savez(tmp_path / "cases.npz", **arrays)
    assert runner.main([str(tmp_path)]) == 0, capsys.readouterr().out


def test_a_changed_number_fails_and_other_configurations_are_read(tmp_path, capsys):
    chosen = {
        case.name: case for case in CASES if case.name in ("resource_A_1_gumbel_soft", "optimizer_softl0", "scores_A")
    }
    arrays = {key: STORED[key].copy() for key in STORED if key.split("/")[0] in chosen}
    arrays["optimizer_softl0/z"][-1] *= 1 + 1e-6
    model = {"factory": "DistilledVisionTransformer", "img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1,
             "num_heads": 2, "num_classes": 3, "mlp_ratio": 2, "qkv_bias": False, "enable_dist": 1}  # fmt: skip
    entries = [dict(case.raw) for case in chosen.values()]
    entries += [
        {"name": "model_Z_patch_hard", "build": model, "seed": 5, "input": "fill.image(3, 16, seed=5)",
         "patch_hard": True, "outputs": {"model_Z_patch_hard/logits": [3, 3]}},
        {"name": "scores_Z", "what": "block 0", "build": model, "seed": 5, "outputs": {"scores_Z/odd": [1]}},
        {"name": "frobnicate", "build": {}, "outputs": {}},
    ]  # fmt: skip
    arrays["model_Z_patch_hard/logits"] = np.zeros((3, 3))
    wide = model | {"img_size": [16, 24]}
    for name, text in (
        ("model_wide", "fill.array('image-16x24', (2, 3, 16, 24), seed)"),
        ("compress_wide", "fill.image(2, (16, 24), seed)"),
        ("bp_magnitude_wide", "fill.image(2, (16, 24), seed)"),
        ("vit_plain_wide", "fill.array('image-16x24', (2, 3, 16, 24), seed)"),
    ):
        what = "hidden 8, 1 layers, 2 heads, mlp 16, patch 8"
        outputs = {f"{name}/logits": [2, 3]}
        entries.append(
            {"name": name, "build": wide, "seed": 5, "what": what, "input": text, "density": 1, "outputs": outputs}
        )
        arrays[f"{name}/logits"] = np.zeros((2, 3))
    (tmp_path / "cases.json").write_text(json.dumps(entries))
    np.savez(tmp_path / "cases.npz", **arrays)
    (tmp_path / "manifest_deit_tiny_patch16_224.json").write_text('{"params": 1, "mask_elements": 2, "cls_token": [1]}')
    assert runner.main([str(tmp_path)]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["resource_A_1_gumbel_soft"].endswith("pass")
    assert "FAIL: z differs by" in lines["optimizer_softl0"]
    assert "FAIL: logits differs by" in lines["model_Z_patch_hard"]  # the shape is right, the zeros are not
    for name in ("model_wide", "compress_wide", "bp_magnitude_wide", "vit_plain_wide"):
        assert "FAIL: logits differs by" in lines[name]
    assert "not covered: output odd of scores_Z" in lines["scores_Z"]
    assert "not covered: no runner for frobnicate" in lines["frobnicate"]
    assert "params is 5717681, expected 1" in lines["manifest_deit_tiny_patch16_224"]

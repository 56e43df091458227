"""What the claims are measured with: costs met exactly, mixtures, and all runs at test size."""

from functools import partial
from pathlib import Path

import pytest
import torch

from common.ledger.evidence import Job, load_claims, mixture
from common.tests.few_images import few_images
from uvc import evidence, joint_train, models
from uvc.baseline_scores import magnitude_scores, masks_of, set_masks_
from uvc.evidence import Setup, executed_mmacs, least, neurons_to_remove, omp_density, runs, uniform_
from uvc.models import create
from uvc.models.gates import GatedTransformer, register_masks
from uvc.structure import Structure


@pytest.fixture
def model() -> GatedTransformer:
    torch.manual_seed(0)
    model = register_masks(create(evidence.MODEL, depth=2))
    model.fix_blocks()
    return model


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_uniform_width_is_just_within_the_cost_in_every_block_alike(model, share: float) -> None:
    cost = share * executed_mmacs(model)
    neurons = neurons_to_remove(model, cost)
    uniform_(model, evidence.HEADS_REMOVED, neurons)
    assert executed_mmacs(model) <= cost
    blocks = Structure.from_model(model).blocks
    assert {(len(block.heads), len(block.neurons)) for block in blocks} == {(2, 256 - neurons)}
    uniform_(model, evidence.HEADS_REMOVED, neurons - 1)
    assert executed_mmacs(model) > cost


def test_magnitude_must_empty_whole_rows_to_save(model) -> None:
    cost = 0.5 * executed_mmacs(model)
    density = omp_density(model, cost)
    set_masks_(model, masks_of(magnitude_scores(model), density))
    assert 0.95 * cost < executed_mmacs(model) <= cost
    assert density < 0.1


def test_the_smallest_that_fits_is_found() -> None:
    assert [least(partial(int.__le__, edge), 10) for edge in (0, 1, 7, 10)] == [0, 1, 7, 10]


def test_a_cost_below_the_share_is_read_off_the_line_to_the_dense_network() -> None:
    dense, found = {"mmacs": 10.0, "top1_percent": 90.0}, {"mmacs": 4.0, "top1_percent": 84.0}
    assert mixture(found, dense, 5.0) == {"mmacs": 5.0, "top1_percent": 85.0}
    assert mixture(found, dense, 4.0) == found


def test_the_runs_measure_every_arm_of_the_claims(tmp_path: Path, monkeypatch) -> None:
    make, sizes = models.MODELS[evidence.MODEL]
    monkeypatch.setitem(models.MODELS, evidence.MODEL, (make, {**sizes, "depth": 2}))
    few_images(monkeypatch, tmp_path, train=slice(960), val=slice(100))
    tiny = Setup(dense=1, search=1, tune=1, share=0.8)
    found = {}
    for run in runs(tiny, tiny).values():
        found |= run.measure(Job(0, tmp_path))
    sides = [name for claim in load_claims("uvc") for row in claim.comparisons for name in (*row.arm, *row.against)]
    assert {name.partition("@")[2] for name in sides} == {f"{Setup().share:g}"}
    wanted = [name.replace("@0.5", "@0.8") for name in sides]
    assert set(wanted) <= set(found)
    left = 0.8 * found["dense"]["mmacs"]
    for name in wanted:
        assert found[name]["mmacs"] == pytest.approx(left)
        assert 0 <= found[name]["top1_percent"] <= 100
        assert found[name.replace("@", ": ")]["mmacs"] <= left
    assert {"live: dense", "live: UVC, 0.8 of the cost"} <= set(found)
    assert (tmp_path / "live" / "tuned" / "small.pt2").is_file()
    assert list(evidence.RUNS)[-1] == "live"


def test_both_forms_of_uvc_differ_in_their_gates_alone() -> None:
    setup = Setup()
    plain = joint_train.parse_args(f"{setup.stage1_flags} {evidence.NO_GATES} --model_path x".split())
    gated = joint_train.parse_args(f"{setup.stage1_flags} {evidence.GATES} --model_path x".split())
    differing = {key for key, value in vars(plain).items() if vars(gated)[key] != value}
    assert differing == {"enable_block_gating", "glr", "gating_weight", "gating_interval"}
    assert (setup.search, setup.tune) == (2, 3)  # as the claims say


def test_a_structure_that_never_comes_within_the_share_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evidence, "TRIES", ())
    with pytest.raises(RuntimeError, match=r"came down to 0\.5 of the cost"):
        evidence.Bench(Job(0, tmp_path), Setup()).search("uvc", gates=True)

"""Scores and masks of the baselines, and their command."""

import json
import math

import pytest
import torch

from common.data.build import open_split
from common.measure.flops import CONVENTIONS
from common.run.checkpoint import load_safely, save_atomic
from common.run.errors import DataError
from common.run.settings import DataSettings
from uvc import arguments, baselines
from uvc.baseline_scores import (
    best,
    density_of,
    gmp_sparsity,
    magnitude_scores,
    masks_of,
    prunable,
    set_masks_,
    synflow_scores,
    taylor_scores,
)
from uvc.data import build_transforms, first_of_each_class
from uvc.loading import load_masked
from uvc.models import create
from uvc.models.gates import register_masks
from uvc.removal import compress
from uvc.tests.token_selection import select_best_tokens

SMALL = {"depth": 2, "img_size": 16}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return register_masks(create("deit_desk", **SMALL))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint of a small dense network for the digits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "deit_desk.pth"
    save_atomic({"model": create("deit_desk", depth=2, patch_size=8).state_dict()}, path)
    return path


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_the_density_is_met(model, scope, density):
    set_masks_(model, masks_of(magnitude_scores(model), density, scope=scope))
    layers = len(prunable(model))
    total = sum(layer.weight.numel() for layer in prunable(model).values())
    assert density_of(model) == pytest.approx(density, abs=layers / total)


def test_one_threshold_takes_the_smallest_of_all_layers(model):
    scores = magnitude_scores(model)
    masks = masks_of(scores, 0.3)
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert gone.max() < kept.min()
    assert [m.float().mean().item() for m in masks_of(scores, 0.3, scope="local").values()] == pytest.approx(
        [0.3] * len(scores), abs=0.01
    )


def test_ties_with_the_threshold_go_and_impossible_numbers_are_refused():
    scores = {"a": torch.tensor([1.0, 1.0, 2.0, 3.0])}
    assert masks_of(scores, 0.75)["a"].tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        masks_of(scores, 1.5)
    with pytest.raises(ValueError, match="global or local"):
        masks_of(scores, 0.5, scope="block")  # type: ignore[arg-type]


def test_taylor_is_first_order_in_the_loss(model):
    """The sum of signed g w over a layer is the derivative of the loss by a factor on its weights."""
    model = model.double()
    images, labels = torch.randn(4, 3, 16, 16).double(), torch.tensor([1, 2, 3, 4])
    weight = model.blocks[0].mlp.fc1.weight
    score = taylor_scores(model, [(images, labels)])["blocks.0.mlp.fc1"]
    loss = torch.nn.functional.cross_entropy(model(images)[0], labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(score, (gradient * weight).abs())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_synflow_leaves_the_weights_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = synflow_scores(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(scores) == set(prunable(model))


def test_gradual_pruning_rises_to_its_end():
    steps = range(0, 900, 100)
    course = [gmp_sparsity(step, start=0, interval=100, times=5, final=0.6) for step in steps]
    assert course[0] == 0
    assert course == sorted(course)
    assert course[5:] == pytest.approx([0.6] * 4)


def test_best_keeps_the_highest_rounded_down():
    assert best(torch.tensor([[3.0, 1.0, 2.0]]), 0.7).tolist() == [[True, False, True]]
    assert best(torch.tensor([[3.0, 1.0, 2.0]]), 0.3).tolist() == [[False, False, False]]


def test_selected_tokens():
    torch.manual_seed(0)
    tokens, scores = torch.randn(3, 5, 4), torch.full((3, 5), -50.0)
    scores[:, 3] = 50
    scores.requires_grad_()
    kept = select_best_tokens(tokens, scores, tau=1.0, number=1)
    assert torch.equal(kept[:, [0, 3]], tokens[:, [0, 3]])
    assert kept[:, [1, 2, 4]].abs().max() < 1e-6
    with pytest.raises(ValueError, match="from 1 to 5, got 6"):
        select_best_tokens(tokens, scores, tau=1.0, number=6)


FLAGS = [
    "--model_type", "deit_desk", "--dataset", "digits", "--epochs", "1", "--warmup-epochs", "0", "--num_workers", "0",
    "--train_batch_size", "128", "--device", "cpu", "--mixup", "0", "--cutmix", "0", "--score-images", "256",
]  # fmt: skip


@pytest.mark.parametrize("method", baselines.METHODS)
def test_each_command_trains_under_its_masks(method, dense, tmp_path, capsys):
    words = [method, *FLAGS, "--density", "0.4", "--output_dir", str(tmp_path), "--name", "run"]
    if method == "gradient-sparsity":
        words += ["--log_every_steps".replace("_", "-"), "4"]
    words += ["--model_path", str(dense)]
    if method == "gmp":
        words += ["--t_start", "2", "--delta_t", "3", "--pruning_times", "2"]
    if method == "structured":
        words += ["--attention-density", "0.5", "--mlp-density", "0.25"]
    result = baselines.main(words)
    assert capsys.readouterr().out.splitlines()[-1].startswith("top-1 ")
    state = load_safely(tmp_path / "run" / "last.pth")["model"]
    layers = [name for name in state if name.endswith("weight") and state[name].ndim > 1 and "gumbel" not in name]
    masks = {name: state[f"{name.removesuffix('weight')}mask"] for name in layers}
    if method == "structured":
        assert masks["blocks.0.attn.qkv.weight"][:, 0].sum() == 3 * 2 * 16
        assert masks["blocks.1.mlp.fc2.weight"][0].sum() == 64
        files = (tmp_path / "run" / "deit_desk.pth.tar", dense)
        real, full = (
            CONVENTIONS["uvc"].total(compress(load_masked(file).model).network.count().published) for file in files
        )
        assert result["remaining_cost_percent"] == pytest.approx(100 * real / full, rel=1e-6)
    else:
        kept = sum(mask.sum() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        assert kept == pytest.approx(0.4, abs=1e-4)
    best_file = load_safely(tmp_path / "run" / "deit_desk.pth.tar")["model"]
    assert all(bool((best_file[name][best_file[f"{name[:-6]}mask"] == 0] == 0).all()) for name in layers)
    if method == "gradient-sparsity":
        rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        row = next(row for row in rows if row["event"] == "epoch")
        assert 0 <= row["train_gradient_zero_percent"] <= row["train_gradient_small_percent"] < 50
        assert row["train_images"] == 256  # two batches in a fifth of 1,437 digits, as the release trains it
    assert math.isfinite(result["top1_percent"])


def test_a_run_too_short_for_its_pruning_events_is_refused(dense, tmp_path):
    words = ["gmp", *FLAGS, "--model_path", str(dense), "--output_dir", str(tmp_path), "--t_start", "5"]
    with pytest.raises(baselines.UsageError, match="last event is before step 12, the run has 11 steps"):
        baselines.main([*words, "--delta_t", "2", "--pruning_times", "3"])


def test_without_augmentation_images_are_trained_on_as_they_are_validated():
    for words, plain in ((["--no-aug"], True), ([], False)):
        args = baselines.parse_args(["omp", *FLAGS, "--model_path", "x", *words])
        train, held_out = build_transforms(arguments.post_run(args, args.model_type), 32)
        assert (repr(train) == repr(held_out)) is plain


def test_a_share_of_each_class():
    images = open_split(DataSettings("digits", "", 32, 1), "train", None)
    fifth = first_of_each_class(images, 0.2)
    labels = [images.targets[index] for index in fifth.indices]
    assert len(fifth) == sum(math.ceil(0.2 * images.targets.count(digit)) for digit in range(10))
    assert [labels.count(digit) for digit in range(10)] == [
        math.ceil(0.2 * images.targets.count(digit)) for digit in range(10)
    ]
    assert first_of_each_class(images, 1.0) is images
    with pytest.raises(DataError, match="does not list its labels"):
        first_of_each_class(torch.utils.data.TensorDataset(torch.zeros(3)), 0.5)


def test_without_a_dense_network_random_weights_must_be_asked_for(tmp_path):
    with pytest.raises(baselines.UsageError, match="--model_path is missing"):
        baselines.main(["omp", *FLAGS, "--output_dir", str(tmp_path)])

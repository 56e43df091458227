"""Token labeling: labels follow crops and flips, MixToken swaps what it says, and a teacher learns from label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models._factory import create_model

from common.data.loaders import DataError
from sit import main, token_labeling
from sit.tests.tools import SMALL, miniature_imagenet
from sit.token_labeling import DenseNetwork, draw_box, make_step, mix_box, token_targets


def batch(box, *, flip=False, cells=4):
    """One image whose cells, in columns, are of the classes 0 to 3."""
    columns = torch.arange(cells).expand(cells, cells)
    return {
        "scores": torch.tensor([0.5, 0.25])[:, None, None].expand(2, cells, cells)[None].clone(),
        "classes": torch.stack([columns, columns + 4])[None],
        "box": torch.tensor([box]),
        "flip": torch.tensor([flip]),
        "label": torch.tensor([2]),
    }


def test_targets_are_those_of_the_cells_under_the_crop():
    whole = token_targets(batch([0.0, 0.0, 1.0, 1.0]), 10, 4).view(4, 4, 10)
    assert torch.allclose(whole.sum(-1), torch.ones(4, 4))
    assert whole[1].argmax(-1).tolist() == [0, 1, 2, 3]
    assert torch.allclose(whole[1, 0, 0] / whole[1, 0, 4], torch.tensor(2.0))  # 0.5 against 0.25
    left = token_targets(batch([0.0, 0.5, 0.5, 1.0]), 10, 2).view(2, 2, 10)
    assert left[0].argmax(-1).tolist() == [0, 1]
    flipped = token_targets(batch([0.0, 0.0, 1.0, 1.0], flip=True), 10, 4).view(4, 4, 10)
    assert flipped[1].argmax(-1).tolist() == [3, 2, 1, 0]


def test_mix_swaps_the_box_with_the_mirror():
    grid = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 3)
    mixed = mix_box(grid, (1, 3, 0, 2))
    assert mixed[0, 0].tolist() == [[0, 0, 0], [3, 3, 0], [3, 3, 0]]
    assert mixed[1, 1].tolist() == [[1, 1, 1], [2, 2, 1], [2, 2, 1]]
    assert torch.equal(mix_box(mixed, (1, 3, 0, 2)), grid)


def test_box_share_is_uniform():
    np.random.seed(0)
    boxes = np.array([draw_box(16) for _ in range(3000)])
    assert boxes.min() == 0
    assert boxes.max() == 16
    share = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 256
    assert 0.25 < share.mean() < 0.4  # of 0.5, less what the border cuts off


def test_patches_and_class_are_both_taught():
    torch.manual_seed(0)
    model = create_model("sit_lvvit_desk", distillation_type="none", num_classes=10)
    model.aux_head.requires_grad_(True)
    step = make_step(DenseNetwork(model), 8, 10, smoothing=0.1, dense_weight=0.5)
    labels = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in batch([0.0, 0.0, 1.0, 1.0]).items()}
    terms = step((torch.randn(2, 3, 32, 32), labels))
    assert torch.equal(terms["loss"], terms["loss_cls"] + terms["loss_dense"])
    terms["loss"].backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())


def test_a_slimmed_network_is_refused():
    with pytest.raises(ValueError, match="a token for every patch"):
        DenseNetwork(create_model("sit_lvvit_desk", distillation_type="frd"))


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    folder = miniature_imagenet(tmp_path / "imagenet", train=3, val=1, size=(48, 48))
    for image in (folder / "train").glob("*/*.png"):
        label = int(image.parent.name[1:]) - 1
        path = tmp_path / "maps" / image.parent.name / f"{image.stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = torch.tensor([label, (label + 1) % 3]).float()[:, None, None].expand(2, 6, 6)
        scores = torch.tensor([0.8, 0.1])[:, None, None].expand(2, 6, 6)
        torch.save(torch.stack([scores, numbers]), path)
    return tmp_path


FLAGS = ["--distillation-type", "none", "--mixup", "0", "--cutmix", "0", "--input-size", "64"]


def test_a_teacher_trains_on_label_maps(imagenet: Path) -> None:
    """Through the real entry point; ``aux_head`` changes, and the file is one that a student starts from."""
    words = [*SMALL, *FLAGS, "--data-path", str(imagenet / "imagenet"), "--token-label-data", str(imagenet / "maps")]
    main.main([*words, "--output_dir", str(imagenet / "out")])
    (row,) = [json.loads(line) for line in (imagenet / "out" / "log.txt").read_text().splitlines()]
    assert row["train_loss"] > row["train_loss_cls"] > 0
    content = torch.load(imagenet / "out" / "checkpoint.pth", weights_only=True)
    assert content["model"]["aux_head.bias"].abs().sum() > 0


def test_missing_and_wrong_maps_are_named(imagenet: Path) -> None:
    words = [*SMALL, *FLAGS, "--data-path", str(imagenet / "imagenet"), "--token-label-data"]
    with pytest.raises(DataError, match=r"nowhere: no such folder; it holds CLASS/NAME\.pt"):
        main.main([*words, str(imagenet / "nowhere")])
    torch.save(torch.zeros(2, 5), imagenet / "maps" / "n01" / "0.pt")
    images = token_labeling.LabelledImages.read_map
    dataset = token_labeling.LabelledImages.__new__(token_labeling.LabelledImages)
    dataset.maps = imagenet / "maps"
    with pytest.raises(DataError, match=r"n01/0\.pt: expected a tensor \(2, k, H, W\)"):
        images(dataset, Path("n01/0.png"))
    (imagenet / "maps" / "n01" / "1.pt").unlink()
    with pytest.raises(DataError, match=r"label map of n01/1\.png: .*no such file"):
        images(dataset, Path("n01/1.png"))

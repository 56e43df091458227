"""Images of the mixing: right weights, right places, and a sheet with every panel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from timm.models._factory import create_model

from common.data.loaders import DataError
from common.tests.reference import fill_
from sit import visualize
from sit.models import LVViT
from sit.models.lvvit import build_lvvit


def desk(**options) -> LVViT:
    return fill_(build_lvvit("sit_lvvit_desk", distillation_type="frd", **options), 5)  # pyright: ignore


IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_weights_are_shares_of_the_patches_through_all_modules():
    model = desk()
    stages = visualize.trace_mixing(model, IMAGES)
    shapes = [(stage.block, stage.entering, len(stage.weights)) for stage in stages]
    assert shapes == [(2, 64, 32), (4, 32, 16), (6, 16, 8)]
    for stage in stages:
        assert stage.weights.shape[1] == 64
        assert torch.allclose(stage.weights.sum(1), torch.ones(len(stage.weights)), atol=1e-5)
        assert stage.taken.mean().item() == pytest.approx(1, abs=1e-5)
    assert not model.tsm[0]._forward_hooks  # nothing stays behind


def test_the_first_module_s_map_is_its_mixing_matrix():
    model = desk().eval()
    with torch.no_grad():
        x = model.blocks[1](model.blocks[0](model.embed(IMAGES)))
        expected = model.tsm[0].mixing_weights(x[:, 1:])[0]  # pyright: ignore
    assert torch.allclose(visualize.trace_mixing(model, IMAGES)[0].weights, expected, atol=1e-6)


def test_tokens_shown_are_different():
    weights = torch.eye(6)[[0, 0, 0, 1, 1, 2]]
    chosen = visualize.choose_different(weights, 3)
    assert {int(weights[row].argmax()) for row in chosen} == {0, 1, 2}
    assert len(visualize.choose_different(weights, 99)) == 6


def test_the_brightest_place_is_that_of_the_largest_weight():
    values = torch.zeros(16)
    values[6] = 0.5  # second row, third column
    figure = Figure(figsize=(0.8, 0.8), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    visualize.draw_map(axes, Image.new("RGB", (80, 80), (90, 90, 90)), values, (4, 4))
    axes.axis("off")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int).sum(-1)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (row // 20, column // 20) == (1, 2)


def test_a_sheet_is_written(tmp_path: Path, capsys):
    model = create_model("sit_lvvit_desk", distillation_type="frd", num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "student.pth")
    Image.new("RGB", (50, 40), (200, 80, 40)).save(tmp_path / "photo.png")
    words = ["--model", "sit_lvvit_desk", "--weights", str(tmp_path / "student.pth"), "--num-classes", "10"]
    (file,) = visualize.main([*words, "--tokens", "4", "--output", str(tmp_path / "out"), str(tmp_path / "photo.png")])
    assert file.name == "photo_sit_lvvit_desk.png"
    with Image.open(file) as sheet:
        assert sheet.width >= 6 * visualize.PANEL
        assert sheet.height >= 3 * visualize.PANEL
    assert "after block 2: 64 to 32 tokens" in capsys.readouterr().out


def test_a_teacher_is_refused():
    with pytest.raises(ValueError, match="does not slim its tokens"):
        visualize.trace_mixing(build_lvvit("sit_lvvit_desk", distillation_type=None), IMAGES)


def test_images_inside_scikit_learn_and_a_file_by_name(tmp_path: Path):
    assert visualize.open_image(Path("digit-3")).mode == "RGB"
    assert visualize.open_image(Path("china.jpg")).size == (640, 427)
    with pytest.raises(DataError, match=r"nowhere\.jpg"):
        visualize.open_image(tmp_path / "nowhere.jpg")
    words = ["--model", "sit_lvvit_desk", "--keeping-ratio", "0.7", "--output", str(tmp_path / "plot.png"), "digit-3"]
    assert visualize.main(words) == [tmp_path / "plot.png"]

"""The drawings: channels are what a weight is cut to, and predictions and attention those of the network."""

from pathlib import Path

import pytest
import torch

from common.run.checkpoint import save_atomic
from common.run.errors import UsageError
from scala import visualize
from scala.models_scala import create
from scala.slicing import make_grid


def test_bars_are_the_cuts_of_a_weight(tmp_path: Path) -> None:
    grid = make_grid(0.25, 1.0, 0.125)
    for full, parts in ((32, 1), (96, 3)):
        smallest = set(grid.rule.cut(torch.arange(full), 0.25, 0, parts=parts).tolist())
        for ratio, (first, count, shared) in zip(grid.ratios, visualize.spans(grid, full, parts), strict=True):
            channels = grid.rule.cut(torch.arange(full), ratio, 0, parts=parts).tolist()
            assert channels == list(range(first, first + count))
            assert len(smallest & set(channels)) == shared
    bars = [bar.get_width() for bar in visualize.draw(grid, 32).axes[0].patches]
    assert bars[::2] == [32 * ratio for ratio in grid.ratios]
    file = visualize.main(["--output", str(tmp_path / "channels.png"), "--embed-dim", "48"])
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224_scala", "deit_tiny_distilled_patch16_224_scala"])
def test_widths_of_a_checkpoint_are_drawn(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2}
    model = create(name, img_size=32, num_classes=10, **shape).eval()
    file = tmp_path / "checkpoint.pth"
    arguments = {"model": name, "input_size": 32, "granularity": 0.25, **shape}
    save_atomic({"model": model.state_dict(), "args": arguments}, file)
    words = ["--checkpoint", str(file), "--output", str(tmp_path / "widths.png")]
    if "distilled" in name:
        with pytest.raises(UsageError, match="expected a plain ViT trained on digits"):
            visualize.main(words)
        return
    assert visualize.main(words).read_bytes().startswith(b"\x89PNG")
    images = torch.randn(3, 3, 32, 32)
    predicted, maps = visualize.look(model, images, 0.5)
    assert torch.equal(predicted, model(images, 0.5).argmax(1))
    assert maps.shape == (3, 4, 4)
    assert ((maps > 0) & (maps < 1)).all()
    assert (maps.sum((1, 2)) < 1).all()  # the rest goes to the class token itself

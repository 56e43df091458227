"""The drawing of the channels: what it draws is what a weight is cut to."""

from pathlib import Path

import torch

from scala import visualize
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

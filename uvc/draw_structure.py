"""Draw what of a network survives: heads with their dimensions, neurons and blocks, layer by layer.

    python uvc/draw_structure.py FILE --output structure.png

FILE is a checkpoint of stage 1 or 2, ours or a published one, or a compact network of compress.py. The last line is
the share of the cost that remains by the paper's rules.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.run.cli import make_parser
from common.run.files import check_files, check_output, write_atomic
from common.run.program import run

if TYPE_CHECKING:
    from uvc.structure import Structure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="checkpoint with masks, or FILE.safetensors of compress.py")
    parser.add_argument("--model_type", default="", metavar="NAME", help="architecture (default: as the file says)")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="image to write")
    return parser.parse_args(argv)


def draw_structure(structure: Structure, *, title: str = "") -> bytes:
    """A PNG. A row per block; a head is a box, filled as far as its value dimensions survive; skipped blocks are grey.

    Args:
        structure: what survives.
        title: over the image.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    depth, heads = len(structure.blocks), structure.num_heads
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.2 + 0.32 * depth), sharey=True, width_ratios=(heads, max(heads, 4)), layout="constrained"
    )
    for index, block in enumerate(structure.blocks):
        kept = dict(zip(block.heads, block.dims, strict=True))
        for head in range(heads):
            left.add_patch(Rectangle((head, index - 0.4), 0.92, 0.8, facecolor="none", edgecolor="0.75"))
            share = len(kept.get(head, ())) / structure.head_dim
            color = "tab:blue" if block.runs else "0.85"
            left.add_patch(Rectangle((head, index - 0.4), 0.92 * share, 0.8, facecolor=color, edgecolor="none"))
        share = (len(block.neurons) + len(block.constant_neurons)) / structure.hidden_dim
        right.barh(index, 1, height=0.8, color="none", edgecolor="0.75")
        right.barh(index, share, height=0.8, color="tab:orange" if block.runs else "0.85")
        text = f"{len(block.neurons)} of {structure.hidden_dim}" if block.runs else "skipped"
        right.text(1.02, index, text, va="center", fontsize=8)
    left.set(xlim=(0, heads), ylim=(depth - 0.5, -0.5), xlabel="heads, filled by kept value dimensions", ylabel="block")
    left.set_xticks([head + 0.46 for head in range(heads)], [str(head) for head in range(heads)])
    left.set_yticks(range(depth))
    right.set(xlim=(0, 1.35), xlabel="share of neurons kept")
    right.set_xticks([0, 0.5, 1])
    for axis in (left, right):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    if structure.patches is not None:
        title = f"{title}; {len(structure.patches)} of {structure.num_patches} patches".lstrip("; ")
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def load_structure(file: str, model_type: str = "") -> tuple[Structure, float | None]:
    """What survives by a file, and the remaining share of the cost where it is a masked checkpoint or says it.

    Raises:
        CheckpointError: the file is neither.
    """
    check_files(file)
    from uvc.compact_files import read_description
    from uvc.cost_model import CostModel
    from uvc.loading import load_masked
    from uvc.structure import Structure

    if file.endswith(".safetensors"):
        content = read_description(file)
        return Structure.from_dict(content["structure"]), content.get("costs", {}).get("remaining_percent")
    model = load_masked(file, model_type).model
    structure = Structure.from_model(model)
    return structure, 100 * CostModel(model).of_structure(structure)


def main(argv: Sequence[str] | None = None) -> Structure:
    """Draw; returns what was drawn."""
    args = parse_args(argv)
    check_output(args.output, inputs=[args.file])
    structure, percent = load_structure(args.file, args.model_type)
    running = f"{len(structure.running)} of {len(structure.blocks)} blocks run"
    title = running if percent is None else f"{running}, {percent:.2f} % of the cost remain"
    write_atomic(args.output, draw_structure(structure, title=title))
    print(f"{args.output}: {running}")
    if percent is not None:
        print(f"remaining {percent:.2f} %")
    return structure


if __name__ == "__main__":
    run(main, expected=(OSError,))

"""Draw the image on top of the README: what three methods do to the tokens of one photograph.

    python docs/overview.py             # writes docs/overview.png

The photograph ships with scikit-learn, the networks are ViT-L/16 at 384 x 384 with random weights of a fixed seed: a
random projection keeps distances, so clusters and merged groups follow colour and position, as the README says. Give
``--weights FILE``, a SWAG checkpoint, for what the trained network does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from common.run.flags import make_parser
from hourglass_swag.evaluation import transform_image
from hourglass_swag.models import create
from hourglass_swag.tools.drawing import cut_image, draw_groups, draw_selection
from hourglass_swag.tools.tracing import GONE, KEPT, Grouping, trace

RESOLUTION, PATCHES = 384, 24  # of the networks: side in pixels, patches along it
PANEL = 12 * PATCHES  # pixels of a panel's side
GAP, LABEL = 12, 58  # pixels between panels, and of the two lines below them
METHODS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("Hourglass", "hourglass_vit_l16_in1k", {"clustering_location": 8, "num_cluster": 144}, "{num_cluster} clusters"),
    ("ToMe", "tome_vit_l16_in1k", {"tome_r": 20}, "{left} tokens"),
    ("EViT", "e_vit_l16_in1k", {"base_keep_rate": 0.7, "drop_loc": (6, 12, 18), "score": "cls"}, "{left} patches kept"),
)
"""Name, network of the registry, its options, and what to say of the patches that are left."""


def panels(photograph: Image.Image, weights: str | None, seed: int) -> list[tuple[Image.Image, str, str]]:
    """The input and one panel per method: image, name, number of tokens that are left."""
    image = cut_image(photograph, PANEL)
    drawn = [(image, "input", f"{PATCHES**2} patches")]
    for name, network, options, caption in METHODS:
        torch.manual_seed(seed)
        model = create(
            network, pretrained=weights is not None, weights=weights, image_size=RESOLUTION, **options
        ).eval()
        last = trace(model, transform_image(photograph, RESOLUTION))[-1]
        if isinstance(last, Grouping):
            left, panel = len(last.labels.unique()), draw_groups(image, last.labels)
        else:
            kept = last.states == KEPT
            left, panel = int(kept.sum()), draw_selection(image, torch.where(kept, KEPT, GONE))
        drawn.append((panel, name, caption.format(left=left, **options)))
    return drawn


def join(parts: Sequence[tuple[Image.Image, str, str]]) -> Image.Image:
    """Panels in a row, each above its name and number."""
    sheet = Image.new("RGB", (len(parts) * (PANEL + GAP) - GAP, PANEL + LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, name, number) in enumerate(parts):
        x = i * (PANEL + GAP)
        sheet.paste(image, (x, 0))
        draw.text((x, PANEL + 4), name, (24, 24, 27), ImageFont.load_default(24))
        draw.text((x, PANEL + 32), number, (96, 96, 104), ImageFont.load_default(20))
    return sheet


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw and save; returns the file."""
    parser = make_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--photograph", default="flower.jpg", help="flower.jpg or china.jpg of scikit-learn")
    parser.add_argument("--weights", metavar="FILE", help="SWAG ViT-L/16 checkpoint; without it random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("overview.png"), metavar="FILE")
    args = parser.parse_args(argv)
    photograph = Image.fromarray(load_sample_image(args.photograph))
    join(panels(photograph, args.weights, args.seed)).save(args.output, optimize=True)
    print(f"written to {args.output}")
    return args.output


if __name__ == "__main__":
    main()

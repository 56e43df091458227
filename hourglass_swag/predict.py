"""Classify images with any classifier of hubconf.py.

    python hourglass_swag/predict.py photo.jpg -m vit_l16_in1k
    python hourglass_swag/predict.py a.jpg b.png -m hourglass_vit_l16_in1k -l 8 -n 256 --topk 3 --weights FILE
    cog predict -f hourglass_swag/cog.yaml -i image=@photo.jpg -i model_name=regnety_16gf_in1k

Prints the most probable classes of every image, best first. ``Predictor`` is the same for Cog, with the interface of
the published one: the six plain classifiers, class names as the result. Networks are loaded when first asked for.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _CHECKOUT not in sys.path:
    sys.path.insert(0, _CHECKOUT)  # Cog's image holds the files alone, nothing is installed

from common.run.errors import DataError  # noqa: E402 - from here on, modules found through the line above
from common.run.files import check_files  # noqa: E402
from common.run.flags import make_parser  # noqa: E402
from common.run.program import run  # noqa: E402
from hourglass_swag.models import IMAGENET_CLASSES, create  # noqa: E402
from hourglass_swag.tools.parser import (  # noqa: E402
    HelpFormatter,
    add_any_network_args,
    add_model_args,
    check_method_flags,
    get_model_args,
    parse_any_network,
    trained_resolution,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

try:
    from cog import BasePredictor, Input, Path  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:  # outside Cog the class is an ordinary one, whose arguments have defaults
    if error.name != "cog":
        raise
    BasePredictor, Path = object, pathlib.Path

    def Input(default: Any = None, **_: Any) -> Any:
        """The default of an argument."""
        return default


PLAIN = [
    "vit_h14_in1k",
    "vit_l16_in1k",
    "vit_b16_in1k",
    "regnety_16gf_in1k",
    "regnety_32gf_in1k",
    "regnety_128gf_in1k",
]
"""The classifiers of the published predictor."""

Guess = tuple[str, float]
"""Class name and probability."""


def class_names(number: int) -> list[str]:
    """Names of a classifier's outputs: ImageNet-1K's in the order of its synsets, as timm has them; else numbers."""
    if number != IMAGENET_CLASSES:
        return [str(label) for label in range(number)]
    from timm.data.imagenet_info import ImageNetInfo  # reads files, so not before they are needed

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(number)]


def classify(model: "nn.Module", image: "Image.Image", resolution: int, topk: int) -> list[Guess]:
    """The most probable classes of an image, best first; all of them if there are fewer than ``topk``.

    Raises:
        DataError: if the network's outputs are not finite.
    """
    import torch

    from hourglass_swag.evaluation import transform_image

    parameter = next(model.parameters())
    with torch.inference_mode():
        logits = model(transform_image(image, resolution).to(parameter.device, parameter.dtype))[0].float()
    if not logits.isfinite().all():
        raise DataError("the network gives outputs that are not finite numbers: the weights are damaged")
    best = logits.softmax(0).topk(min(topk, len(logits)))
    names = class_names(len(logits))
    return [(names[index], share) for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


class Predictor(BasePredictor):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Cog's interface. One network is held at a time: all six would take 7.6 GB."""

    loaded: "tuple[str, nn.Module] | None" = None

    def setup(self) -> None:
        """Nothing is loaded before it is known which network is wanted."""
        self.loaded = None

    def load(self, name: str) -> "nn.Module":
        """A classifier, from checkpoints/<name>.torch beside this file or else from torch.hub's cache or address."""
        from common.run.launch import choose_device

        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # make room first
            file = pathlib.Path(__file__).parent / "checkpoints" / f"{name}.torch"
            weights = file if file.is_file() else None
            model = create(name, pretrained=True, weights=weights, image_size=trained_resolution(name))
            self.loaded = name, model.eval().to(choose_device("auto"))
        return self.loaded[1]

    def predict(
        self,
        image: Path = Input(description="image to classify"),  # noqa: B008 - Cog reads it # pyright: ignore[reportInvalidTypeForm, reportUnknownParameterType]
        model_name: str = Input(description="classifier", default="vit_h14_in1k", choices=PLAIN),
        topk: int = Input(description="number of classes to name", default=5, ge=1, le=10),
    ) -> list[str]:
        """Names of the most probable classes, best first.

        Raises:
            ValueError: for another classifier, or a ``topk`` out of range.
        """
        if model_name not in PLAIN:
            raise ValueError(f"model_name must be one of {', '.join(PLAIN)}, got {model_name!r}")
        if not 1 <= topk <= 10:
            raise ValueError(f"topk must be 1 to 10, got {topk}")
        from common.data.images import load_image

        guesses = classify(
            self.load(model_name), load_image(image, skippable=False), trained_resolution(model_name), topk
        )
        return [name for name, _ in guesses]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Images, network, and the flags of its method."""
    parser = make_parser(__doc__, formatter_class=HelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images, in any format that Pillow reads")
    add_any_network_args(parser, default="vit_h14_in1k")
    parser.add_argument("--topk", type=int, default=5, help="number of classes to name")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    add_model_args(parser)
    args = parse_any_network(parser, argv)
    if args.topk < 1:
        parser.error(f"--topk must be at least 1, got {args.topk}")
    return args


def main(argv: Sequence[str] | None = None) -> list[list[Guess]]:
    """Classify the images of a command line; returns what it prints."""
    args = parse_args(argv)
    check_method_flags(args)
    check_files(args.weights)
    from common.data.images import load_image
    from common.run.launch import choose_device

    images = [load_image(path, skippable=False) for path in args.images]
    device = choose_device(args.device)
    model = create(
        args.model,
        pretrained=not args.no_pretrained,
        weights=args.weights,
        image_size=args.resolution,
        **get_model_args(args),
    )
    model = model.eval().to(device)
    if args.no_pretrained and not args.weights:
        print("warning: the weights are random, so the classes mean nothing", file=sys.stderr)
    found = []
    for path, image in zip(args.images, images, strict=True):
        print(f"{path}:")
        found.append(classify(model, image, args.resolution, args.topk))
        for name, share in found[-1]:
            print(f"{100 * share:7.2f} %  {name}")
    return found


if __name__ == "__main__":
    run(main, expected=(ValueError,))

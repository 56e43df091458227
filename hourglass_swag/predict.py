"""Classify pictures with any classifier of hubconf.py.

    python hourglass_swag/predict.py photo.jpg -m vit_l16_in1k
    python hourglass_swag/predict.py a.jpg b.png -m hourglass_vit_l16_in1k -l 8 -n 256 --topk 3 --weights FILE
    cog predict -f hourglass_swag/cog.yaml -i image=@photo.jpg -i model_name=regnety_16gf_in1k

Prints the most probable classes of every picture, best first. ``Predictor`` is the same for Cog, with the interface of
the published one: the six plain classifiers, class names as the result. Networks are loaded when first asked for.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _CHECKOUT not in sys.path:
    sys.path.insert(0, _CHECKOUT)  # Cog's image holds the files alone, nothing is installed

import torch  # noqa: E402 - from here on, modules found through the line above
from PIL import Image, UnidentifiedImageError  # noqa: E402
from torch import nn  # noqa: E402

from common.data.loaders import DataError  # noqa: E402
from common.run.checkpoint import CheckpointError  # noqa: E402
from common.run.errors import LaunchError  # noqa: E402
from common.run.launch import choose_device  # noqa: E402
from hourglass_swag.evaluation import transform_image  # noqa: E402
from hourglass_swag.models import IMAGENET_CLASSES, create  # noqa: E402
from hourglass_swag.tools.parser import (  # noqa: E402
    HelpFormatter,
    add_model_args,
    check_method_flags,
    get_model_args,
    model_choices,
    positionals_first,
)

try:
    from cog import BasePredictor, Input, Path  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:  # outside Cog the class is an ordinary one, whose arguments have defaults
    if error.name != "cog":
        raise
    BasePredictor, Path = object, pathlib.Path

    def Input(default: Any = None, **_: Any) -> Any:
        """The default of an argument."""
        return default


RESOLUTIONS = {"h14": 518, "l16": 512, "b16": 384, "regnety": 384, "desk": 32}
"""Part of a name -> side in pixels at which the published classifier was trained."""

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


def trained_resolution(name: str) -> int:
    """Side in pixels of the images that a classifier of the registry was trained on."""
    return next(side for part, side in RESOLUTIONS.items() if part in name)


def class_names(number: int) -> list[str]:
    """Names of a classifier's outputs: ImageNet-1K's in the order of its synsets, as timm has them; else numbers."""
    if number != IMAGENET_CLASSES:
        return [str(label) for label in range(number)]
    from timm.data.imagenet_info import ImageNetInfo  # reads files, so not before they are needed

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(number)]


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """A picture in RGB.

    Raises:
        DataError: naming the file, if it is missing or is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a picture that Pillow can read") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the picture {path}: {error}") from error


@torch.inference_mode()
def classify(model: nn.Module, picture: Image.Image, resolution: int, topk: int) -> list[Guess]:
    """The most probable classes of a picture, best first; all of them if there are fewer than ``topk``."""
    parameter = next(model.parameters())
    logits = model(transform_image(picture, resolution).to(parameter.device, parameter.dtype))[0]
    best = logits.float().softmax(0).topk(min(topk, len(logits)))
    names = class_names(len(logits))
    return [(names[index], share) for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


class Predictor(BasePredictor):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Cog's interface. One network is held at a time: all six would take 7.6 GB."""

    loaded: tuple[str, nn.Module] | None = None

    def setup(self) -> None:
        """Nothing is loaded before it is known which network is wanted."""
        self.loaded = None

    def load(self, name: str) -> nn.Module:
        """A classifier, from checkpoints/<name>.torch beside this file or else from torch.hub's cache or address."""
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # make room first
            file = pathlib.Path(__file__).parent / "checkpoints" / f"{name}.torch"
            weights = file if file.is_file() else None
            model = create(name, pretrained=True, weights=weights, image_size=trained_resolution(name))
            self.loaded = name, model.eval().to(choose_device("auto"))
        return self.loaded[1]

    def predict(
        self,
        image: Path = Input(description="picture to classify"),  # noqa: B008 - Cog reads it # pyright: ignore[reportInvalidTypeForm]
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
        guesses = classify(self.load(model_name), read_picture(image), trained_resolution(model_name), topk)
        return [name for name, _ in guesses]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Pictures, network, and the flags of its method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, in any format that Pillow reads")
    choices = model_choices()
    parser.add_argument(
        "-m",
        "--model",
        default="vit_h14_in1k",
        choices=choices,
        metavar="NAME",
        help=f"one of {', '.join(choices)}",
    )
    parser.add_argument("-r", "--resolution", type=int, help="side of the input in pixels (default: as trained)")
    parser.add_argument("--topk", type=int, default=5, help="number of classes to name")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint of the published or of torchvision's layout; without it the published file is taken from "
        "torch.hub's cache or downloaded into it",
    )
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")
    add_model_args(parser)
    args = parser.parse_args(positionals_first(sys.argv[1:] if argv is None else argv))
    if args.topk < 1:
        parser.error(f"--topk must be at least 1, got {args.topk}")
    if args.resolution is None:
        args.resolution = trained_resolution(args.model)
    return args


def main(argv: Sequence[str] | None = None) -> list[list[Guess]]:
    """Classify the pictures of a command line; returns what it prints."""
    args = parse_args(argv)
    check_method_flags(args)
    pictures = [read_picture(path) for path in args.images]
    device = choose_device(args.device)
    model = create(
        args.model,
        pretrained=True,
        weights=args.weights,
        image_size=args.resolution,
        **get_model_args(args),
    )
    model = model.eval().to(device)
    found = []
    for path, picture in zip(args.images, pictures, strict=True):
        print(f"{path}:")
        found.append(classify(model, picture, args.resolution, args.topk))
        for name, share in found[-1]:
            print(f"{100 * share:7.2f} %  {name}")
    return found


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataError, LaunchError, NotImplementedError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

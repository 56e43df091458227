"""Images per second of one core: our loaders beside timm's and torchvision's transforms on tensors, recipe by recipe.

    python -m common.loading                     # two photographs that scikit-learn ships, as JPEG
    python -m common.loading --images DIR --output rates.json

All read the same files in this process, one thread, in turns; processor time, medians. *kept* is ours from images that
--cache-decoded keeps. torchvision's take the same steps where it has them, from decode_jpeg on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.ledger.view import markdown_table
from common.run.files import check_output, write_atomic
from common.run.flags import make_parser, positive_int
from common.run.program import run

COLUMNS = ("ours", "timm", "torchvision", "kept")
Pass = Callable[[], Iterable[Any]]
"""Loads every image once."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog="python -m common.loading")
    parser.add_argument("--images", type=Path, help="folder of JPEG files (default: photographs that ship)")
    parser.add_argument("--number", type=positive_int, default=64, metavar="N", help="images of a pass (default: 64)")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="passes of each (default: 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rates as JSON, too")
    return parser.parse_args(argv)


def recipes() -> dict[str, dict[str, Any]]:
    """Name -> our transform, timm's of the same settings, torchvision's on tensors."""
    import torch
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import InterpolationMode, v2

    from common.data.transforms import eval_transform, train_transform

    bicubic: Any = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    crop = [v2.RandomResizedCrop(224, **bicubic), v2.RandomHorizontalFlip()]
    erase = v2.RandomErasing(0.25)
    shared: dict[str, Any] = {"is_training": True, "interpolation": "bicubic"}
    deit: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    plain: dict[str, Any] = {"color_jitter": None}

    def evaluation(size: int, resized: int) -> dict[str, Any]:
        steps = [v2.Resize(resized, **bicubic), v2.CenterCrop(size), *last]
        theirs = create_transform(size, interpolation="bicubic", crop_pct=size / resized)
        return {
            "ours": eval_transform(size, crop_ratio=size / resized),
            "timm": theirs,
            "torchvision": v2.Compose(steps),
        }

    return {
        "DeiT's training (RandAugment, erasing): scala, sit": {
            "ours": train_transform(224),
            "timm": create_transform(224, **shared, **deit),
            "torchvision": v2.Compose([*crop, v2.RandAugment(2, 9), *last, erase]),
        },
        "DeiT III's 3-Augment": {
            "ours": train_transform(224, three_augment=True),
            "timm": create_transform(224, **shared, auto_augment="3a"),
        },
        "crop and flip: uvc": {
            "ours": train_transform(224, auto_augment=None, color_jitter=None, erase_probability=0.0),
            "timm": create_transform(224, **shared, **plain),
            "torchvision": v2.Compose([*crop, *last]),
        },
        "evaluation at 224": evaluation(224, 256),
        "evaluation at 512: hourglass_swag": evaluation(512, 512),
    }


def write_images(folder: Path) -> None:
    """The two photographs of scikit-learn, 640 x 427, as JPEG."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for number, pixels in enumerate(load_sample_images().images):
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def passes(transforms: dict[str, Any], root: Path, kept: Path, number: int) -> dict[str, Pass]:
    """Ways to load ``number`` images with the transforms of a recipe."""
    import torch
    from timm.data.dataset import ImageDataset
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    from common.data.datasets import ClassFolders, DataError, DecodedImages, load_image
    from common.data.loaders import eval_loader

    files = ClassFolders(str(root), loader=load_image).samples

    def repeated(dataset: Any) -> Any:
        return torch.utils.data.Subset(dataset, [i % len(files) for i in range(number)])

    def ours(dataset: Any) -> Pass:
        return lambda: eval_loader(repeated(dataset), batch_size=16)

    def timms() -> Any:
        dataset = ImageDataset(str(root), transform=transforms["timm"])
        return torch.utils.data.DataLoader(repeated(dataset), batch_size=16)

    def tensors() -> Any:
        for i in range(number):
            image = decode_jpeg(read_file(files[i % len(files)][0]), ImageReadMode.RGB)
            yield transforms["torchvision"](image)

    dataset = ClassFolders(str(root), transform=transforms["ours"], loader=load_image)
    ways: dict[str, Pass] = {"ours": ours(dataset), "timm": timms}
    if "torchvision" in transforms:
        ways["torchvision"] = tensors
    with suppress(DataError):  # of a random transform
        ways["kept"] = ours(DecodedImages(dataset, kept))
    return ways


def rates(ways: dict[str, Pass], *, number: int, rounds: int) -> dict[str, float]:
    """Images per second of processor time, medians of passes in turns; one pass of each goes before."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(rounds + 1):
        for name, load in ways.items():
            before = time.process_time()
            for _ in load():
                pass
            if done:
                taken[name].append(time.process_time() - before)
    return {name: number / statistics.median(times) for name, times in taken.items()}


def markdown(folder: Path) -> str:
    """Tables of the files of ``--output`` in a folder."""
    tables: list[str] = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        rows = [
            (name, *(f"{found[way]:.0f}" if way in found else "" for way in COLUMNS))
            for name, found in content["images_per_second"].items()
        ]
        lines = markdown_table(("images a second and core", *COLUMNS), rows)
        versions = f"{content['name']}, torch {content['torch']}, timm {content['timm']}, Pillow {content['pillow']}"
        tables.append("\n".join([*lines, "", f"{content['images']}; {versions}."]))
    return "\n\n".join(tables) or "*Nothing is recorded yet.*"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure, print a table, write the file."""
    args = parse_args(argv)
    check_output(args.output)
    import PIL
    import torch

    from common.measure.benchmark import describe_device

    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as temporary:
        root, kept = Path(temporary, "images"), Path(temporary, "kept")
        (root / "one").mkdir(parents=True)
        if args.images:
            (root / "one").rmdir()
            (root / "one").symlink_to(args.images.resolve())
        else:
            write_images(root / "one")
        print(f"{'images a second and core':52}" + "".join(f"{name:>12}" for name in COLUMNS))
        for name, transforms in recipes().items():
            found[name] = rates(passes(transforms, root, kept, args.number), number=args.number, rounds=args.rounds)
            told = (f"{found[name][way]:12.0f}" if way in found[name] else f"{'':12}" for way in COLUMNS)
            print(f"{name:52}" + "".join(told), flush=True)
    if args.output:
        about = {"images": str(args.images or "scikit-learn's photographs, 640 x 427, JPEG of quality 90")}
        content = {**about, **describe_device("cpu"), "pillow": PIL.__version__, "images_per_second": found}
        write_atomic(args.output, json.dumps(content, indent=1) + "\n")
    return found


if __name__ == "__main__":
    run(main)

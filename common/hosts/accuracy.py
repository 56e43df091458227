"""How right networks are on a folder of classes: by their own head, or by what their features say.

Where the network is a classifier of these classes, that is top-1. Where it is not, a k-nearest-neighbour vote and a
linear probe judge its features: both are fitted on the *dense* network's features of one part of the images, and asked
with each network's features of the other, as a head or an index that exists already would be.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from common.data.build import open_split
from common.data.datasets import SPLIT_NAMES, SkipBadImages
from common.data.loaders import Loader, eval_loader
from common.data.transforms import Transform
from common.hosts.network import floating
from common.run.errors import DataError, UsageError
from common.run.settings import DataSettings

NEIGHBOURS = 5
TOP1, KNN, PROBE = "top1_percent", "knn_percent", "probe_percent"

Features = Callable[[str, Tensor], Tensor]
"""One feature of each image, (B, C), by a network's name and images (B, 3, H, W) on its device."""


def number_of_outputs(net: Any) -> int:
    """Classes of a network's own head; 0 where it has none."""
    if hasattr(net, "config"):
        return net.config.num_labels if "ForImageClassification" in type(net).__name__ else 0
    if isinstance(getattr(net, "num_classes", None), int):
        return net.num_classes
    head = getattr(net, "head", None)
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)] if head is not None else []
    return linear[-1].out_features if linear else 0


def outputs_of_classes(net: Any, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """Which output of a network is which class folder, and why it is known; None where it is not."""
    outputs = number_of_outputs(net)
    if not outputs:
        return None, "the network has no head"
    named = dict(getattr(getattr(net, "config", None), "label2id", None) or {})
    if named and not set(named) <= {f"LABEL_{index}" for index in range(outputs)}:
        if all(name in named for name in classes):
            return [int(named[name]) for name in classes], "outputs by the names in the network's config"
        return None, "the network's config names other classes"
    if outputs == 1000 and not set(classes) - set(synsets := ImageNetInfo().label_names()):
        return [synsets.index(name) for name in classes], "outputs by ImageNet's folder names"
    if outputs == len(classes):
        return list(range(outputs)), f"{outputs} outputs for {outputs} folders, in the order of their names"
    return None, f"the network has {outputs} outputs, the folder {len(classes)} classes"


def _split(data: Path, settings: DataSettings, transform: Transform, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """Images to fit on and to ask for: train/ and val/ where they exist, else halves of each class."""
    from sklearn.model_selection import train_test_split

    if any((data / name).is_dir() for name in SPLIT_NAMES["train"]):
        return open_split(settings, "train", transform), open_split(settings, "val", transform)
    dataset: Any = open_split(settings, "val", transform)
    plain: Any = dataset.dataset if isinstance(dataset, SkipBadImages) else dataset
    labels = [label for _, label in plain.samples]
    if len(set(labels)) < 2:
        raise DataError(
            f"--data {data}: expected at least two classes of images, found {', '.join(plain.classes)} alone"
        )
    if few := [plain.classes[label] for label in sorted(set(labels)) if labels.count(label) < 2]:
        raise DataError(f"--data {data}: class {few[0]!r} has one image, and each needs two: to fit on, and to ask for")
    fit, ask = train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=seed)
    return Subset(dataset, sorted(fit)), Subset(dataset, sorted(ask))


def measure_accuracy(
    networks: Mapping[str, nn.Module],
    features: Features,
    data: Path,
    transform: Transform,
    *,
    dense: str,
    batch_size: int,
    device: torch.device,
    seed: int = 0,
    skip_broken: bool = False,
) -> tuple[dict[str, dict[str, float]], str]:
    """Percent by network, under ``TOP1``, or ``KNN`` and ``PROBE``; and a sentence about what was done.

    Args:
        networks: by name, on ``device``.
        features: see ``Features``.
        data: class folders, or train/ and val/ with such.
        dense: name of the network that the others are compared with.
        seed: of the split, where there is no train/.
        skip_broken: leave out images that cannot be decoded, and say how many.

    Raises:
        DataError: if there are no class folders, or an image is broken.
        UsageError: a network's head is for other classes than the dense network's.
    """
    precision = floating(networks[dense]).dtype
    settings = DataSettings("folder", str(data), 0, batch_size, seed, skip_bad_images=skip_broken)
    held_out: Any = open_split(settings, "val", transform)
    chosen, why = outputs_of_classes(networks[dense], held_out.classes)
    if chosen is not None:
        outputs = number_of_outputs(networks[dense])
        loader, right, seen = eval_loader(held_out, batch_size=batch_size), dict.fromkeys(networks, 0), 0
        for images, labels in tqdm(loader, desc="accuracy", unit="batch", delay=1, leave=False, disable=None):
            seen += len(labels)
            for name, network in networks.items():
                found = logits(network(images.to(device, precision)))
                if found.shape[1] != outputs:
                    raise UsageError(
                        f"--data: {name} has {found.shape[1]} outputs, the dense network {outputs}: name networks "
                        "with heads for the same classes, or leave --data out"
                    )
                right[name] += int((found[:, chosen].argmax(1).cpu() == labels).sum())
        if not seen:
            raise DataError(f"--data {data}: none of its images can be decoded")
        text = f"top-1 of {seen} images ({why})"
        return {name: {TOP1: 100 * number / seen} for name, number in right.items()}, text + _skipped(loader)
    fit, ask = _split(data, settings, transform, seed)
    known, known_labels, skipped = _collect({dense: networks[dense]}, features, fit, "fitting", batch_size, device)
    asked, labels, more = _collect(networks, features, ask, "accuracy", batch_size, device)
    text = (
        f"{NEIGHBOURS} nearest neighbours (cosine) and a linear probe, fitted on the dense network's features of "
        f"{len(known_labels)} images, asked with each network's of {len(labels)} others, as {why}"
    )
    return _probe(known[dense], known_labels, asked, labels), text + (skipped or more)


def logits(output: Any) -> Tensor:
    """Of whatever a classifier returns."""
    return output if isinstance(output, Tensor) else output.logits


def _skipped(loader: Loader) -> str:
    return f"; {loader.skipped} broken images left out" if loader.skipped else ""


def _collect(
    networks: Mapping[str, nn.Module],
    features: Features,
    dataset: Dataset[Any],
    title: str,
    batch_size: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor, str]:
    """Features of every network (N, C), labels (N,), and a word about broken images."""
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    seen: list[Tensor] = []
    loader, precision = eval_loader(dataset, batch_size=batch_size), floating(next(iter(networks.values()))).dtype
    for images, labels in tqdm(loader, desc=title, unit="batch", delay=1, leave=False, disable=None):
        seen.append(labels)
        for name in networks:
            found[name].append(features(name, images.to(device, precision)).float().cpu())
    if not seen:
        raise DataError("--data: none of its images can be decoded")
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(seen), _skipped(loader)


def _probe(known: Tensor, known_labels: Tensor, asked: Mapping[str, Tensor], labels: Tensor) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(known)), metric="cosine")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    judges: dict[str, Any] = {KNN: neighbours, PROBE: probe}
    for judge in judges.values():
        judge.fit(known.numpy(), known_labels.numpy())
    return {
        name: {key: 100 * float(judge.score(each.numpy(), labels.numpy())) for key, judge in judges.items()}
        for name, each in asked.items()
    }

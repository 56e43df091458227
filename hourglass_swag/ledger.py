"""What the ledger asks of this paper: costs, speeds and accuracy of a published row."""

import shlex
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.ledger.speeds import speeds_for_ledger
from common.ledger.tables import Measured, NeedsWeights, Row
from common.ledger.weights import find_weights
from common.measure.benchmark import random_images
from common.measure.flops import Counted, count_parameters, gmacs
from hourglass_swag.models import REGISTRY
from hourglass_swag.models.weights import TORCHVISION_FILES
from hourglass_swag.tools.costs import build_network, count, depends_on_data, noise_image, parse_network
from hourglass_swag.tools.survivors import sharpen_

IMPLIED_TOKENS = {
    "ats-l16-20": 279,
    "ats-l16-18": 353,
    "ats-l16-16": 415,
    "ats-h14-18": 499,
    "ats-h14-16": 513,
    "ats-h14-14": 576,
}
"""Row of ATS -> tokens that survive on average, as its published cost implies."""


def build(row: Row) -> tuple[nn.Module, int]:
    """The row's network, with random weights, on torch's default device, and its resolution in pixels.

    The weights of ATS are such that as many tokens survive as the published cost implies, see ``tools/survivors.py``.
    """
    args = parse_network(row.arguments)
    model = build_network(args)
    if row.id in IMPLIED_TOKENS and torch.get_default_device().type != "meta":
        sharpen_(model, IMPLIED_TOKENS[row.id], random_images(1, args.resolution, torch.get_default_device()))
    return model, args.resolution


def costs(row: Row) -> dict[str, Measured]:
    """Parameters and GMACs of a row, counted on the meta device: nothing is computed and nothing downloaded.

    Raises:
        NeedsWeights: if they depend on the checkpoint and it is not in torch.hub's cache.
    """
    with torch.device("meta"):
        model, resolution = build(row)
    name = parse_network(row.arguments).model
    found = {"params_m": Measured(count_parameters(model) / 1e6, "all parameters", f"parameters of {name}")}
    source = f"one pass of {name} over an image at {resolution}"
    if not depends_on_data(model):
        counted = count(model, torch.empty(1, 3, resolution, resolution, device="meta"))
    elif "gmacs" in row.published:
        counted, source = count_with_weights(row)
    else:
        return found
    convention = row.convention.get("gmacs", "swag")
    found["gmacs"] = Measured(gmacs(counted.published, convention), convention, source)
    found["macs_g"] = Measured(gmacs(counted.executed), "macs", source)
    return found


def count_with_weights(row: Row) -> tuple[Counted, str]:
    """Operations of a row whose cost depends on weights and image, and what they were counted for.

    The image is one of uniform noise, as in the published tool, always the same.

    Raises:
        NeedsWeights: if the checkpoint is not in torch.hub's cache.
    """
    args = parse_network(row.arguments)
    entry = REGISTRY[args.model]
    assert entry.weights is not None
    try:
        file = find_weights(file_names(entry.weights), None)
    except NeedsWeights as missing:
        command = f"python hourglass_swag/get_flops_fps.py {row.arguments} --no-speed --pretrained"
        raise NeedsWeights(command, f"the cost depends on the checkpoint: {missing.reason}") from None
    model = build_network(args, weights=str(file))
    counted = count(model, noise_image(args.resolution))
    return counted, f"one pass of {args.model} with {file.name}, one image of noise at {args.resolution}"


speeds = partial(speeds_for_ledger, build=build)
"""Speed of the rows that share a dense row, each pair in turns; random weights, see ``build``."""


def accuracy(
    row: Row, *, data: Path, weights: Path | None, device: torch.device | str, progress: bool
) -> dict[str, Measured]:
    """Top-1 and top-5 of a row on ImageNet, through the very command of the row.

    Args:
        data: folder that holds val/ or img_val/.
        weights: folder with the checkpoints, of the published or of torchvision's names; None: torch.hub's cache.

    Raises:
        NeedsWeights: if the checkpoint is in neither.
    """
    from hourglass_swag import imagenet_1k_eval

    args = parse_network(row.arguments)
    entry = REGISTRY[args.model]
    assert entry.weights is not None
    file = find_weights(file_names(entry.weights), weights)
    command = ["-b", "256", "--device", str(device), "--weights", str(file), "-p", "10" if progress else "1000000"]
    words = [*shlex.split(row.arguments), *command, str(data)]
    result = imagenet_1k_eval.evaluate_network(imagenet_1k_eval.parse_args(words))
    convention = f"{result['images']} images, {file.name}, float32"
    source = f"imagenet_1k_eval.py {row.arguments}"
    return {name: Measured(result[name], convention, source) for name in ("top1_percent", "top5_percent")}


def file_names(weights: str) -> list[str]:
    """A published checkpoint's own name, and torchvision's if it has one there."""
    return [weights, *filter(None, [TORCHVISION_FILES.get(weights)])]

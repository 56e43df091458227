"""Registry of the networks: one table, name -> class, published weights, number of classes.

    from hourglass_swag.models import create, vit_l16_in1k
    model = create("hourglass_vit_l16_in1k", image_size=512, clustering_location=12, num_cluster=529)
    model = vit_l16_in1k(pretrained=False, image_size=512)

Every name is also a factory of this module (and a torch.hub name).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from common.run.checkpoint import CheckpointError
from hourglass_swag.models.act_vision_transformer import ActViTDesk, ActViTH14, ActViTL16
from hourglass_swag.models.ats_vision_transformer import ATSViTDesk, ATSViTH14, ATSViTL16
from hourglass_swag.models.evit import EViTB16, EViTDesk, EViTH14, EViTL16
from hourglass_swag.models.evo_vit import EvoViTDesk, EvoViTH14, EvoViTL16
from hourglass_swag.models.hourglass_vit import HourglassViTDesk, HourglassViTH14, HourglassViTL16
from hourglass_swag.models.regnet import RegNetY16gf, RegNetY32gf, RegNetY128gf
from hourglass_swag.models.smyrf_vision_transformer import SmyrfViTDesk, SmyrfViTH14, SmyrfViTL16
from hourglass_swag.models.tome_vit import ToMeViTDesk, ToMeViTH14, ToMeViTL16
from hourglass_swag.models.vision_transformer import ViTB16, ViTDesk, ViTH14, ViTL16
from hourglass_swag.models.weights import load_weights, published_weights

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Entry:
    """One row of the registry.

    Attributes:
        model: the class, or a function that builds the network; None for a method that is not implemented yet.
        weights: file name of the published checkpoint; None if there is none.
        num_classes: outputs; None for a trunk that returns features.
        image_size: side in pixels, where it differs from the default of the class.
        fixed: arguments that belong to the name and cannot be changed.
    """

    model: Callable[..., nn.Module] | None
    weights: str | None
    num_classes: int | None = None
    image_size: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


_BEFORE = {"cluster_after_output": False}  # the published rows cluster before the layer

REGISTRY: dict[str, Entry] = {
    # trunks
    "vit_b16": Entry(ViTB16, "vit_b16.torch"),
    "vit_l16": Entry(ViTL16, "vit_l16.torch"),
    "vit_h14": Entry(ViTH14, "vit_h14.torch"),
    # ImageNet-1K classifiers
    "vit_b16_in1k": Entry(ViTB16, "vit_b16_in1k.torch", IMAGENET_CLASSES, image_size=384),
    "vit_l16_in1k": Entry(ViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "vit_h14_in1k": Entry(ViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    # Hourglass
    "hourglass_vit_l16_in1k": Entry(HourglassViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES, fixed=_BEFORE),
    "hourglass_vit_h14_in1k": Entry(HourglassViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES, fixed=_BEFORE),
    # the embedded experiment on digits
    "vit_desk": Entry(ViTDesk, None, 10),
    "hourglass_vit_desk": Entry(HourglassViTDesk, None, 10, fixed=_BEFORE),
    "e_vit_desk": Entry(EViTDesk, None, 10),
    "tome_vit_desk": Entry(ToMeViTDesk, None, 10),
    "ats_vit_desk": Entry(ATSViTDesk, None, 10),
    "act_vit_desk": Entry(ActViTDesk, None, 10),
    "smyrf_vit_desk": Entry(SmyrfViTDesk, None, 10),
    "evo_vit_desk": Entry(EvoViTDesk, None, 10),
    # methods compared with
    "tome_vit_l16_in1k": Entry(ToMeViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "tome_vit_h14_in1k": Entry(ToMeViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    "e_vit_b16_in1k": Entry(EViTB16, "vit_b16_in1k.torch", IMAGENET_CLASSES),
    "e_vit_l16_in1k": Entry(EViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "e_vit_h14_in1k": Entry(EViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    "ats_vit_l16_in1k": Entry(ATSViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "ats_vit_h14_in1k": Entry(ATSViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    "act_vit_l16_in1k": Entry(ActViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "act_vit_h14_in1k": Entry(ActViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    "smyrf_vit_l16_in1k": Entry(SmyrfViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "smyrf_vit_h14_in1k": Entry(SmyrfViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    "evo_vit_l16_in1k": Entry(EvoViTL16, "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "evo_vit_h14_in1k": Entry(EvoViTH14, "vit_h14_in1k.torch", IMAGENET_CLASSES),
    # convolutional networks of SWAG
    "regnety_16gf": Entry(RegNetY16gf, "regnety_16gf.torch"),
    "regnety_32gf": Entry(RegNetY32gf, "regnety_32gf.torch"),
    "regnety_128gf": Entry(RegNetY128gf, "regnety_128gf.torch"),
    "regnety_16gf_in1k": Entry(RegNetY16gf, "regnety_16gf_in1k.torch", IMAGENET_CLASSES, image_size=384),
    "regnety_32gf_in1k": Entry(RegNetY32gf, "regnety_32gf_in1k.torch", IMAGENET_CLASSES, image_size=384),
    "regnety_128gf_in1k": Entry(RegNetY128gf, "regnety_128gf_in1k.torch", IMAGENET_CLASSES, image_size=384),
}


def names(*, classifiers: bool = False) -> list[str]:
    """All names, or those with a classification head, which the command lines offer."""
    return [name for name, entry in REGISTRY.items() if entry.num_classes is not None or not classifiers]


def create(
    name: str,
    *,
    pretrained: bool = False,
    progress: bool = True,
    weights: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network of the registry, with or without weights.

    Args:
        name: a key of ``REGISTRY``.
        pretrained: load the published weights, from torch.hub's cache or downloaded into it.
        progress: show a bar while downloading.
        weights: checkpoint to load instead, of the published or of torchvision's layout, trained at any resolution.
        options: arguments of the class, such as ``image_size``; they win over those of the table.

    Returns:
        The network on torch's default device, in training mode.

    Raises:
        ValueError: unknown name.
        NotImplementedError: a method that is not implemented yet.
        TypeError: an argument that the class does not have, or that belongs to the name.
        CheckpointError: weights that are missing, damaged or do not fit.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown model {name!r}; the names are {', '.join(REGISTRY)}")
    entry = REGISTRY[name]
    if entry.model is None:
        raise NotImplementedError(f"{name}: not implemented yet")
    if fixed := sorted(set(options) & set(entry.fixed)):
        raise TypeError(f"{name} fixes {', '.join(f'{key}={entry.fixed[key]}' for key in fixed)}")
    defaults = {"num_classes": entry.num_classes}
    if entry.image_size is not None:
        defaults["image_size"] = entry.image_size
    arguments = defaults | options | dict(entry.fixed)
    if weights is None and not pretrained:
        return entry.model(**arguments)
    with torch.device("meta"):  # nothing is initialised twice, and an unusable argument fails before any download
        model = entry.model(**arguments)
    if weights is None:
        if entry.weights is None:
            raise CheckpointError(
                f"{name} has no published weights; train it and name them with --weights FILE (in Python weights=FILE),"
                " or use random ones with --no-pretrained (pretrained=False)"
            )
        weights = published_weights(entry.weights, progress=progress)
    load_weights(model, weights)
    return model.to(torch.get_default_device())


def _factory(name: str) -> Callable[..., nn.Module]:
    """The function ``name`` of the published package."""

    def factory(
        pretrained: bool = True, progress: bool = True, weights: str | os.PathLike[str] | None = None, **options: Any
    ) -> nn.Module:
        return create(name, pretrained=pretrained, progress=progress, weights=weights, **options)

    entry = REGISTRY[name]
    what = "not implemented yet" if entry.model is None else entry.model.__name__
    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = (
        f"{name} ({what}; {entry.num_classes or 'no'} classes).\n\n"
        "pretrained: load the published weights; progress: show a bar while downloading; weights: a checkpoint to load "
        "instead; further keywords go to the class, such as image_size."
    )
    return factory


FACTORIES: dict[str, Callable[..., nn.Module]] = {name: _factory(name) for name in REGISTRY}


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """``from hourglass_swag.models import vit_l16_in1k``, for every name."""
    if name in FACTORIES:
        return FACTORIES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Registry of the networks: one table, name -> class, published weights, number of classes.

    from hourglass_swag.models import create, vit_l16_in1k
    model = create("hourglass_vit_l16_in1k", image_size=512, clustering_location=12, num_cluster=529)
    model = vit_l16_in1k(pretrained=False, image_size=512)

Every name is also a factory of this module (and a torch.hub name). A class is imported when it is first wanted, so that
the names cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from common.run.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Entry:
    """One row of the registry.

    Attributes:
        model: the class as "module.Class" of this package, or a function that builds the network.
        weights: file name of the published checkpoint; None if there is none.
        num_classes: outputs; None for a trunk that returns features.
        image_size: side in pixels, where it differs from the default of the class.
        fixed: arguments that belong to the name and cannot be changed.
    """

    model: str | Callable[..., nn.Module]
    weights: str | None
    num_classes: int | None = None
    image_size: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the class."""
        return self.model.rpartition(".")[2] if isinstance(self.model, str) else self.model.__name__

    def build(self, **arguments: Any) -> nn.Module:
        """The network."""
        if not isinstance(self.model, str):
            return self.model(**arguments)
        module, _, name = self.model.partition(".")
        return getattr(import_module(f"{__name__}.{module}"), name)(**arguments)


_BEFORE = {"cluster_after_output": False}  # the published rows cluster before the layer

REGISTRY: dict[str, Entry] = {
    # trunks
    "vit_b16": Entry("vision_transformer.ViTB16", "vit_b16.torch"),
    "vit_l16": Entry("vision_transformer.ViTL16", "vit_l16.torch"),
    "vit_h14": Entry("vision_transformer.ViTH14", "vit_h14.torch"),
    # ImageNet-1K classifiers
    "vit_b16_in1k": Entry("vision_transformer.ViTB16", "vit_b16_in1k.torch", 1000, image_size=384),
    "vit_l16_in1k": Entry("vision_transformer.ViTL16", "vit_l16_in1k.torch", 1000),
    "vit_h14_in1k": Entry("vision_transformer.ViTH14", "vit_h14_in1k.torch", 1000),
    # Hourglass
    "hourglass_vit_l16_in1k": Entry("hourglass_vit.HourglassViTL16", "vit_l16_in1k.torch", 1000, fixed=_BEFORE),
    "hourglass_vit_h14_in1k": Entry("hourglass_vit.HourglassViTH14", "vit_h14_in1k.torch", 1000, fixed=_BEFORE),
    # the embedded experiment on digits
    "vit_desk": Entry("vision_transformer.ViTDesk", None, 10),
    "hourglass_vit_desk": Entry("hourglass_vit.HourglassViTDesk", None, 10, fixed=_BEFORE),
    "e_vit_desk": Entry("evit.EViTDesk", None, 10),
    "tome_vit_desk": Entry("tome_vit.ToMeViTDesk", None, 10),
    "ats_vit_desk": Entry("ats_vision_transformer.ATSViTDesk", None, 10),
    "act_vit_desk": Entry("act_vision_transformer.ActViTDesk", None, 10),
    "smyrf_vit_desk": Entry("smyrf_vision_transformer.SmyrfViTDesk", None, 10),
    "evo_vit_desk": Entry("evo_vit.EvoViTDesk", None, 10),
    # methods compared with
    "tome_vit_l16_in1k": Entry("tome_vit.ToMeViTL16", "vit_l16_in1k.torch", 1000),
    "tome_vit_h14_in1k": Entry("tome_vit.ToMeViTH14", "vit_h14_in1k.torch", 1000),
    "e_vit_b16_in1k": Entry("evit.EViTB16", "vit_b16_in1k.torch", 1000),
    "e_vit_l16_in1k": Entry("evit.EViTL16", "vit_l16_in1k.torch", 1000),
    "e_vit_h14_in1k": Entry("evit.EViTH14", "vit_h14_in1k.torch", 1000),
    "ats_vit_l16_in1k": Entry("ats_vision_transformer.ATSViTL16", "vit_l16_in1k.torch", 1000),
    "ats_vit_h14_in1k": Entry("ats_vision_transformer.ATSViTH14", "vit_h14_in1k.torch", 1000),
    "act_vit_l16_in1k": Entry("act_vision_transformer.ActViTL16", "vit_l16_in1k.torch", 1000),
    "act_vit_h14_in1k": Entry("act_vision_transformer.ActViTH14", "vit_h14_in1k.torch", 1000),
    "smyrf_vit_l16_in1k": Entry("smyrf_vision_transformer.SmyrfViTL16", "vit_l16_in1k.torch", 1000),
    "smyrf_vit_h14_in1k": Entry("smyrf_vision_transformer.SmyrfViTH14", "vit_h14_in1k.torch", 1000),
    "evo_vit_l16_in1k": Entry("evo_vit.EvoViTL16", "vit_l16_in1k.torch", 1000),
    "evo_vit_h14_in1k": Entry("evo_vit.EvoViTH14", "vit_h14_in1k.torch", 1000),
    # convolutional networks of SWAG
    "regnety_16gf": Entry("regnet.RegNetY16gf", "regnety_16gf.torch"),
    "regnety_32gf": Entry("regnet.RegNetY32gf", "regnety_32gf.torch"),
    "regnety_128gf": Entry("regnet.RegNetY128gf", "regnety_128gf.torch"),
    "regnety_16gf_in1k": Entry("regnet.RegNetY16gf", "regnety_16gf_in1k.torch", 1000, image_size=384),
    "regnety_32gf_in1k": Entry("regnet.RegNetY32gf", "regnety_32gf_in1k.torch", 1000, image_size=384),
    "regnety_128gf_in1k": Entry("regnet.RegNetY128gf", "regnety_128gf_in1k.torch", 1000, image_size=384),
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
        TypeError: an argument that the class does not have, or that belongs to the name.
        CheckpointError: weights that are missing, damaged or do not fit.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown model {name!r}; the names are {', '.join(REGISTRY)}")
    entry = REGISTRY[name]
    if fixed := sorted(set(options) & set(entry.fixed)):
        raise TypeError(f"{name} fixes {', '.join(f'{key}={entry.fixed[key]}' for key in fixed)}")
    defaults = {"num_classes": entry.num_classes}
    if entry.image_size is not None:
        defaults["image_size"] = entry.image_size
    arguments = defaults | options | dict(entry.fixed)
    if weights is None and not pretrained:
        return entry.build(**arguments)
    import torch

    from hourglass_swag.models.weights import load_weights, published_weights

    with torch.device("meta"):  # nothing is initialised twice, and an unusable argument fails before any download
        model = entry.build(**arguments)
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
    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = (
        f"{name} ({entry.title}; {entry.num_classes or 'no'} classes).\n\n"
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

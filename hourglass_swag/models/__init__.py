"""Registry of the networks: one table, name -> size, published weights, number of classes, method.

    from hourglass_swag.models import create, vit_l16_in1k
    model = create("hourglass_vit_l16_in1k", image_size=512, clustering_location=12, num_cluster=529)
    model = vit_l16_in1k(pretrained=False, image_size=512)

Every name is also a factory of this module (and a torch.hub name). A network is imported when it is first wanted, so
that the names cost nothing.
"""

from __future__ import annotations

import inspect
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
        size: of ``vision_transformer.SIZES``, or a network of ``regnet.SIZES``.
        weights: file name of the published checkpoint; None if there is none.
        num_classes: outputs; None for a trunk that returns features.
        method: module of this package whose ``published`` makes the network lean; None for a dense one.
        defaults: arguments, where they differ from those of the network and the method.
        fixed: arguments that belong to the name and cannot be changed.
    """

    size: str
    weights: str | None
    num_classes: int | None = None
    method: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **arguments: Any) -> nn.Module:
        """The network; ``arguments`` are those of the backbone and of the method."""
        arguments = {**self.defaults, **arguments}
        if self.size.startswith("regnet"):
            from hourglass_swag.models.regnet import make_regnet

            return make_regnet(self.size, **arguments)
        from hourglass_swag.models.vision_transformer import VisionTransformer, make_vit

        own = inspect.signature(VisionTransformer).parameters
        network = {key: value for key, value in arguments.items() if key in own or self.method is None}
        dense = make_vit(self.size, **network)
        if self.method is None:
            return dense
        settings = {key: value for key, value in arguments.items() if key not in own}
        return import_module(f"{__name__}.{self.method}").published(dense, **settings)


def _method(module: str, sizes: str, desk: Mapping[str, Any] | None = None, **entry: Any) -> dict[str, Entry]:
    """Rows of a method, by size."""
    rows = {size: Entry(size, f"vit_{size}_in1k.torch", IMAGENET_CLASSES, module, **entry) for size in sizes.split()}
    return rows | {"desk": Entry("desk", None, 10, module, {**_DESK, **(desk or {})}, **entry)}


_DESK = {"image_size": 32}  # of the embedded experiment on digits
_BEFORE = {"cluster_after_output": False}  # the published rows cluster before the layer
_METHODS = {
    "hourglass_vit": _method("hourglass_vit", "l16 h14", fixed=_BEFORE),
    "tome_vit": _method("tome_vit", "l16 h14"),
    "e_vit": _method("evit", "b16 l16 h14", {"base_keep_rate": 0.7, "fuse_token": False}),
    "ats_vit": _method("ats_vision_transformer", "l16 h14"),
    "act_vit": _method("act_vision_transformer", "l16 h14"),
    "smyrf_vit": _method("smyrf_vision_transformer", "l16 h14"),
    "evo_vit": _method("evo_vit", "l16 h14"),
}

REGISTRY: dict[str, Entry] = {
    # trunks
    "vit_b16": Entry("b16", "vit_b16.torch"),
    "vit_l16": Entry("l16", "vit_l16.torch"),
    "vit_h14": Entry("h14", "vit_h14.torch"),
    # ImageNet-1K classifiers
    "vit_b16_in1k": Entry("b16", "vit_b16_in1k.torch", IMAGENET_CLASSES, defaults={"image_size": 384}),
    "vit_l16_in1k": Entry("l16", "vit_l16_in1k.torch", IMAGENET_CLASSES),
    "vit_h14_in1k": Entry("h14", "vit_h14_in1k.torch", IMAGENET_CLASSES),
    "vit_desk": Entry("desk", None, 10, defaults=_DESK),
    # the seven methods
    **{
        f"{name}_{size}" if size == "desk" else f"{name}_{size}_in1k": entry
        for name, rows in _METHODS.items()
        for size, entry in rows.items()
    },
    # convolutional networks of SWAG
    **{f"regnety_{size}gf": Entry(f"regnety_{size}gf", f"regnety_{size}gf.torch") for size in (16, 32, 128)},
    **{
        f"regnety_{size}gf_in1k": Entry(
            f"regnety_{size}gf", f"regnety_{size}gf_in1k.torch", IMAGENET_CLASSES, defaults={"image_size": 384}
        )
        for size in (16, 32, 128)
    },
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
    arguments = {"num_classes": entry.num_classes, **options, **entry.fixed}
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
        f"{name} ({entry.num_classes or 'no'} classes).\n\n"
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

"""Names of the gated backbones, and of those that are refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import timm

from common.hosts.opening import create_timm, known_timm
from common.run.errors import UsageError
from common.sizes import DEIT, T2T_VIT, TIMM
from uvc.models.deit import GatedDeiT
from uvc.models.gates import GatedTransformer, check_patches_fill
from uvc.models.t2t_vit import GatedT2TViT
from uvc.models.timm_vit import gate_blocks

DESK = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 64, "depth": 6, "num_heads": 4}

MODELS: dict[str, tuple[Callable[..., GatedTransformer], dict[str, Any]]] = {
    **{
        f"deit_{name}{suffix}_patch16_224": (GatedDeiT, size._asdict() | {"distilled": bool(suffix)})
        for name, size in DEIT.items()
        for suffix in ("", "_distilled")
    },
    **{
        f"t2t_vit_{name}": (GatedT2TViT, size._asdict())
        for name, size in T2T_VIT.items()
        if size.embed_dim % size.num_heads == 0
    },
    "deit_desk": (GatedDeiT, DESK),
    "deit_desk8": (GatedDeiT, {**DESK, "patch_size": 8}),
}
"""Name -> class and its arguments; ``deit_desk`` and ``deit_desk8``, with a quarter of its tokens, are small networks
of ours for the handwritten digits."""


_REFUSED: tuple[tuple[str, str], ...] = (
    (r"(R50-)?ViT-.*", "has no gates (separate q, k and v, no skip logits), so neither stage of UVC runs with it"),
    (
        r"deit_.*_(half|8layer|sp|data)|deit_.*_384",
        "is listed by the release without a configuration; take the network without that suffix at 224",
    ),
    (
        r"t2t_vit_(t_\d+|dense|14_se|16_ghost)",
        "has a token stage whose cost the method does not count; take a Performer one such as t2t_vit_14",
    ),
)


def look_up(name: str) -> tuple[Callable[..., GatedTransformer], dict[str, Any]]:
    """Class and arguments of a network.

    Raises:
        UsageError: a name that is refused, with the reason, or unknown, with the names there are.
    """
    if name in MODELS:
        return MODELS[name]
    for pattern, reason in _REFUSED:
        if re.fullmatch(pattern, name):
            raise UsageError(f"model {name} {reason}")
    raise UsageError(f"unknown model {name!r}; the models are {', '.join(sorted(MODELS))}")


def input_size(name: str) -> int:
    """Side of a network's input in pixels, where nothing else is asked for; raises as ``look_up`` does."""
    if name.startswith(TIMM):
        config: Any = timm.models.get_pretrained_cfg(known_timm(name.removeprefix(TIMM)))
        return config.input_size[-1] if config else 224
    return look_up(name)[1].get("img_size", 224)


def create(name: str, **options: Any) -> GatedTransformer:
    """A backbone with random weights.

    Args:
        name: a key of ``MODELS``, or ``timm:NAME`` for any plain Vision Transformer of timm.
        options: replace the arguments of its class, for instance ``num_classes``; None leaves one as it is.

    Raises:
        UsageError: as ``look_up``; a ``NotAHost`` names the module for which a network of timm cannot be pruned.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if name.startswith(TIMM):
        model = gate_blocks(create_timm(name.removeprefix(TIMM), **options))
        check_patches_fill(model.image_size, model.patch_embed.patch_size[0])
        return model
    make, arguments = look_up(name)
    return make(**arguments | options)

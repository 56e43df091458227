"""Every network of the paper by its published name: a table, which imports no torch until a network is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvt.models.backbone import Backbone
    from dvt.models.cascade import Cascade

STAGE_NAMES = ("less_less_token", "less_token", "normal_token")
"""Names of the stages in the published state dicts, in the order in which they run."""

EXITS = len(STAGE_NAMES)

SUFFIXES = ("_less_less_token", "_less_token", "")
"""Ends of the names of the stages at 7x7, 10x10 and 14x14 tokens."""

PATCHES = (32, 23, 16)
"""Patch sizes that give these grids with DeiT at 224 pixels."""

_T2T: dict[str, dict[str, Any]] = {
    "T2t_vit_7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "T2t_vit_10": {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0},
    "T2t_vit_12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},
    "T2t_vit_14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    "T2t_vit_19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
    "T2t_vit_24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0},
    "T2t_vit_14_resnext": {"embed_dim": 384, "depth": 14, "num_heads": 32, "mlp_ratio": 3.0},
    "T2t_vit_14_wide": {"embed_dim": 768, "depth": 4, "num_heads": 12, "mlp_ratio": 3.0},
}
_DEIT: dict[str, dict[str, Any]] = {
    "deit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "deit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "deit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "deit_base_patch16_384": {"embed_dim": 768, "depth": 12, "num_heads": 12, "img_size": 384},
}
_DESK: dict[str, Any] = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
DESK_PATCHES = (16, 8, 5)
"""Patch sizes of the desk network, ours, for images of 32 pixels: 2x2, 4x4 and 6x6 tokens."""


@dataclass(frozen=True)
class Entry:
    """A registered network.

    Attributes:
        family: ``t2t`` or ``deit``, of all its backbones.
        options: of all of them.
        stages: what each stage of a cascade has of its own; empty for a network with one exit.
    """

    family: str
    options: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def img_size(self) -> int:
        """Side of the images in pixels where nothing else is asked for."""
        return self.options.get("img_size", 224)

    @property
    def exits(self) -> int:
        return len(self.stages) or 1


def _register() -> dict[str, Entry]:
    grids = [{"tokens_type": f"performer{suffix}"} for suffix in SUFFIXES]
    entries = {name: Entry("t2t", {**options, "tokens_type": "performer"}) for name, options in _T2T.items()}
    for depth in (14, 19, 24):
        entries[f"T2t_vit_t_{depth}"] = Entry("t2t", {**_T2T[f"T2t_vit_{depth}"], "tokens_type": "transformer"})
    entries |= {name: Entry("deit", {**options, "patch_size": 16}) for name, options in _DEIT.items()}
    for name in ("T2t_vit_12", "T2t_vit_14"):
        for suffix, grid in zip(SUFFIXES, grids, strict=True):
            entries[name + suffix] = Entry("t2t", {**_T2T[name], **grid})
        entries[f"DVT_{name}"] = Entry("t2t", _T2T[name], tuple(grids))
    entries["T2t_vit_12_4x4"] = Entry("t2t", {**_T2T["T2t_vit_12"], "tokens_type": "performer_4x4"})
    patches = [{"patch_size": patch} for patch in PATCHES]
    for suffix, patch in zip(SUFFIXES, patches, strict=True):
        entries["deit_small" + suffix] = Entry("deit", {**_DEIT["deit_small"], **patch})
    entries["DVT_Deit_small"] = Entry("deit", _DEIT["deit_small"], tuple(patches))
    entries["DVT_desk"] = Entry("deit", _DESK, tuple({"patch_size": patch} for patch in DESK_PATCHES))
    return entries


MODELS: dict[str, Entry] = _register()
"""Published name -> network."""

CASCADES: Sequence[str] = tuple(name for name, entry in MODELS.items() if entry.stages)
"""Names of the networks with three exits."""


def create_model(name: str, **options: Any) -> Cascade | Backbone:
    """Build a network by its published name, with fresh weights.

    Args:
        name: key of ``MODELS``.
        options: of every backbone, such as ``num_classes``, ``img_size``, ``drop_rate`` and ``drop_path_rate``; for a
            cascade also ``feature_reuse`` and ``relation_reuse``.

    Raises:
        ValueError: if there is no such network, or its grids cannot serve ``img_size``.
    """
    from dvt.models.cascade import make_cascade
    from dvt.models.deit import VisionTransformer
    from dvt.models.t2t_vit import T2T_ViT

    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(sorted(MODELS))}")
    entry = MODELS[name]
    make = {"t2t": T2T_ViT, "deit": VisionTransformer}[entry.family]
    settings = {**entry.options, **options}
    if not entry.stages:
        return make(**settings)
    check_size(name, settings.get("img_size", 224))
    return make_cascade(make, entry.stages, **settings)


WORKING_SIZES = {
    "DVT_T2t_vit_12": range(224, 227),
    "DVT_T2t_vit_14": range(224, 227),
    "DVT_Deit_small": range(224, 240),
}
"""Published cascade -> sides of the image, in pixels, at which its grids are the published ones."""


def check_size(name: str, img_size: int | Sequence[int]) -> None:
    """Refuse a size at which a published cascade's grids are not 7x7, 10x10 and 14x14 tokens.

    Raises:
        ValueError: naming the sizes that work.
    """
    sizes = WORKING_SIZES.get(name)
    sides = [img_size] if isinstance(img_size, int) else img_size
    if sizes is not None and not set(sides) <= set(sizes):
        raise ValueError(
            f"{name} has grids of 7x7, 10x10 and 14x14 tokens, which img_size {img_size} does not give; sizes that "
            f"work: {sizes[0]}-{sizes[-1]}"
        )

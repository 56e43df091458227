"""Every network of the paper by its published name: a table, which imports no torch until a network is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_T2T = {
    "T2t_vit_7": (256, 7, 4, 2.0),
    "T2t_vit_10": (256, 10, 4, 2.0),
    "T2t_vit_12": (256, 12, 4, 2.0),
    "T2t_vit_14": (384, 14, 6, 3.0),
    "T2t_vit_19": (448, 19, 7, 3.0),
    "T2t_vit_24": (512, 24, 8, 3.0),
    "T2t_vit_14_resnext": (384, 14, 32, 3.0),
    "T2t_vit_14_wide": (768, 4, 12, 3.0),
}
_DEIT = {
    "deit_small": (384, 12, 6, 4.0),
    "deit_tiny_patch16_224": (192, 12, 3, 4.0),
    "deit_base_patch16_224": (768, 12, 12, 4.0),
    "deit_base_patch16_384": (768, 12, 12, 4.0),
}
"""Width, depth, heads, and hidden width of the MLP over width."""

DESK_PATCHES = (16, 8, 5)
"""Patch sizes of the desk network, ours, for images of 32 pixels: 2x2, 4x4 and 6x6 tokens."""


@dataclass(frozen=True)
class Entry:
    """A registered network."""

    family: str  # t2t or deit, of all its backbones
    options: Mapping[str, Any]  # of all of them
    stages: tuple[Mapping[str, Any], ...] = ()  # what each stage of a cascade has of its own; empty with one exit
    sizes: range = range(0)  # sides in pixels at which a published cascade has its three grids; empty: any

    @property
    def img_size(self) -> int:
        """Side of the images in pixels where nothing else is asked for."""
        return self.options.get("img_size", 224)

    @property
    def exits(self) -> int:
        return len(self.stages) or 1


def _register() -> dict[str, Entry]:
    names: Sequence[str] = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    sizes: dict[str, dict[str, Any]] = {
        name: dict(zip(names, row, strict=True)) for name, row in (_T2T | _DEIT).items()
    }
    performer = {suffix: {"tokens_type": f"performer{suffix}"} for suffix in (*SUFFIXES, "_4x4")}
    patches = {suffix: {"patch_size": patch} for suffix, patch in zip(SUFFIXES, PATCHES, strict=True)}
    entries = {name: Entry("t2t", sizes[name] | performer[""]) for name in _T2T}
    for depth in (14, 19, 24):
        entries[f"T2t_vit_t_{depth}"] = Entry("t2t", sizes[f"T2t_vit_{depth}"] | {"tokens_type": "transformer"})
    entries |= {name: Entry("deit", sizes[name] | patches[""]) for name in _DEIT}
    entries["deit_base_patch16_384"] = Entry("deit", sizes["deit_base_patch16_384"] | patches[""] | {"img_size": 384})
    for name in ("T2t_vit_12", "T2t_vit_14"):
        entries |= {name + suffix: Entry("t2t", sizes[name] | performer[suffix]) for suffix in SUFFIXES}
        grids = tuple(performer[suffix] for suffix in SUFFIXES)
        entries[f"DVT_{name}"] = Entry("t2t", sizes[name], grids, range(224, 227))
    entries["T2t_vit_12_4x4"] = Entry("t2t", sizes["T2t_vit_12"] | performer["_4x4"])
    entries |= {"deit_small" + suffix: Entry("deit", sizes["deit_small"] | patches[suffix]) for suffix in SUFFIXES}
    entries["DVT_Deit_small"] = Entry("deit", sizes["deit_small"], tuple(patches.values()), range(224, 240))
    desk = {"img_size": 32, **dict(zip(names, (64, 2, 4, 2.0), strict=True))}
    entries["DVT_desk"] = Entry("deit", desk, tuple({"patch_size": patch} for patch in DESK_PATCHES))
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
        ValueError: if there is no such network, or its grids cannot serve ``img_size``; the message names sizes that
            work.
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
    size = settings.get("img_size", 224)
    if entry.sizes and not {*([size] if isinstance(size, int) else size)} <= {*entry.sizes}:
        raise ValueError(
            f"{name} has grids of 7x7, 10x10 and 14x14 tokens, which img_size {size} does not give; sizes that work: "
            f"{entry.sizes[0]}-{entry.sizes[-1]}"
        )
    return make_cascade(make, entry.stages, **settings)

"""Every network of the paper by its published name: a table, which imports no torch until a network is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.sizes import DEIT, T2T_VIT, TIMM, Names, Size

if TYPE_CHECKING:
    from dvt.models.backbone import Stage
    from dvt.models.cascade import Cascade

STAGE_NAMES = ("less_less_token", "less_token", "normal_token")
"""Names of the stages in the published state dicts, in the order in which they run."""

EXITS = len(STAGE_NAMES)


def stage_names(exits: int) -> tuple[str, ...]:
    """Names of the stages of a cascade with so many exits."""
    return STAGE_NAMES if exits == EXITS else tuple(f"stage{number}" for number in range(1, exits + 1))


SUFFIXES = ("_less_less_token", "_less_token", "")
"""Ends of the names of the stages at 7x7, 10x10 and 14x14 tokens."""

PATCHES = (32, 23, 16)
"""Patch sizes that give these grids with DeiT at 224 pixels."""

PADDING = {23: 3}
"""Patch size -> padding of the image: 224 + 6 = 10 * 23."""

GRIDS = (7, 10, 14)
"""Tokens along a side of the stages of a network of timm, where nothing else is asked for."""

DESK_STAGES = ({"patch_size": 12, "padding": 2}, {"patch_size": 8}, {"patch_size": 6, "padding": 2})
"""Of the desk network, ours, for images of 32 pixels: 3x3, 4x4 and 6x6 tokens, which grow as the published ones do."""


@dataclass(frozen=True)
class Entry:
    """A registered network."""

    family: str  # t2t, deit or timm, of all its backbones
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
    t2t = {name: size._asdict() for name, size in T2T_VIT.items()}
    tiny, small, base = (DEIT[name]._asdict() for name in ("tiny", "small", "base"))
    performer = {suffix: {"tokens_type": f"performer{suffix}"} for suffix in (*SUFFIXES, "_4x4")}
    patches = {suffix: {"patch_size": patch} for suffix, patch in zip(SUFFIXES, PATCHES, strict=True)}
    entries = {f"T2t_vit_{name}": Entry("t2t", size | performer[""]) for name, size in t2t.items()}
    entries |= {f"T2t_vit_t_{n}": Entry("t2t", t2t[n] | {"tokens_type": "transformer"}) for n in ("14", "19", "24")}
    entries["deit_tiny_patch16_224"] = Entry("deit", tiny | patches[""])
    entries["deit_base_patch16_224"] = Entry("deit", base | patches[""])
    entries["deit_base_patch16_384"] = Entry("deit", base | patches[""] | {"img_size": 384})
    for name in ("12", "14"):
        entries |= {f"T2t_vit_{name}{suffix}": Entry("t2t", t2t[name] | performer[suffix]) for suffix in SUFFIXES}
        grids = tuple(performer[suffix] for suffix in SUFFIXES)
        entries[f"DVT_T2t_vit_{name}"] = Entry("t2t", t2t[name], grids, range(224, 227))
    entries["T2t_vit_12_4x4"] = Entry("t2t", t2t["12"] | performer["_4x4"])
    entries |= {"deit_small" + suffix: Entry("deit", small | patches[suffix]) for suffix in SUFFIXES}
    entries["DVT_Deit_small"] = Entry("deit", small, tuple(patches.values()), range(224, 240))
    desk = {"img_size": 32, **Size(64, 3, 2, 2.0)._asdict(), "feature_channels": 12, "feature_hidden": 32}
    desk |= {"stem": 8, "pos_std": 0.5}  # with which few epochs suffice
    entries["DVT_desk"] = Entry("deit", desk, DESK_STAGES)
    return entries


MODELS: dict[str, Entry] = _register()
"""Published name -> network."""


def find_entry(name: str, grids: Sequence[int] | None = None) -> Entry:
    """A network by its name.

    Args:
        name: key of ``MODELS``, or ``timm:NAME``.
        grids: tokens along a side of the stages of a network of timm; of one, for a network with one exit.

    Raises:
        ValueError: if there is no such network, or it has other grids.
    """
    if name not in Names(MODELS):
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(sorted(MODELS))}, {TIMM}NAME")
    if not name.startswith(TIMM):
        if grids:
            raise ValueError(f"{name} has its own grids: grids belong to {TIMM}NAME")
        return MODELS[name]
    grids = tuple(grids or GRIDS)
    if list(grids) != sorted(set(grids)):
        raise ValueError(f"grids must grow from stage to stage, got {' '.join(map(str, grids))}")
    options: dict[str, Any] = {"name": name.removeprefix(TIMM)}
    if len(grids) == 1:
        return Entry("timm", options | {"grid": grids[0]})
    return Entry("timm", options, tuple({"grid": grid} for grid in grids))


def patch_of(side: int, grid: int) -> tuple[int, int]:
    """Patch size and padding of each side that cut images of ``side`` pixels into ``grid`` patches along a side.

    The smallest that fill them: 32, 23 (padded by 3) and 16 pixels for 7, 10 and 14 at 224, as published.

    Raises:
        ValueError: if there are none, with sizes that work.
    """

    def found(side: int) -> int:
        patch = -(-side // grid)
        patch += (patch * grid - side) % 2
        missing = patch * grid - side
        return 0 if missing % 2 or missing >= 2 * patch else patch  # no patch is all padding

    if side < grid or not (patch := found(side)):
        near = sorted((other for other in range(grid, 1025) if found(other)), key=lambda other: abs(other - side))
        raise ValueError(f"{grid}x{grid} patches do not fill images of {side} pixels; sides that work: {near[:4]}")
    return patch, (patch * grid - side) // 2


CASCADES: Sequence[str] = tuple(name for name, entry in MODELS.items() if entry.stages)
"""Names of the networks with three exits."""


def padding_of(patch_size: int, padding: int | None = None) -> int:
    """Pixels that DeiT adds to each side of an image before it is cut into patches."""
    return PADDING.get(patch_size, 0) if padding is None else padding


def check_filled(name: str, img_size: int | Sequence[int], grids: Sequence[int] | None = None) -> None:
    """Refuse sizes of images that the patches of a DeiT do not fill: pixels would be cut off at the lower right.

    Args:
        name, grids: see :func:`find_entry`.
        img_size: side in pixels, or height and width.

    Raises:
        ValueError: naming the patches, and the nearest sides that work.
    """
    entry = find_entry(name, grids)
    if entry.family == "timm":
        for stage in entry.stages or (entry.options,):
            for side in [img_size] if isinstance(img_size, int) else img_size:
                patch_of(side, stage["grid"])
    if entry.family != "deit":
        return  # soft splits overlap; T2T-ViT checks its own sizes
    patches = [{**entry.options, **stage} for stage in entry.stages or ({},)]
    sides = [(patch["patch_size"], padding_of(patch["patch_size"], patch.get("padding"))) for patch in patches]

    def filled(side: int) -> bool:
        return all(side >= patch and (side + 2 * padding) % patch == 0 for patch, padding in sides)

    for side in [img_size] if isinstance(img_size, int) else img_size:
        if not filled(side):
            working = sorted(filter(filled, range(1, 1025)), key=lambda other: abs(other - side))
            shown = ", ".join(f"{patch}" + f" ({padding} of padding)" * (padding > 0) for patch, padding in sides)
            raise ValueError(
                f"{name}: patches of {shown} pixels do not fill img_size {side}; sizes that work: "
                f"{', '.join(map(str, sorted(working[:4])))}"
            )


def create_model(name: str, *, grids: Sequence[int] | None = None, **options: Any) -> Cascade | Stage:
    """Build a network by its name, with fresh weights.

    Args:
        name, grids: see :func:`find_entry`.
        options: of every backbone, such as ``num_classes``, ``img_size``, ``drop_rate`` and ``drop_path_rate``; for a
            cascade also ``feature_reuse`` and ``relation_reuse``; of one of timm also ``weights`` and ``source``, see
            :func:`dvt.models.timm_stage.make_timm_stage`.

    Raises:
        ValueError: if there is no such network, or its grids cannot serve ``img_size``, or its patches do not fill it
            (the published cascade of DeiTs takes 224 to 239 pixels nevertheless, as the official code); the message
            names sizes that work.
    """
    from dvt.models.cascade import make_cascade
    from dvt.models.deit import VisionTransformer
    from dvt.models.t2t_vit import T2T_ViT

    entry = find_entry(name, grids)
    if options.get("num_classes", 0) < 0:
        raise ValueError(f"num_classes must be at least 0 (features), got {options['num_classes']}")
    if entry.family == "timm":
        from dvt.models.timm_stage import make_timm_stage as make
    else:
        make = {"t2t": T2T_ViT, "deit": VisionTransformer}[entry.family]
    settings = {**entry.options, **options}
    size = settings.get("img_size", 224)
    if not entry.sizes:
        check_filled(name, size, grids)
    if not entry.stages:
        return make(**settings)
    if entry.sizes and not {*([size] if isinstance(size, int) else size)} <= {*entry.sizes}:
        raise ValueError(
            f"{name} has grids of 7x7, 10x10 and 14x14 tokens, which img_size {size} does not give; sizes that work: "
            f"{entry.sizes[0]}-{entry.sizes[-1]}"
        )
    return make_cascade(make, entry.stages, **settings)

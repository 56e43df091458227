"""Networks of SiT: the sizes of LV-ViT, slimmed or not. Importing this module registers them with timm."""

from timm.layers.mlp import Mlp

from sit.models.lvvit import (
    FACTORIES,
    Attention,
    Block,
    LVViT,
    PatchEmbed4CG,
    PatchEmbed6CG,
    PatchEmbedNaive,
    count_published_parameters,
    get_dpr,
)
from sit.models.slimming import ReverseTSM, TokenSlimmingModule, slim_tokens
from sit.sizes import SIZES

__all__ = [
    "SIZES",
    "Attention",
    "Block",
    "LVViT",
    "Mlp",
    "PatchEmbed4CG",
    "PatchEmbed6CG",
    "PatchEmbedNaive",
    "ReverseTSM",
    "TokenSlimmingModule",
    "count_published_parameters",
    "get_dpr",
    "slim_tokens",
    *FACTORIES,
]  # pyright: ignore[reportUnsupportedDunderAll]
globals().update(FACTORIES)

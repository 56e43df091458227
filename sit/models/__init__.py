"""Networks of SiT: the sizes of LV-ViT, slimmed or not. Importing this module registers them with timm."""

from sit.models.lvvit import (
    SIZES,
    Attention,
    Block,
    LVViT,
    PatchEmbed4CG,
    PatchEmbed6CG,
    PatchEmbedNaive,
    count_published_parameters,
    get_dpr,
    sit_lvvit_desk,
    sit_lvvit_large,
    sit_lvvit_medium,
    sit_lvvit_small,
    sit_lvvit_tiny,
    sit_lvvit_xsmall,
)
from sit.models.slimming import Mlp, ReverseTSM, TokenSlimmingModule, slim_tokens

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
    "sit_lvvit_desk",
    "sit_lvvit_large",
    "sit_lvvit_medium",
    "sit_lvvit_small",
    "sit_lvvit_tiny",
    "sit_lvvit_xsmall",
    "slim_tokens",
]

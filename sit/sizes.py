"""Published sizes and training modes as data, which parsing needs to know: nothing here imports torch."""

from collections.abc import Mapping
from typing import Any

TYPES = ("none", "frd")
"""Values of ``distillation_type``: the network without slimming, and the slimmed one."""

COMMON: Mapping[str, Any] = {
    "patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, "keeping_ratio": 0.5, "p_emb": "4c", "skip_lam": 2.0,
}  # fmt: skip

SIZES: Mapping[str, Mapping[str, Any]] = {
    "sit_lvvit_tiny": {"embed_dim": 320, "depth": 14, "num_heads": 5, "stage_blocks": (1, 1, 1, 11)},
    "sit_lvvit_xsmall": {"embed_dim": 384, "depth": 16, "num_heads": 6, "stage_blocks": (1, 1, 1, 13)},
    "sit_lvvit_small": {"embed_dim": 384, "depth": 16, "num_heads": 6, "stage_blocks": (9, 3, 2, 2)},
    "sit_lvvit_medium": {"embed_dim": 512, "depth": 20, "num_heads": 8, "stage_blocks": (10, 4, 3, 3)},
    "sit_lvvit_large": {
        "embed_dim": 768, "depth": 24, "num_heads": 12, "stage_blocks": (10, 4, 3, 7),
        "img_size": 288, "p_emb": "6c", "skip_lam": 3.0, "with_cp": True,
    },
    "sit_lvvit_desk": {
        "embed_dim": 64, "depth": 8, "num_heads": 4, "stage_blocks": (2, 2, 2, 2),
        "img_size": 32, "patch_size": 4, "p_emb": "naive",
    },
    "sit_lvvit_mini": {
        "embed_dim": 64, "depth": 6, "num_heads": 4, "stage_blocks": (1, 1, 1, 3),
        "img_size": 32, "patch_size": 8, "p_emb": "3c",
    },
}  # fmt: skip
"""Name -> what it differs in from ``COMMON``."""

OURS = ("sit_lvvit_desk", "sit_lvvit_mini")
"""Sizes for images of 32 pixels, which are no published rows."""

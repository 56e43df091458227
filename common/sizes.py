"""Names and sizes of the backbones that several papers train. Imports no torch."""

from typing import NamedTuple

TIMM = "timm:"
"""What names begin with that are not published: ``timm:NAME``, any plain Vision Transformer of timm."""


class Names(tuple[str, ...]):
    """Choices of a flag: published names, and any of timm's."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(TIMM) and name != TIMM)


class Size(NamedTuple):
    """Width, depth, heads, and hidden width of the MLP over width."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


DEIT = {"tiny": Size(192, 12, 3, 4.0), "small": Size(384, 12, 6, 4.0), "base": Size(768, 12, 12, 4.0)}
"""arXiv:2012.12877."""

T2T_VIT = {
    "7": Size(256, 7, 4, 2.0),
    "10": Size(256, 10, 4, 2.0),
    "12": Size(256, 12, 4, 2.0),
    "14": Size(384, 14, 6, 3.0),
    "19": Size(448, 19, 7, 3.0),
    "24": Size(512, 24, 8, 3.0),
    "14_resnext": Size(384, 14, 32, 3.0),
    "14_wide": Size(768, 4, 12, 3.0),
}
"""arXiv:2101.11986."""

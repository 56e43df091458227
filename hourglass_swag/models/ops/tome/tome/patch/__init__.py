"""Turn a network into one that merges tokens, in place: ``tome.patch.swag(model)``, ``tome.patch.timm(model)``."""

from .swag import apply_patch as swag
from .timm import apply_patch as timm

__all__ = ["swag", "timm"]

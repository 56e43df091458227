"""Token Merging for Vision Transformers: ``tome.patch.swag(model)`` or ``tome.patch.timm(model)``; ``model.r = 8``.

Paper: Token Merging: Your ViT But Faster, arXiv:2210.09461. Written from the paper; needs torch, NumPy and Pillow.

The package can be installed by itself (setup.py in the folder above, import name ``tome``) and is used from a checkout
as ``hourglass_swag.models.ops.tome``; that is why its imports are relative.
"""

from . import merge, ops, patch, utils, vis
from .utils import benchmark, parse_r
from .vis import generate_colormap, make_visualization

__all__ = ["benchmark", "generate_colormap", "make_visualization", "merge", "ops", "parse_r", "patch", "utils", "vis"]
__version__ = "0.1.0"

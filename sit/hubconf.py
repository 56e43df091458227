"""torch.hub names: every size, slimmed or as its teacher.

    torch.hub.load("sit", "sit_lvvit_small", source="local", weights="checkpoint.pth")
    torch.hub.load("sit", "sit_lvvit_small", source="local", distillation_type=None, weights="teacher.pth")

The first argument is the path of this folder; the package need not be installed. ``deployed=True`` gives logits alone.
"""

import os
import sys

_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _CHECKOUT not in sys.path:
    sys.path.insert(0, _CHECKOUT)

from sit.loading import HUB  # noqa: E402 - found through the line above

dependencies = ["torch", "torchvision", "timm"]

globals().update(HUB)

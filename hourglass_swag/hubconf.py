"""torch.hub names: every network of the registry, re-exported.

    torch.hub.load("hourglass_swag", "hourglass_vit_l16_in1k", source="local", image_size=512,
                   clustering_location=12, num_cluster=529)

The first argument is the path of this folder; the package need not be installed.
"""

import os
import sys

_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _CHECKOUT not in sys.path:
    sys.path.insert(0, _CHECKOUT)

from hourglass_swag.models import FACTORIES  # noqa: E402 - found through the line above

dependencies = ["torch"]

globals().update(FACTORIES)

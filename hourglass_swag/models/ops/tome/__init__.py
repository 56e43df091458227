"""Token merging. The package ``tome`` lies below, so that it can also be installed by itself (``setup.py``).

From a checkout: ``from hourglass_swag.models.ops.tome import patch``; installed: ``from tome import patch``.
"""

from hourglass_swag.models.ops.tome.tome import (
    benchmark,
    generate_colormap,
    make_visualization,
    merge,
    ops,
    parse_r,
    patch,
    utils,
    vis,
)

__all__ = ["benchmark", "generate_colormap", "make_visualization", "merge", "ops", "parse_r", "patch", "utils", "vis"]

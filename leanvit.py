"""Token methods on any Vision Transformer.

    import leanvit, timm
    net = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=448)
    fast = leanvit.lean(net, "tome", r=16)
    fast(images)                # what net(images) returns
    fast.features(images)       # (B, C, H / p, W / p), on the full grid again
    leanvit.explain(net)        # which methods this network can have, or why not
    leanvit.save(fast, "fast.safetensors")
    fast = leanvit.load("fast.safetensors")

    small = leanvit.slice_width(net, 0.5)  # Scala: a width, as a network of the same class
    small = leanvit.prune(net, structure)  # UVC: fewer heads, neurons and blocks, of the same class
    leanvit.cascade([fast, net], [0.9])    # DVT: asks the second only about images that the first is not sure of
    slim = leanvit.load("slim.safetensors")  # SiT: of sit/export.py, a method with the weights that it has learned

The methods themselves, to combine several in one call, are attributes: ``leanvit.ToMe(r=16)``. See ``common.hosts``.
"""

from typing import Any

from common.hosts import Lean, Method, NotAHost, PlanError, explain, lean
from common.hosts.files import load, save
from common.hosts.network import METHODS, TRAINED
from common.hosts.network import load as load_object

__all__ = ["Lean", "Method", "NotAHost", "PlanError", "explain", "lean", "load", "save"]

FROM_PAPERS = {
    "cascade": "dvt.networks:cascade",
    "prune": "uvc.removal:prune",
    "slice_width": "scala.standalone:slice_width",
}
"""Functions from network to network, before any token method."""


def __getattr__(name: str) -> Any:
    """A method's class or a paper's function by its name; imported when asked for."""
    if name in FROM_PAPERS:
        return load_object(FROM_PAPERS[name])
    for place in (*METHODS.values(), *TRAINED.values()):
        if place.endswith(f":{name}"):
            return load_object(place)
    raise AttributeError(f"leanvit has no {name!r}")

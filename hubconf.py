"""torch.hub names of all five papers, and token methods on a network of one's own.

    repo = "."                                                   # a clone of this repository
    fast = torch.hub.load(repo, "lean", net, "tome", r=16, source="local")
    net = torch.hub.load(repo, "hourglass_vit_l16_in1k", source="local", image_size=512, clustering_location=12)
    net = torch.hub.load(repo, "DVT_Deit_small", source="local", weights="dvt.pth.tar")

``torch.hub.list`` and ``torch.hub.help`` of a repository on GitHub show every name and its arguments.
The package need not be installed. Networks have random weights unless ``weights=FILE`` (a path or URL) names a
checkpoint of the paper's programs or a published one; those of hourglass_swag fetch the published file unless
``pretrained=False``.
"""

import os
import sys
from collections.abc import Callable as _Callable
from typing import Any as _Any  # torch.hub lists what has no underscore

_CHECKOUT = os.path.dirname(os.path.abspath(__file__))
if _CHECKOUT not in sys.path:
    sys.path.insert(0, _CHECKOUT)

from common.hosts import explain as explain  # noqa: E402 - found through the lines above
from common.hosts import lean as lean  # noqa: E402
from common.hosts.files import load as _load  # noqa: E402
from common.run.checkpoint import read_checkpoint as _read_checkpoint  # noqa: E402
from dvt.loading import load_network as _load_cascade  # noqa: E402
from dvt.models import CASCADES as _CASCADES  # noqa: E402
from hourglass_swag.models import FACTORIES as _HOURGLASS_SWAG  # noqa: E402
from scala.arguments import DEFAULTS as _SCALA_DEFAULTS  # noqa: E402
from scala.arguments import NetworkSettings as _ScalaSettings  # noqa: E402
from scala.build import NAMES as _SCALA  # noqa: E402
from scala.build import build_model as _build_scala  # noqa: E402
from scala.loading import load_trained as _load_scala  # noqa: E402
from sit.loading import HUB as _SIT  # noqa: E402
from uvc.compact_files import load_compact as _load_compact  # noqa: E402
from uvc.loading import load_masked as _load_masked  # noqa: E402
from uvc.models import MODELS as _UVC  # noqa: E402
from uvc.models import create as _create_uvc  # noqa: E402

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "tqdm"]

_Weights = str | os.PathLike[str] | None


def lean_file(path: str | os.PathLike[str], **options: _Any) -> _Any:
    """A lean network from a file of ``leanvit.save``, weights and methods, in evaluation mode.

    Args:
        path: of the file.
        options: ``network``, one to load into where the file cannot build it; ``device``; ``verify``.
    """
    return _load(path, **options)


def uvc_compact(path: str | os.PathLike[str]) -> _Any:
    """UVC: a plain smaller network from a file of ``uvc/compress.py``, in evaluation mode.

    Args:
        path: of the .safetensors file.
    """
    return _load_compact(path).network


def _named(name: str, text: str, build: _Callable[..., _Any]) -> _Callable[..., _Any]:
    """An entry called ``name``, with a text for ``torch.hub.help``."""

    def entry(pretrained: bool = False, *, weights: _Weights = None, **options: _Any) -> _Any:
        if pretrained and weights is None:
            raise ValueError(f"{name}: no weights are published under a fixed address: give weights=FILE or a URL")
        return build(weights, **options).eval()

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = text
    return entry


def _scala(name: str) -> _Callable[..., _Any]:
    def build(weights: _Weights, *, num_classes: int = 1000, **options: _Any) -> _Any:
        if weights is None:
            bound = {key: _SCALA_DEFAULTS[key] for key in ("smallest_ratio", "largest_ratio")}
            return _build_scala(_ScalaSettings(**{**bound, **options, "model": name}), num_classes)
        return _load_scala(_read_checkpoint(weights), str(weights), flags={**options, "model": name}).model

    text = f"""Scala: {name}, which takes images and a width ratio: net(images, 0.5). In evaluation mode.

    Args:
        weights: a checkpoint of ``scala/main_scala.py`` or of the official trainer; without it they are random.
        num_classes: outputs, without weights (default: 1000).
        options: fields of ``scala.arguments.NetworkSettings``, such as smallest_ratio, granularity and input_size; a
            checkpoint says them itself.
    """
    return _named(name, text, build)


def _dvt(name: str) -> _Callable[..., _Any]:
    def build(weights: _Weights, **options: _Any) -> _Any:
        content = None if weights is None else _read_checkpoint(weights)
        return _load_cascade(name, content, source=weights or "", **options)

    text = f"""DVT: {name}, three exits; net(images) gives the logits of each. In evaluation mode.

    Args:
        weights: a checkpoint of ``dvt/main.py`` or a published one; without it they are random.
        options: of ``dvt.models.create_model``, such as num_classes, img_size, feature_reuse and relation_reuse.
    """
    return _named(name, text, build)


def _uvc(name: str) -> _Callable[..., _Any]:
    def build(weights: _Weights, **options: _Any) -> _Any:
        return _create_uvc(name, **options) if weights is None else _load_masked(weights, name, **options).model

    text = f"""UVC: {name} with the gates of the method, masked as its checkpoint says. In evaluation mode.

    Args:
        weights: a checkpoint of ``uvc/joint_train.py`` or ``uvc/post_train.py``, or a published one; without it they
            are random and nothing is masked.
        options: without weights arguments of the class, such as num_classes and img_size; with weights ``patch``, how
            patch gates act. For the plain smaller network see ``uvc/compress.py`` and ``uvc_compact``.
    """
    return _named(f"uvc_{name}", text, build)


globals().update(_HOURGLASS_SWAG)
globals().update(_SIT)
globals().update({name: _scala(name) for name in _SCALA})
globals().update({name: _dvt(name) for name in _CASCADES})
globals().update({f"uvc_{name}": _uvc(name) for name in _UVC})

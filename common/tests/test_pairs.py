"""Slice or prune first, then a token method: what goes together, and what is refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.hosts import NotAHost, PlanError, lean
from common.hosts.network import make_method
from dvt.models.cascade import make_cascade
from dvt.models.deit import VisionTransformer as DvtDeiT
from scala.models_scala import VisionTransformer_scala
from scala.standalone import describe, standalone_state
from sit.models.lvvit import LVViT
from sit.models.timm_vit import make_plain, slim
from uvc.compact_files import to_timm
from uvc.removal import compress
from uvc.tests.random_structures import random_network

METHODS = ("tome", "hourglass", "evit", "evo_vit", "ats", "act", "smyrf")
PRUNED = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10}


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sliced() -> tuple[Any, Tensor]:
    """A slice as a network of its own, and what the sliced network says to ``images(16)``."""
    torch.manual_seed(0)
    model: Any = VisionTransformer_scala(img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=4, num_classes=10)
    model = model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        return describe(model, 0.5).load(standalone_state(model, 0.5)).double(), model(images(16), 0.5)


def pruned() -> tuple[Any, Tensor]:
    """A compact network as timm's modules, and what the compact network says."""
    model, _, _ = random_network(5, **PRUNED)
    network = compress(model, multiple=8).network
    with torch.no_grad():
        return to_timm(network), network(images(16))


@pytest.mark.parametrize("make", [sliced, pruned])
@pytest.mark.parametrize("method", METHODS)
def test_slice_or_prune_then_a_token_method(make: Any, method: str) -> None:
    net, expected = make()
    with torch.no_grad():
        torch.testing.assert_close(lean(net)(images(16)), expected, rtol=1e-4, atol=1e-6)  # files hold float32
        settings = {"cluster_size": 4} if method == "smyrf" else {}
        fast = lean(net, method, **settings)
        assert fast(images(16)).shape == expected.shape
        features = fast.features(images(16))
    assert features.shape[2:] == (4, 4)
    assert features.isfinite().all()


SLIMMED = {
    "tome": {"r": [0, 0, 0, 2, 2, 2]},
    "hourglass": "hourglass at layer 1 breaks the grid that slim needs at layer 3",
    "evit": {"layers": (4, 5)},
    "evo_vit": "evo_vit at layer 2 breaks the grid that slim needs at layer 3",
    "ats": {"layers": (5,)},
    "act": {},
    "smyrf": {"cluster_size": 4},
}
"""Method -> settings with which it goes with slimming before layers 3, 4 and 5, or why its default does not."""


@pytest.mark.parametrize("method", METHODS)
def test_slim_then_a_token_method(method: str) -> None:
    torch.manual_seed(0)
    net = make_plain("test_vit", img_size=16, patch_size=4, num_classes=10)
    student = slim(net, keeping_ratio=0.8).double().eval()
    settings = SLIMMED[method]
    if isinstance(settings, str):
        with pytest.raises(PlanError, match=settings):
            lean(student.restore(), *student.methods, make_method(method, {}))
        return
    fast = lean(student.restore(), *student.methods, make_method(method, settings))
    with torch.no_grad():
        assert fast(images(16)).shape == (2, 10)
        features = fast.features(images(16))
    assert features.shape[2:] == (4, 4)
    assert features.isfinite().all()
    if method in ("tome", "evit"):
        assert fast.tokens_per_layer(images(16))[-1] < student.tokens_per_layer()[-1]


def test_networks_that_change_their_tokens_themselves_are_refused() -> None:
    cascade = make_cascade(
        DvtDeiT, [{"patch_size": size} for size in (16, 8, 8)], img_size=32, embed_dim=32, depth=3, num_heads=2
    )
    slimmed = LVViT(img_size=32, patch_size=16, embed_dim=32, num_heads=2)
    for net in (cascade, cascade.stages[0], slimmed):  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(NotAHost, match=f"{type(net).__name__} is not a host"):
            lean(net, "tome")

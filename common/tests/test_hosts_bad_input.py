"""What cannot work is said before any image is read; what is odd works: one token, odd sizes, too much to reduce."""

import copy
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from common.hosts import NotAHost, PlanError, lean
from common.hosts.network import make_method
from common.tests.small_methods import Halve

TINY = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
WITHOUT_PREFIX = {"class_token": False, "global_pool": "avg"}
ACTING = ("tome", "hourglass", "evit")


def build(kind: Any = VisionTransformer, **options: Any) -> Any:
    torch.manual_seed(0)
    net = kind(**TINY | options) if kind is not TorchvisionViT else kind(40, 8, 4, 2, 32, 64, num_classes=5)
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.1)
    return net


def images(*size: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*size, dtype=torch.float64)


def unreadable(**options: Any) -> Any:
    """A network that must not be run."""
    net = build(**options)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("an image was read")

    net.patch_embed.forward = fail
    return net


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        (("tom",), {}, "no method 'tom', did you mean 'tome'"),
        (("",), {}, "no method ''; the methods are tome, "),
        (("tome:r=3",), {}, "no method 'tome:r=3', did you mean 'tome'"),
        ((["tome", "evit"],), {}, "expected a method with its settings"),
        (("hourglass",), {"cluster": 4}, "hourglass has no setting 'cluster', did you mean 'clusters'"),
        (("evit",), {"keep_rate": 0.5}, "evit has no setting 'keep_rate'"),
        (("tome",), {"r": 1.5}, "r must be a whole number or a tuple of 2 numbers or a list"),
        (("tome",), {"r": "3"}, "got '3', did you mean 3"),
        (("tome",), {"r": True}, "got True, did you mean 1"),
        (("tome",), {"r": -2}, "r must be at least 0"),
        (("tome",), {"r": (3, 5.0)}, "inflection of r must be between -1 and 1"),
        (("tome",), {"r": [1] * 5}, "r holds 5 numbers for 4 layers"),
        (("evit",), {"keep": float("nan")}, r"keep .*must be in \(0, 1\], got nan"),
        (("evit",), {"keep": "0.5"}, "keep"),
        (("evit",), {"layers": (-1,)}, "0 to 3, got -1"),
        (("evit",), {"layers": "12"}, "layers"),
        (("hourglass",), {"clusters": 100}, r"clusters must be 1 to \(5, 5\)"),
        (("hourglass",), {"clusters": (5, 6)}, r"clusters must be 1 to \(5, 5\)"),
        (("hourglass",), {"clusters": (2.0, 2)}, "clusters must be a whole number or a tuple of 2 whole"),
        (("hourglass",), {"clusters": 0}, "clusters"),
        (("hourglass",), {"layer": 4}, "0 to 3, got 4"),
        (("hourglass",), {"layer": "1"}, "layer"),
        (("hourglass",), {"window": 4}, "window"),
        ((Halve(layer=7),), {}, "halve acts at layer 7, but .* has layers 0 to 3"),
        ((Halve(layer=1.0),), {}, "halve: layer must be a whole number, got 1.0, did you mean 1"),
    ],
)  # fmt: skip
def test_refused_before_an_image_is_read(methods: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lean(unreadable(), *methods, **settings)


def test_methods_that_do_not_go_together_are_refused_before_an_image_is_read() -> None:
    pairs = [("tome", {"r": [2, 0, 0, 0]}), ("hourglass", {"layer": 2})]
    with pytest.raises(PlanError, match="tome at layer 0 breaks the grid that hourglass needs at layer 2"):
        lean(unreadable(), *(make_method(name, settings) for name, settings in pairs))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("vit_small_patch16_224", "is a name: build the network first, such as timm.create_model"),
        (None, "NoneType is not a host"),
        (nn.DataParallel(nn.Linear(1, 1)), "DataParallel wraps a network: give the network itself"),
        (torch.compile(nn.Linear(1, 1)), "OptimizedModule wraps a network"),
        (VisionTransformer(depth=0, embed_dim=8, num_heads=1), "VisionTransformer has no blocks"),
        (nn.Sequential(nn.Linear(1, 1)), "Sequential is not a host; known are timm's"),
    ],
)
def test_what_is_no_network_is_named(net: Any, message: str) -> None:
    with pytest.raises(NotAHost, match=message):
        lean(net, "tome")


@pytest.mark.parametrize("method", ACTING)
@pytest.mark.parametrize(
    "options",
    [
        {"img_size": 8},
        {"img_size": 8, **WITHOUT_PREFIX},
        {"img_size": (8, 40)},
        {"img_size": (16, 8), **WITHOUT_PREFIX},
        {"img_size": (24, 56), "reg_tokens": 3},
        {"depth": 1},
    ],
    ids=str,
)
def test_small_and_odd_networks(options: dict[str, Any], method: str) -> None:
    """One patch, one row, one layer."""
    net = build(**options)
    fast = lean(net, method)
    rows, columns = net.patch_embed.grid_size
    for batch in (1, 2):
        shape = images(batch, 3, *net.patch_embed.img_size)
        assert fast(shape).shape == (batch, 5)
        features = fast.features(shape)
        assert features.shape == (batch, 32, rows, columns)
        assert features.isfinite().all()


@pytest.mark.parametrize("replace", [
    lambda net, fast: net.blocks.__setitem__(0, nn.Identity()),
    lambda net, fast: fast.blocks.append(copy.deepcopy(fast.blocks[0])),
    lambda net, fast: setattr(fast, "blocks", copy.deepcopy(fast.blocks)),
])  # fmt: skip
def test_blocks_that_were_replaced_do_not_go_on_as_the_old_ones(replace: Any) -> None:
    net = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    fast, images = lean(net, "tome", r=1), torch.zeros(1, 3, 16, 16)
    assert copy.deepcopy(fast)(images).shape == (1, 3)
    replace(net, fast)
    for call in (fast, fast.features, fast.tokens_per_layer):
        with pytest.raises(NotAHost, match="blocks: modules were replaced since lean was called"):
            call(images)


def test_more_than_there_is_to_reduce() -> None:
    assert lean(build(), "tome", r=10**9).tokens_per_layer() == [26, 14, 8, 5, 3]
    assert lean(build(), "evit", keep=1e-9, layers=(0,)).tokens_per_layer()[1:] == [2, 2, 2, 2]
    assert lean(build(), "hourglass", clusters=1, layer=0).tokens_per_layer() == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("method", ACTING)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (VisionTransformer, {"reg_tokens": 2}),
        (VisionTransformer, WITHOUT_PREFIX),
        (Eva, {"use_rot_pos_emb": True}),
        (Eva, {"use_rot_pos_emb": True, "rope_type": "mixed"}),
        (TorchvisionViT, {}),
    ],
)
def test_what_is_wrong_with_an_image_stays_in_it(kind: Any, options: dict[str, Any], method: str) -> None:
    fast, batch = lean(build(kind, **options), method), images(3, 3, 40, 40)
    expected, features = fast(batch), fast.features(batch)
    torch.testing.assert_close(fast(batch[1:2]), expected[1:2], rtol=0, atol=1e-11)
    for value in (torch.nan, torch.inf):
        batch[0, 0, 3, 3] = value
        torch.testing.assert_close(fast(batch)[1:], expected[1:], rtol=0, atol=1e-11)
        torch.testing.assert_close(fast.features(batch)[1:], features[1:], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "message"), [((0, 3, 40, 40), "the batch is empty"), ((3, 40, 40), "a tensor of 3 dimensions")]
)
def test_no_images(size: tuple[int, ...], message: str) -> None:
    fast = lean(build(), Halve())
    for call in (fast, fast.features, fast.forward_features):
        with pytest.raises(ValueError, match=message):
            call(images(*size))

"""Plain ViTs of timm at any width: slices, training, token methods on them; and what is refused."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.layers.attention import Attention
from timm.layers.mlp import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

import leanvit
from common.hosts import NotAHost
from common.hosts.export import export_onnx
from common.run.errors import UsageError
from scala import export, linear_probe, main_scala
from scala.build import build_timm
from scala.models_scala import VisionTransformer_scala
from scala.models_timm import TimmViT_scala
from scala.slicing import WidthError
from scala.standalone import load_standalone

SHAPE: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5,
}  # fmt: skip
RATIOS = (0.25, 0.5, 0.75, 1.0)


def random_(net: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator) + (value.ndim == 1) * 0.5)
    return net.double().eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Gated(Attention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, gated=True)


NETWORKS: dict[str, Any] = {
    "plain": (VisionTransformer, {}),
    "DeiT III": (VisionTransformer, {"init_values": 0.3, "no_embed_class": True}),
    "registers, average": (VisionTransformer, {"reg_tokens": 3, "global_pool": "avg", "class_token": False}),
    "norms": (VisionTransformer, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "pre_norm": True}),
    "SwiGLU, gate": (
        VisionTransformer,
        {"mlp_layer": SwiGLU, "mlp_ratio": 2.7, "attn_layer": Gated},
    ),
    "packed SwiGLU": (partial(timm.create_model, "vit_giant_patch14_dinov2"), {"mlp_ratio": 6.0}),
    "attention pool": (partial(timm.create_model, "vit_base_patch16_siglip_224"), {}),
    "distilled": (partial(timm.create_model, "deit_tiny_distilled_patch16_224"), {}),
}
"""Factory, and its arguments besides ``SHAPE``."""


def by_hand(name: str, net: Any, ratio: float) -> Any:
    """A narrower network of timm's own constructor, its weights cut one by one, its attention told the full scale."""
    factory, arguments = NETWORKS[name]
    alone = factory(**SHAPE | arguments | {"embed_dim": int(32 * ratio)}).double().eval()
    full, leading = dict(net.named_parameters()), ratio in (0.25, 1.0)
    with torch.no_grad():
        for key, value in alone.named_parameters():
            cut = full[key]
            for dim, size in enumerate(value.shape):
                cut = cut.narrow(dim, 0 if leading else cut.shape[dim] - size, size)
            value.copy_(cut)
    for module in alone.modules():
        if hasattr(module, "head_dim"):
            module.fused_attn, module.scale = False, (32 // 4) ** -0.5
    return alone


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_slices_equal_networks_of_their_own(name: str) -> None:
    factory, arguments = NETWORKS[name]
    net = random_(factory(**SHAPE | arguments))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = TimmViT_scala(net).eval()
    for ratio in RATIOS:
        alone = leanvit.slice_width(net, ratio)
        expected = by_hand(name, net, ratio)(images())
        assert type(alone) is type(net)
        assert (alone(images()) - expected).abs().max() < 1e-12
        assert (model(images(), ratio) - expected).abs().max() < 1e-12
        assert model.forward_head(model.forward_features(images(), ratio), ratio).equal(model(images(), ratio))
        assert model.count_parameters(ratio) == sum(value.numel() for value in alone.parameters())
        for parameter in alone.parameters():
            parameter.zero_()  # they are copies
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_reg4_dinov2"])
def test_weights_that_timm_fetches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file in place of the download; the second has no head. Positions and patches are resampled as by timm."""
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    torch.save(timm.create_model(name, **shape).state_dict(), tmp_path / "published.pth")
    create = timm.create_model

    def fetching(*args: Any, pretrained: bool = False, **options: Any) -> Any:
        overlay = {"file": str(tmp_path / "published.pth")} | options.pop("pretrained_cfg_overlay", {})
        return create(*args, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", fetching)
    small = shape | {"img_size": 32, "patch_size": 8}
    model = build_timm(name, "timm", num_classes=3, smallest_ratio=0.25, largest_ratio=1.0, **small)
    expected = fetching(name, pretrained=True, **small).state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith("head."):
            assert value.equal(expected[key]), key
    assert model(torch.randn(1, 3, 32, 32), 0.5).shape == (1, 3)


@torch.no_grad()
def test_slices_are_those_of_the_published_class() -> None:
    """One network as timm's and as ours, whose attention and layers are other code."""
    ours: Any = random_(VisionTransformer_scala(**SHAPE, init_values=0.3))
    net = VisionTransformer(**SHAPE, init_values=0.3, norm_layer=partial(nn.LayerNorm, eps=1e-5)).double().eval()
    net.load_state_dict(ours.state_dict())
    for ratio in RATIOS:
        alone = leanvit.slice_width(net, ratio)
        assert (alone(images()) - ours(images(), ratio)).abs().max() < 1e-12
        own = leanvit.slice_width(ours, ratio)
        assert isinstance(own, VisionTransformer)
        assert own(images()).equal(alone(images()))
    other = leanvit.slice_width(net, 0.5, smallest_ratio=0.5)
    assert other(images()).equal(leanvit.slice_width(TimmViT_scala(net, 0.5), 0.5)(images()))
    assert not other(images()).allclose(leanvit.slice_width(net, 0.5)(images()))


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


def test_what_cannot_be_sliced_is_refused_by_the_name_of_the_module() -> None:
    def changed(place: str, module: nn.Module) -> nn.Module:
        net = VisionTransformer(**SHAPE, qk_norm=True)
        net.set_submodule(place, module)
        return net

    for net, message in (
        (timm.create_model("eva02_tiny_patch14_224", depth=1), "a Eva cannot be sliced: only networks of timm's"),
        (VisionTransformer(**SHAPE, block_fn=ParallelScalingBlock), r"blocks\.0 is a ParallelScalingBlock"),
        (VisionTransformer(**SHAPE, global_pool="prr"), "attn_pool is a AttentionPoolPrr"),
        (changed("head", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 5))), "head is a Sequential"),
        (changed("blocks.1.mlp.fc2", Adapter(128, 32)), r"blocks\.1\.mlp\.fc2 is a Adapter"),
        (changed("blocks.1.mlp.act", nn.PReLU()), r"blocks\.1\.mlp\.act is a PReLU"),
        (
            changed("blocks.0.attn.q_norm", nn.LayerNorm(8, elementwise_affine=False)),
            r"blocks\.0\.attn\.q_norm has no w",
        ),
    ):
        with pytest.raises(NotAHost, match=message):
            leanvit.slice_width(net, 0.5)
    net = VisionTransformer(**SHAPE)
    net.blocks[1].attn.qkv = net.blocks[0].attn.qkv
    with pytest.raises(NotAHost, match=r"blocks\.1\.attn\.qkv\.weight is blocks\.0\.attn\.qkv\.weight, shared"):
        leanvit.slice_width(net, 0.5)
    for bound, words in ((0.5, "smallest_ratio 0.9 is above largest_ratio 0.5"), ("1", "at most 1, got '1'")):
        with pytest.raises(WidthError, match=words):
            leanvit.slice_width(VisionTransformer(**SHAPE), 0.5, smallest_ratio=0.9, largest_ratio=bound)  # pyright: ignore[reportArgumentType]
    net = VisionTransformer(**SHAPE)
    net.register_parameter("extra", nn.Parameter(torch.ones(32)))
    with pytest.raises(NotAHost, match="extra is a parameter of which nothing says"):
        leanvit.slice_width(net, 0.5)
    with pytest.raises(WidthError, match="4 heads need a width that is a multiple of 4"):
        leanvit.slice_width(VisionTransformer(**SHAPE), 0.3)
    with pytest.raises(UsageError, match="largest_ratio cannot be given: VisionTransformer_scala has its own"):
        leanvit.slice_width(VisionTransformer_scala(**SHAPE), 0.5, largest_ratio=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Training


DATA = ["--device", "cpu", "--workers", "0", "--batch-size", "4", "--data-path"]
NAME = "vit_small_patch14_reg4_dinov2"
FLAGS = ["--model", f"timm:{NAME}", "--input-size", "16", "--patch-size", "8"]
FLAGS += ["--embed-dim", "32", "--num-heads", "4", "--depth", "2", "--epochs", "1", "--full_warm_epoch", "0"]
FLAGS += ["--granularity", "0.25", "--warmup-epochs", "0", "--no-repeated-aug", "--no-model-ema"]


def test_a_vit_of_timm_is_trained_from_its_weights_and_exported(
    imagenet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = SHAPE | {"patch_size": 8, "img_size": 32, "num_classes": 7}
    own = timm.create_model(NAME, **shape)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    folder, data = tmp_path / "trained", [*DATA, str(imagenet)]
    start = [*data, *FLAGS, "--output_dir", str(folder), "--weights", str(tmp_path / "own.pth"), "--lr", "1e-9"]
    with caplog.at_level(logging.WARNING):
        rows = main_scala.main(start)["widths"]
    assert "its head of 7 classes is replaced by a fresh one of 2" in caplog.text
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    state = content["model"]
    assert set(state) == set(own.state_dict())
    same = (key for key, value in own.state_dict().items() if value.shape == state[key].shape)
    assert sum((state[key] - own.state_dict()[key]).abs().max() < 1e-3 for key in same) == len(state) - 3
    resumed = main_scala.main([*start, "--resume", "auto"])["widths"]
    evaluation = ["--eval", "--resume", str(folder / "checkpoint.pth"), "--eval_ratio", "all"]
    evaluated = main_scala.main([*data, *evaluation])["widths"]
    for one, two, three in zip(rows, resumed, evaluated, strict=True):
        assert one["loss"] == two["loss"] == pytest.approx(three["loss"], rel=1e-6)
    output = tmp_path / "half.safetensors"
    written = ["--checkpoint", str(folder / "checkpoint.pth"), "--ratio", "0.5", "--output", str(output)]
    assert export.main(written)["half.safetensors"] < 1e-5
    probe = ["--checkpoint", str(folder / "checkpoint.pth"), "--data-set", "IMNET", "--epochs", "1"]
    assert [row["ratio"] for row in linear_probe.main([*data, *probe])["widths"]] == [0.25, 0.5, 0.75, 1.0]
    described = json.loads(output.with_suffix(".json").read_text())["timm"]
    assert described["class"] == "timm.create_model"
    assert (described["arguments"]["embed_dim"], described["arguments"]["num_classes"]) == (16, 2)
    net = timm.create_model(NAME, **shape | {"num_classes": 2, "img_size": 16})
    net.load_state_dict(state)
    x = images().float()
    torch.testing.assert_close(load_standalone(output)(x), leanvit.slice_width(net.eval(), 0.5)(x))


def test_a_slice_says_how_its_images_were_normalised() -> None:
    """As this package trains, where timm's own weights of this name had a mean of 0.5."""
    model = build_timm("vit_tiny_patch16_224", "", smallest_ratio=0.25, largest_ratio=1.0, img_size=32, depth=1)
    arguments = model.slice_arguments(model.check_ratio(0.25))[0]
    assert arguments["pretrained_cfg_overlay"]["mean"] == IMAGENET_DEFAULT_MEAN


def test_training_refuses_what_cannot_be_sliced(imagenet: Path) -> None:
    words = [*DATA, str(imagenet), "--model"]
    for name, message in (
        ("timm:resnet18", "a ResNet cannot be sliced"),
        ("timm:vit_small_r26_s32_224", "patch_embed is a HybridEmbed"),
        ("timm:vit_nothing", "has no network 'vit_nothing'"),
        ("timm:vit_tiny_patch16_224.nope", "timm has no weights"),
    ):
        with pytest.raises(UsageError, match=message):
            main_scala.main([*words, name])
    with pytest.raises(UsageError, match="33 is no multiple of the patch of 16 pixels"):
        main_scala.main([*words, "timm:vit_tiny_patch16_224", "--input-size", "33"])
    with pytest.raises(UsageError, match="does not take one of the flags given"):
        main_scala.main([*words, "timm:vit_tiny_patch16_224", "--official-anchors"])
    with pytest.raises(SystemExit):
        main_scala.parse_args(["--weights", "timm"])


# ---------------------------------------------------------------------------------------------------------------------
# Token methods


@pytest.mark.parametrize("method", ["tome", "hourglass", "evit"])
@torch.no_grad()
def test_slice_then_a_token_method(method: str, tmp_path: Path) -> None:
    """As the method does on a network of that width whose weights were cut by hand."""
    net = random_(VisionTransformer(**SHAPE))
    settings = {"tome": {"r": 3}, "hourglass": {"layer": 1, "clusters": 4}, "evit": {"keep": 0.5, "layers": (0,)}}
    fast = leanvit.lean(leanvit.slice_width(net, 0.5), method, **settings[method])
    reference = leanvit.lean(by_hand("plain", net, 0.5), method, verify=False, **settings[method])
    assert fast.tokens_per_layer() == reference.tokens_per_layer()
    assert fast.gmacs() < leanvit.lean(leanvit.slice_width(net, 0.5)).gmacs()
    assert (fast(images()) - reference(images())).abs().max() < 1e-12
    assert (fast.features(images()) - reference.features(images())).abs().max() < 1e-12
    if method == "tome":
        assert export_onnx(fast, tmp_path / "fast.onnx") < 1e-4

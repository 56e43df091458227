"""Token merging in timm's Vision Transformers: every kind is honoured or refused by name."""

from typing import Any

import pytest
import timm
import torch
from timm.models import vision_transformer as timm_models
from torch import nn

from common.tests.reference import array, fill_
from hourglass_swag.models.ops.tome import patch

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}

HONOURED: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_224.mae": {},
    "vit_base_patch16_gap_224": {},  # no class token
    "vit_base_patch32_clip_224": {},  # norm before the layers
    "vit_little_patch16_reg4_gap_256": {},  # registers without a class token, LayerScale
    "vit_small_patch14_reg4_dinov2": {},  # registers, class token, LayerScale
    "vit_base_patch14_dinov2": {},
    "vit_base_patch16_siglip_224": {},  # attention pooling
    "vit_base_patch16_siglip_gap_224": {},
    "vit_giant_patch14_dinov2": {},  # gated MLP
    "aimv2_large_patch14_224": {},  # RMS norm, gated MLP, no bias
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},  # LayerScale, positions without a class token
    "vit_tiny_patch16_224 qk_norm": {"qk_norm": True, "scale_attn_norm": True},
    "vit_tiny_patch16_224 dynamic": {"dynamic_img_size": True},
    "vit_tiny_patch16_224 headless": {"num_classes": 0},
    "vit_tiny_patch16_224 training": {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
}

REFUSED = {
    "beit_base_patch16_224": "timm.models.beit.Beit is not a host",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "resnet10t": "timm.models.resnet.ResNet",
    "vit_base_patch16_rpn_224": "blocks.0 is a ResPostBlock",
    "vit_base_patch16_xp_224": "blocks.0 is a ParallelScalingBlock",
    "vit_small_patch16_36x1_224 diff": "blocks.0.attn is a DiffAttention",
}


def make(name: str, **options: Any) -> Any:
    """A small network of a registered kind, filled, in float64."""
    model = timm.create_model(name.split()[0], pretrained=False, **SMALL | {"num_classes": 7} | options)
    return fill_(model.double(), 4).eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.from_numpy(array("image", (batch, 3, 64, 64), 1))


@pytest.mark.parametrize("name", HONOURED)
def test_without_merging_it_is_the_original(name):
    model = make(name, **HONOURED[name])
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(images())
        assert patch.timm(model) is model
        torch.testing.assert_close(model(images()), expected)
    assert list(model.state_dict()) == names


def test_networks_that_rotate_are_honoured_too():
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=7).double().eval()
    rotated = torch.from_numpy(array("image", (2, 3, 56, 56), 1))
    with torch.no_grad():
        expected = model(rotated)
        torch.testing.assert_close(patch.timm(model)(rotated), expected)
        model.r = 3
        assert model(rotated).shape == (2, 7)
    assert model.tokens_per_layer() == [17, 14, 11]


@pytest.mark.parametrize("name", HONOURED)
def test_merging_equal_tokens_changes_nothing(name):
    """Pairs of equal neighbours, no positions: with proportional attention the merged network is the original."""
    model = make(name, **HONOURED[name])
    if model.pos_embed is not None:
        model.pos_embed.data.zero_()
    columns = images().unflatten(3, (4, 16))[:, :, :, ::2]  # of patches
    doubled = columns.repeat_interleave(2, dim=3).flatten(3)
    with torch.no_grad():
        expected = model(doubled)
        patch.timm(model, trace_source=True)
        model.r = [8, 0]
        torch.testing.assert_close(model(doubled), expected)
    prefix, size = model.num_prefix_tokens, model._tome_info["size"]
    assert size.flatten(1).tolist() == [[1.0] * prefix + [2.0] * 8] * 2
    assert torch.equal(model._tome_info["source"][:, :prefix, :prefix], torch.eye(prefix).double().expand(2, -1, -1))


@pytest.mark.parametrize("name", HONOURED)
def test_merging_trains(name):
    torch.manual_seed(0)
    model = patch.timm(make(name, **HONOURED[name]).train(), prop_attn="mae" not in name)
    model.r = 3
    output = model(images())
    output.square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert model._tome_info["size"].sum(1).flatten().tolist() == [16.0 + model.num_prefix_tokens] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_modules_are_refused_by_name(name):
    options = SMALL
    if "resnet" in name:
        options = {}
    elif "diff" in name:
        options = SMALL | {"attn_layer": "diff"}
    elif "beit" in name or "relpos" in name:
        options = {"img_size": 64, "depth": 1} | ({} if "relpos" in name else {"patch_size": 16})
    model = timm.create_model(name.split()[0], pretrained=False, **options)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=REFUSED[name].replace(".", r"\.")):
        patch.timm(model)
    assert [type(module) for module in model.modules()] == classes


def test_an_unknown_part_of_a_layer_is_refused_by_name():
    model = make("vit_tiny_patch16_224")
    model.blocks[1].attn.talk = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"blocks\.1\.attn\.talk is a part that Attention has not"):
        patch.timm(model)


def test_gradient_checkpointing_is_refused():
    model = make("vit_tiny_patch16_224")
    model.set_grad_checkpointing()
    with pytest.raises(TypeError, match=r"gradient checkpointing is on: call net\.set_grad_checkpointing\(False\)"):
        patch.timm(model)
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match="a plan is made for one network as it is"):
        patch.timm(model).set_grad_checkpointing()


def test_a_forward_of_a_subclass_is_refused():
    class Doubled(timm_models.VisionTransformer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return 2 * self.forward_head(self.forward_features(x))

    with pytest.raises(TypeError, match="Doubled has a forward of its own"):
        patch.timm(Doubled(**SMALL, num_classes=7))


def test_features_are_those_left_and_begin_a_new_pass():
    model = patch.timm(make("vit_tiny_patch16_224"))
    model.r = 3
    with torch.no_grad():
        for batch in (2, 1):
            assert model.forward_features(images(batch)).shape == (batch, 11, 32)
        with pytest.raises(ValueError, match="features between the blocks are not restored"):
            model.forward_intermediates(images())
        assert model.features(images()).shape == (2, 32, 4, 4)


def test_masks_are_refused():
    model = make("vit_tiny_patch16_224")
    patch.timm(model)
    with pytest.raises(ValueError, match="attn_mask and is_causal do not go with token methods"):
        model(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_the_patch_comes_off_again():
    model = make("vit_tiny_patch16_224")
    names, expected = list(model.state_dict()), model(images())
    patch.timm(model).r = 4
    assert not torch.allclose(model(images()), expected)
    assert model.restore() is model
    assert type(model) is timm_models.VisionTransformer
    assert torch.equal(model(images()), expected)
    assert list(model.state_dict()) == names


def test_half_precision_and_compiling():
    model = patch.timm(make("vit_small_patch14_reg4_dinov2").float())
    model.r = 3
    one = images(1).float()
    with torch.no_grad():
        expected = model(one)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(one), expected)
        assert model.bfloat16()(one.bfloat16()).dtype == torch.bfloat16

"""Slicing and the networks: manifests, isolation, slices as stand-alone networks, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from common.measure.flops import count_parameters
from common.run.errors import UsageError
from common.tests.apart import check_images_apart
from common.tests.reference import build, image
from scala import models_scala, visualize
from scala.arguments import parse_args
from scala.layers import sliced_state_dict
from scala.models_scala import MODELS, DistilledVisionTransformer_scala, VisionTransformer_scala, create
from scala.slicing import (
    SliceRule,
    Width,
    WidthError,
    check_ratio,
    check_sampling,
    exact,
    make_grid,
)

VECTORS = Path(__file__).parent / "vectors"
TINY: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5,
}  # fmt: skip
X = image(2, 32, seed=1)


def plain(**kwargs: Any) -> Any:
    return build(VisionTransformer_scala, 1, **TINY | kwargs)


def distilled(**kwargs: Any) -> Any:
    return build(DistilledVisionTransformer_scala, 1, **TINY | kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_of_the_manifest(name: str) -> None:
    manifest = json.loads((VECTORS / f"manifest_{name}.json").read_text())
    parameters = manifest.pop("params")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(manifest.items())
    assert count_parameters(model) == parameters


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("form", ["", "_distilled"])
def test_weights_fit_timms_deit(size: str, form: str) -> None:
    with torch.device("meta"):
        ours = create(f"deit_{size}{form}_patch16_224_scala").state_dict()
        theirs = timm.create_model(f"deit_{size}{form}_patch16_224").state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("make", [plain, distilled])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.875, 1.0])
def test_a_slice_is_a_network_of_its_own(make: Any, ratio: float) -> None:
    """The sliced weights in a stand-alone network of width d give the same logits, up to the scale of its attention."""
    model = make()
    width = int(ratio * 32)
    alone = make(embed_dim=width)
    alone.load_state_dict(sliced_state_dict(model, ratio))
    for block in alone.blocks:
        block.attn.scale = model.blocks[0].attn.scale
    torch.testing.assert_close(alone(X, 1.0), model(X, ratio), rtol=1e-12, atol=1e-12)
    assert model.count_parameters(ratio) == count_parameters(alone)
    assert model.count_ops(ratio).macs == alone.count_ops(1.0).macs


def test_a_slice_is_a_view() -> None:
    model = plain()
    for name, value in sliced_state_dict(model, 0.5).items():
        assert value.untyped_storage().data_ptr() == model.get_parameter(name).untyped_storage().data_ptr()


@pytest.mark.parametrize("make", [plain, distilled])
@pytest.mark.parametrize("ratio", [0.25, 0.625, 1.0])
def test_counted_operations_are_those_of_the_formula(make: Any, ratio: float) -> None:
    """Patches, 12 d^2 per token and block, two products of tokens, heads; norms on all tokens, as published."""
    for options in ({}, {"init_values": 0.1}):
        counts = make(**options).count_ops(ratio)
        extra, d = 1 + (make is distilled), int(32 * ratio)
        tokens = 16 + extra
        assert counts.macs == 16 * 3 * 64 * d + 2 * (12 * tokens * d * d + 2 * tokens**2 * d) + extra * 5 * d
        assert counts["layer_norm"] == 5 * tokens * d


def test_the_smallest_network_shares_no_weight_with_the_others() -> None:
    """Isolated activation: for r + s <= 1 training the smallest leaves the others' outputs as they are."""
    model = distilled()
    before = {ratio: model(X, ratio) for ratio in (0.5, 0.75, 0.875)}
    with torch.no_grad():
        for name, value in sliced_state_dict(model, 0.25).items():
            if not name.startswith("head") or not name.endswith("bias"):  # the heads' biases belong to every width
                value.add_(1.0)
    assert torch.equal(model(X, 0.5), before[0.5])
    assert torch.equal(model(X, 0.75), before[0.75])
    assert not torch.equal(model(X, 0.875), before[0.875])


def test_leading_and_trailing() -> None:
    rule, weight = SliceRule(0.25, 1.0), torch.arange(8)
    assert rule.cut(weight, 0.25, 0).tolist() == [0, 1]
    assert rule.cut(weight, 0.5, 0).tolist() == [4, 5, 6, 7]
    assert rule.cut(weight, 1.0, 0) is weight
    assert SliceRule(0.5, 1.0).cut(weight, 0.25, 0).tolist() == [6, 7]
    assert rule.cut(torch.arange(12), 0.5, 0, parts=3).tolist() == [6, 7, 8, 9, 10, 11]
    assert SliceRule(0.25, 1.0, isolated=False).cut(weight, 0.5, 0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [plain, distilled])
def test_without_isolated_activation_every_width_leads(make: Any) -> None:
    """Each width's weights are the first ones of the next wider width's, in every layer."""
    model = make(isolated_activation=False)
    for narrow, wide in ((0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        inside = sliced_state_dict(model, wide)
        for name, value in sliced_state_dict(model, narrow).items():
            assert torch.equal(value, inside[name][tuple(slice(size) for size in value.shape)]), name
    assert not torch.equal(model(X, 0.5), make()(X, 0.5))
    assert torch.equal(model(X, 1.0), make()(X, 1.0))


def test_a_ratio_that_the_heads_cannot_share_is_refused() -> None:
    for ratio in (0.3, 0.0, 1.1, -1.0, 0.01):
        with pytest.raises(ValueError, match=r"valid ratios are .*0\.125, 0\.25, 0\.375, .*, 0\.875, 1$"):
            plain()(X, ratio)
    assert [check_ratio(n / 8, 32, 4) for n in (1, 6, 8)] == [(1, 8), (3, 4), (1, 1)]


@pytest.mark.parametrize("make", [plain, distilled])
def test_a_rounding_error_in_a_ratio_changes_nothing(make: Any) -> None:
    """Neither the end, which is another one for the smallest width, nor the number of channels."""
    model = make()
    for ratio in (0.25, 0.5, 0.75, 1.0):
        for error in (1e-9, -1e-9, 9e-7, -9e-7):
            assert torch.equal(model(X, ratio + error), model(X, ratio))
            assert model.count_parameters(ratio + error) == model.count_parameters(ratio)
    block = model.blocks[0]
    tokens = torch.randn(1, 3, 8, dtype=torch.float64)
    assert torch.equal(block(tokens, 0.25 + 1e-9), block(tokens, 0.25))
    for ratio in (0.25 + 1e-5, 0.25 - 1e-5, 0.2734375):
        with pytest.raises(WidthError, match=r"The nearest are 0\.\d+ \(width \d+\) and 0\.\d+ \(width \d+\)"):
            model(X, ratio)


def test_ratios_are_fractions() -> None:
    assert (exact(0.25), exact(0.1 * 3), exact(1 / 3), exact(1.0)) == ((1, 4), (3, 10), (1, 3), (1, 1))
    assert all(
        exact(steps / of) == (steps, of) for of in (768, 997) for steps in range(1, of, 5) if steps % 2 and steps % 3
    )
    assert Width(29, 100).channels(100) == 29 != int(0.29 * 100)
    for ratio in (0.25 + 1e-5, 0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(WidthError):
            exact(ratio)
    rule = SliceRule(0.1, 1.0)
    assert [rule.leads(step * 0.1) for step in range(1, 11)] == [True, *[False] * 8, True]


def test_layer_scale_multiplies_and_learns() -> None:
    model = plain(init_values=0.1)
    model(X, 0.5).sum().backward()
    gamma = model.blocks[0].ls1.gamma.grad
    assert gamma[16:].count_nonzero() == 16
    assert gamma[:16].count_nonzero() == 0
    official = plain(init_values=0.1, official_layer_scale=True)
    assert torch.equal(official(X, 0.5), plain()(X, 0.5))


@pytest.mark.parametrize("make", [plain, distilled])
def test_gradient_checkpointing_changes_nothing(make: Any) -> None:
    gradients = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        result = model(X, 0.5)
        sum(part.square().sum() for part in (result if isinstance(result, tuple) else (result,))).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_a_network_without_classes_gives_features() -> None:
    assert plain(num_classes=0)(X, 0.5).shape == (2, 16)
    cls, dist = distilled(num_classes=0).train()(X, 0.5)
    assert cls.shape == dist.shape == (2, 16)
    assert plain(global_pool="")(X, 0.5).shape == (2, 17, 5)


def test_qkv_without_bias() -> None:
    model = plain(qkv_bias=False)
    assert "blocks.0.attn.qkv.bias" not in model.state_dict()
    assert model(X, 0.5).shape == (2, 5)


def test_pair_outputs_decide_over_the_mode() -> None:
    model = distilled()
    model.pair_outputs = True
    cls, dist = model(X, 0.5)
    model.pair_outputs = False
    torch.testing.assert_close(model.train()(X, 0.5), (cls + dist) / 2)


@pytest.mark.parametrize("name", ["deit_base_patch16_384_scala", "deit_base_distilled_patch16_384_scala"])
def test_the_384_models_take_a_size_from_the_caller(name: str) -> None:
    with torch.device("meta"):
        assert timm.create_model(name).patch_embed.img_size == (384, 384)
        assert timm.create_model(name, img_size=224).patch_embed.img_size == (224, 224)


def test_factories_swallow_what_timm_adds_and_nothing_else() -> None:
    with torch.device("meta"):
        factory = models_scala.FACTORIES["deit_tiny_patch16_224_scala"]
        assert factory(pretrained_cfg={}, pretrained_cfg_overlay={}, cache_dir="").embed_dim == 192
        with pytest.raises(TypeError, match="unknown"):
            factory(unknown=1)
        with pytest.raises(ValueError, match="no weights to download"):
            factory(pretrained=True)
    with pytest.raises(ValueError, match="the models are deit_so_tiny"):
        create("deit_huge")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_pool": "max"}, "global_pool must be"),
        ({"class_token": False}, "needs class_token=True"),
        ({"smallest_ratio": 0.0}, "slicing bound"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"weight_init": "xavier"}, "weight_init must be"),
        ({"norm_layer": nn.BatchNorm1d}, "must be a layer normalisation"),
    ],
)
def test_options_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer_scala(**TINY | kwargs)


def test_what_a_user_types_wrong_is_a_line() -> None:
    with pytest.raises(UsageError, match="must be a multiple of the number of heads"):
        VisionTransformer_scala(**TINY | {"num_heads": 5})
    with pytest.raises(UsageError, match="--granularity 1e-09 makes more than 1000 widths"):
        make_grid(0.25, 1.0, 1e-9)
    for words in (["--eval_ratio", ","], ["--eval_ratio", ""]):
        with pytest.raises(SystemExit):
            parse_args(words)
    with pytest.raises(SystemExit):
        visualize.parse_args(["--output", "widths.txt"])


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of \(32, 32\) pixels, got \(40, 40\)"):
        plain()(image(1, 40), 1.0)
    for kwargs, message in (({"global_pool": "avg"}, "global_pool must be"), ({"fc_norm": True}, "fc_norm")):
        with pytest.raises(ValueError, match=message):
            distilled(**kwargs)


@torch.no_grad()
def test_initialisation() -> None:
    torch.manual_seed(0)
    model = DistilledVisionTransformer_scala(**TINY | {"embed_dim": 128})
    assert 0.019 < float(model.blocks[0].attn.qkv.weight.std()) < 0.021  # type: ignore[union-attr]
    assert 0.018 < float(model.dist_token.std()) < 0.023
    assert 0.018 < float(model.pos_embed.std()) < 0.022
    assert model.cls_token is not None
    assert 0 < float(model.cls_token.abs().max()) < 1e-5
    assert float(model.patch_embed.proj.weight.abs().max()) <= 1 / (3 * 64) ** 0.5
    assert float(model.head_dist.bias.abs().max()) == 0  # type: ignore[union-attr]
    for mode in ("skip", "jax", "jax_nlhb", "moco"):
        DistilledVisionTransformer_scala(**TINY, weight_init=mode)


@pytest.mark.parametrize(
    ("granularity", "count", "upper", "lower"),
    [
        (1 / 32, 25, (20, 31), (9, 19)), (1 / 16, 13, (10, 15), (5, 9)),
        (1 / 8, 7, (5, 7), (3, 4)), (1 / 4, 4, (3, 3), (2, 2)),
    ],
)  # fmt: skip
def test_published_grids(granularity: float, count: int, upper: Any, lower: Any) -> None:
    grid = make_grid(0.25, 1.0, granularity)
    assert len(grid.ratios) == count
    assert grid.ratios == [0.25 + step * granularity for step in range(count)]
    assert (grid.upper_steps, grid.lower_steps) == (upper, lower)
    check_sampling(grid)


def test_grids_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not divide the range"):
        make_grid(0.25, 1.0, 0.2)
    with pytest.raises(ValueError, match=r"does not divide --largest_ratio"):
        make_grid(0.3, 0.9, 0.2)
    with pytest.raises(ValueError, match="slicing bound"):
        make_grid(0.5, 0.25, 0.25)
    with pytest.raises(ValueError, match="must be positive"):
        make_grid(0.25, 1.0, 0.0)
    with pytest.raises(ValueError, match="at least 4 widths"):
        check_sampling(make_grid(0.5, 1.0, 0.25))
    assert make_grid(0.1, 1.0, 0.1).upper_steps == (6, 9)  # 0.1 is no binary fraction
    assert make_grid(0.75, 0.75, 0.25).ratios == [0.75]


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), "0.5", None])
def test_what_is_no_number_is_no_width(ratio):
    with pytest.raises(WidthError, match="a width ratio must be a number"):
        check_ratio(ratio, 96, 3)


@pytest.mark.parametrize("make", [plain, distilled])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_what_is_not_finite_stays_in_its_image(make: Any, ratio: float) -> None:
    check_images_apart(lambda images: make().eval()(images, ratio), image(3, 32, seed=1), atol=1e-6)


@pytest.mark.parametrize("img_size", [33, (32, 40), 0])
def test_create_refuses_images_that_patches_do_not_fill(img_size: Any) -> None:
    with pytest.raises(UsageError, match=r"--input-size \(img_size\) \d+ is no multiple of the patch of 16 pixels"):
        create("deit_tiny_patch16_224_scala", img_size=img_size)

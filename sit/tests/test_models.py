"""Properties of slimming and of the networks around it; deployment: folding, tracing, compiling, exporting."""

import io

import pytest
import torch
from timm.models._factory import create_model
from torch import nn

from common.measure.flops import CONVENTIONS, count_operations
from common.run.errors import CheckpointError
from common.tests.apart import check_images_apart
from common.tests.reference import fill_
from sit.models import SIZES, LVViT, PatchEmbed4CG, PatchEmbedNaive, ReverseTSM, TokenSlimmingModule, slim_tokens
from sit.models.lvvit import count_ops
from sit.models.slimming import layer_tokens, slimming_blocks, stage_tokens

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 3.0, "p_emb": "4c", "num_classes": 5}
SMALL |= {"stage_blocks": (1, 1, 2), "skip_lam": 2.0}


def make(kind: str | None = "frd", seed: int = 3, **options) -> LVViT:
    model = LVViT(**{**SMALL, **options, "distillation_type": kind})
    fill_(model, seed)
    return model.eval()


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_outputs_are_convex_combinations():
    tokens, scores = torch.randn(2, 7, 5), 3 * torch.randn(2, 7, 3)
    mixed = slim_tokens(tokens, scores)
    assert mixed.shape == (2, 3, 5)
    assert (mixed <= tokens.amax(1, keepdim=True)).all()
    assert (mixed >= tokens.amin(1, keepdim=True)).all()
    same = slim_tokens(tokens[:, :1].expand(-1, 7, -1), scores)
    assert torch.allclose(same, tokens[:, :1].expand(-1, 3, -1), atol=1e-6)  # all alike: any mixture is the same


def test_mixing_weights_sum_to_one_over_the_inputs_and_ignore_the_order():
    module = fill_(TokenSlimmingModule(16, 4), 1)
    tokens = torch.randn(2, 9, 16)
    weights = module.mixing_weights(tokens)  # pyright: ignore[reportCallIssue]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4))
    order = torch.randperm(9)
    assert torch.allclose(module(tokens[:, order]), module(tokens), atol=1e-6)  # no positions inside


def test_the_last_bias_of_the_scores_cancels():
    module = fill_(TokenSlimmingModule(16, 4), 1).double()
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    before = module(tokens)
    before.square().sum().backward()
    assert module.weight[3].bias.grad.abs().max() < 1e-12  # pyright: ignore
    assert module.scale.grad.abs().max() > 1e-6  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    with torch.no_grad():
        module.weight[3].bias += 5 * torch.randn(4)  # pyright: ignore
    assert torch.allclose(module(tokens), before)


def test_reverse_module_brings_back_every_token():
    assert ReverseTSM(16, 4, 9)(torch.randn(3, 4, 16)).shape == (3, 9, 16)


def test_tokens_are_the_floor_of_the_exact_power():
    assert stage_tokens(324, 0.5, 4) == [324, 162, 81, 40]
    assert stage_tokens(49, 0.5, 4) == [49, 24, 12, 6]
    assert layer_tokens([16, 8, 4], [1, 1, 2]) == [16, 8, 4, 4, 4, 4]
    assert slimming_blocks([9, 3, 2, 2]) == [9, 12, 14]


def test_a_keeping_ratio_of_one_recovers_nothing():
    model = make(keeping_ratio=1.0)
    assert all(isinstance(part, nn.Identity) for part in model.rtsm)
    assert [tokens.shape[1] for tokens in model(IMAGES)[1]] == [16, 16, 16, 16]


def test_recovered_tokens_are_a_side_branch():
    """Training and evaluation give the same logits: what is recovered feeds no block."""
    model = make()
    logits, tokens = model(IMAGES)
    assert [kept.shape[1] for kept in tokens] == [8, 4, 4, 4]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    trained, distilled, recovered = model(IMAGES)
    assert torch.allclose(trained, logits, atol=1e-6)
    assert distilled is trained
    assert all(kept.shape == (2, 16, 32) for kept in recovered)


def test_checkpointing_changes_no_gradient():
    plain, saving = make(seed=5).double().train(), make(seed=5, with_cp=True).double().train()
    gradients = []
    for model in (plain, saving):
        logits, _, tokens = model(IMAGES.double())
        (logits.square().sum() + sum(kept.square().mean() for kept in tokens)).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-10) for name in gradients[0])


def test_only_what_is_asked_for_is_computed():
    model = make(None)
    logits, tokens = model(IMAGES)
    only_logits, nothing = model.forward_parts(IMAGES, logits=True, tokens=False)
    none, all_tokens = model.forward_parts(IMAGES, logits=False, tokens=True)
    assert torch.allclose(only_logits, logits, atol=1e-6)
    assert nothing == []
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(tokens, all_tokens, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Costs


def products_by_hand(model: LVViT) -> int:
    """Multiply-accumulates of one image of 64 pixels at width 32, four heads of 8, MLPs three times as wide."""
    C, extra = 32, 1 + model.conv_distillation
    if isinstance(model.patch_embed, PatchEmbedNaive):
        total = model.num_patches * 3 * 8 * 8 * C
    else:
        channels = [3, *(C // fraction for fraction in model.patch_embed.channels)]
        total, side = 0, 64
        for before, after, stride in zip(channels, channels[1:], model.patch_embed.strides, strict=False):
            side //= stride
            total += side * side * after * before * 9
    entered = model.layer_patches if model.slimmed else [model.num_patches] * 5
    for block in range(4):
        tokens = extra + entered[block]
        total += tokens * (C * 3 * C + C * C + 2 * C * 3 * C) + 2 * tokens * tokens * C
        if model.slimmed and block + 1 in model.slim_index:
            left = entered[block + 1]
            total += entered[block] * (C * C // 2 + C // 2 * left) + left * entered[block] * C
    return total + extra * C * 5


@pytest.mark.parametrize("kind", ["frd", None])
@pytest.mark.parametrize(
    "options",
    [{}, {"p_emb": "6c"}, {"p_emb": "naive", "patch_size": 8}, {"keeping_ratio": 0.7}, {"conv_distillation": True}],
)
def test_products_are_those_counted_by_hand(kind, options):
    if options.get("conv_distillation") and kind is None:
        pytest.skip("a teacher has no distillation token")
    with torch.device("meta"):
        model = LVViT(**{**SMALL, **options, "distillation_type": kind})
    for network in (model, model.deployed()):
        assert count_ops(network).macs == products_by_hand(model)


def test_cost_of_the_reverse_modules():
    """Along the tokens to 4T and T, then along the channels to 4C and C."""
    counted = count_operations(ReverseTSM(32, 4, 16), torch.empty(1, 4, 32, device="meta")).executed
    assert counted.macs == 32 * (4 * 64 + 64 * 16) + 16 * 2 * 32 * 128


PUBLISHED_TOTALS = {
    ("sit_lvvit_tiny", "frd"): 991_940_800,
    ("sit_lvvit_xsmall", "frd"): 1_487_068_800,
    ("sit_lvvit_small", "frd"): 4_027_247_232,
    ("sit_lvvit_medium", "frd"): 8_036_640_256,
    ("sit_lvvit_large", "frd"): 34_366_005_504,
    ("sit_lvvit_tiny", None): 3_467_760_960,
    ("sit_lvvit_small", None): 5_546_247_552,
    ("sit_lvvit_medium", None): 11_862_790_656,
    ("sit_lvvit_large", None): 56_050_871_040,
}


@pytest.mark.parametrize(("name", "kind"), PUBLISHED_TOTALS)
def test_totals_of_the_published_sizes(name, kind):
    """By the published tool, to the operation."""
    with torch.device("meta"):
        model = create_model(name, distillation_type=kind)
    assert CONVENTIONS["fvcore"].total(count_ops(model)) == PUBLISHED_TOTALS[name, kind]


# ---------------------------------------------------------------------------------------------------------------------
# Deployment


@pytest.mark.parametrize("stem", ["4c", "6c"])
def test_folding_is_exact(stem):
    model = make(p_emb=stem).double()
    folded = model.patch_embed.fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert torch.allclose(folded(IMAGES.double()), model.patch_embed(IMAGES.double()), rtol=1e-12, atol=1e-13)
    assert torch.equal(folded.fuse()(IMAGES.double()), folded(IMAGES.double()))  # folding again changes nothing
    single = make(p_emb=stem)
    assert torch.allclose(single.patch_embed.fuse()(IMAGES), single.patch_embed(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"conv_distillation": True}, {"keeping_ratio": 0.7}, {"p_emb": "naive"}])
def test_deployed_logits_are_those_of_evaluation(options):
    model = make(**options)
    expected = model(IMAGES)[0]
    light = model.deployed()
    assert torch.allclose(light(IMAGES), expected, atol=2e-6)
    assert torch.equal(model.deployed(fold_batch_norm=False)(IMAGES), expected)
    assert not any(key.startswith(("rtsm", "aux_head")) for key in light.state_dict())
    assert any(key.startswith("rtsm") for key in model.state_dict())  # the original is untouched
    assert model(IMAGES)[1]


def test_a_logits_only_network_holds_the_deployed_weights():
    light = make().deployed(fold_batch_norm=False)
    again = LVViT(**{**SMALL, "distillation_type": "frd"}, logits_only=True).eval()
    again.load_state_dict(light.state_dict())
    assert torch.equal(again(IMAGES), light(IMAGES))


@pytest.mark.filterwarnings("ignore")
def test_traced_logits_are_equal():
    light = make().deployed()
    traced = torch.jit.trace(light, IMAGES)
    assert torch.equal(traced(IMAGES), light(IMAGES))  # pyright: ignore[reportCallIssue]
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)


@pytest.mark.parametrize("kind", ["frd", None])
def test_compiling_captures_the_whole_network(kind):
    """Without a break of the graph, in evaluation and, for the full network, in training."""
    light = make(kind).deployed()
    compiled = torch.compile(light, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IMAGES), light(IMAGES))
    model = make(kind).train()
    logits, _, tokens = torch.compile(model, backend="eager", fullgraph=True)(IMAGES)
    assert logits.shape == (2, 5)
    assert len(tokens) == 4


@pytest.mark.parametrize("kind", ["frd", None])
def test_exported_logits_are_equal_at_any_batch(kind):
    light = make(kind).deployed()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(light, (IMAGES,), dynamic_shapes=({0: batch},))
    for images in (IMAGES, torch.randn(5, 3, 64, 64)):
        assert torch.allclose(exported.module()(images), light(images), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_precision_runs_through(dtype):
    model = make().deployed()
    found = model.to(dtype)(IMAGES.to(dtype))
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    assert torch.allclose(found.float(), make().deployed()(IMAGES), atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Odd sizes and wrong options


@pytest.mark.parametrize("name", list(SIZES))
def test_every_size_is_registered(name):
    with torch.device("meta"):
        assert create_model(name, num_classes=10).num_classes == 10


def test_no_classes():
    model = make(num_classes=0)
    assert model(IMAGES)[0].shape == (2, 32)
    assert model.deployed()(IMAGES).shape == (2, 32)
    model.reset_classifier(3)
    assert model.eval()(IMAGES)[0].shape == (2, 3)


def test_batch_of_one():
    assert make()(IMAGES[:1])[0].shape == (1, 5)


def test_other_images_with_as_many_patches_pass():
    """As published: each stride rounds up, so 49 pixels give the four patches of 64."""
    assert make()(torch.randn(1, 3, 32, 128))[0].shape == (1, 5)
    assert make()(torch.randn(1, 3, 49, 49))[0].shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_blocks": (1, 1)}, r"stage_blocks \[1, 1\] has 2 blocks, depth is 4"),
        ({"img_size": 60}, "do not fill 60 pixels; give a multiple, such as 64"),
        ({"patch_size": 8}, "has a stride of 16 pixels, so patch_size 8"),
        ({"num_heads": 5}, "width 32 is not a multiple of 5 heads"),
        ({"keeping_ratio": 0.0}, "keeping_ratio must be above 0"),
        ({"keeping_ratio": 0.1}, "must keep at least one token, got 0"),
        ({"distillation_type": None, "conv_distillation": True}, "needs a slimmed network"),
        ({"keeped_patches": (8,)}, "must have 2 numbers"),
        ({"distillation_type": "tpyo"}, "distillation_type must be one of none, frd, got 'tpyo'"),
        ({"distillation_type": "fdr"}, "got 'fdr'; did you mean 'frd'"),
        ({"p_emb": "4x"}, "p_emb must be one of 3c, 4c, 6c, naive, 4cg, got '4x'; did you mean '4c'"),
        ({"img_size": (64, 60)}, "do not fill 60 pixels"),
        ({"img_size": (64, 64, 3)}, "must be whole numbers of pixels"),
        ({"drop_path_rate": [0.1], "drop_path_decay": "list"}, "needs 4 rates, one per block, got 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LVViT(**{**SMALL, "distillation_type": "frd", **options})


def test_the_published_default_stem_is_the_single_convolution():
    options = {**SMALL}
    del options["p_emb"]
    with pytest.warns(UserWarning, match="p_emb='4cg', the default, is the single convolution"):
        assert isinstance(LVViT(**options).patch_embed, PatchEmbedNaive)


@pytest.mark.parametrize("stem", ["4c", "6c", "naive"])
def test_rectangular_images(stem):
    """Height comes first; the tokens are those of the rows from left to right."""
    model = make(p_emb=stem, img_size=(32, 96))
    assert (model.grid, model.image_shape, model.num_patches) == ((2, 6), (32, 96), 12)
    assert model.keeped_patches == [12, 6, 3]
    images = torch.randn(2, 3, 32, 96)
    logits, tokens = model(images)
    assert logits.shape == (2, 5)
    assert [kept.shape[1] for kept in tokens] == [6, 3, 3, 3]
    assert torch.allclose(model.deployed()(images), logits, atol=2e-6)
    assert model.patch_embed(images).shape[2:] == (2, 6)
    square = count_ops(LVViT(**{**SMALL, "p_emb": stem, "img_size": (48, 64), "distillation_type": "frd"}))
    assert count_ops(model)["conv"] == square["conv"]  # as many patches
    with pytest.raises(ValueError, match="images of 64x64"):
        make(p_emb=stem, img_size=(32, 96))(IMAGES)


def test_weights_are_not_pretended():
    with pytest.raises(CheckpointError, match=r"sit_lvvit_tiny: there are no weights.*weights=FILE"):
        create_model("sit_lvvit_tiny", pretrained=True)


def test_images_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"96x96 give 36 patches, this network is for 16 \(64x64 pixels\)"):
        make()(torch.randn(1, 3, 96, 96))
    with pytest.raises(ValueError, match="96x96 in a network for 64x64 pixels"):
        make(p_emb="naive")(torch.randn(1, 3, 96, 96))


def test_initialisation():
    torch.manual_seed(0)
    model = LVViT(**{**SMALL, "distillation_type": "frd", "embed_dim": 128})
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)  # pyright: ignore
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0  # pyright: ignore
    assert all(part.scale.item() == 1 for part in model.tsm)  # pyright: ignore
    stem = PatchEmbed4CG(64, 16, 3, 128).conv2.weight  # PyTorch's own: uniform within 1 / sqrt(fan in)
    assert stem.abs().max().item() <= (16 * 9) ** -0.5
    assert stem.std().item() == pytest.approx((16 * 9) ** -0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", [None, "frd"])
def test_what_is_not_finite_stays_in_its_image(kind):
    model, images = make(kind), torch.cat([IMAGES, IMAGES[:1].flip(3)])
    check_images_apart(model, images)
    check_images_apart(model.deployed(), images)

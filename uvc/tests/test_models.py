"""Gated backbones: their gates, patches and names."""

import re

import pytest
import torch

from common.measure.flops import count_operations
from common.run.errors import UsageError
from common.tests.apart import check_images_apart
from uvc.models import MODELS, create
from uvc.models.gates import apply_masks_, gate_weights, gumbel_softmax, register_masks, select_tokens
from uvc.tests.model_cases import float64


@pytest.fixture
def model():
    torch.manual_seed(0)
    with float64():
        return create("deit_desk", depth=3).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_every_listed_name_builds_or_says_why_not():
    for name in MODELS:
        with torch.device("meta"):
            model = create(name)
        assert model.head_dim * model.num_heads == model.embed_dim
        assert len(model.block_macs()) == 6
    refused = (
        "ViT-B_16", "R50-ViT-B_16", "deit_tiny_patch16_224_8layer", "deit_base_patch16_384",
        "deit_small_patch16_224_sp", "deit_tiny_patch16_224_data", "deit_small_patch16_224_half", "t2t_vit_t_14",
        "t2t_vit_dense", "t2t_vit_14_se", "t2t_vit_16_ghost",
    )  # fmt: skip
    for name in refused:
        with pytest.raises(ValueError, match=f"model {name} (has|is)"):
            create(name)
    with pytest.raises(ValueError, match=r"unknown model 'vgg'; the models are deit_base"):
        create("vgg")


@pytest.mark.parametrize("name", ["deit_desk", "t2t_vit_7"])
def test_counted_cost_is_what_is_executed(name):
    with torch.device("meta"):
        model = create(name, num_classes=10)
        images = torch.zeros(2, 3, *model.image_size)
    model.fix_blocks((True,) * len(model.blocks))
    executed = count_operations(model, images).executed.macs
    head = 2 * model.embed_dim * 10
    if name == "deit_desk":
        assert executed - head == model.embed_macs(2) + len(model.blocks) * sum(model.block_macs(2))
    else:  # the tokens-to-token stage is counted by rules of its own
        blocks = len(model.blocks) * sum(model.block_macs(2))
        del model.blocks[:]
        assert executed - count_operations(model, images).executed.macs == blocks


def test_a_gate_must_be_strictly_above_to_run(model, images):
    with torch.no_grad():
        model.block_skip_gating[1] = torch.tensor([0.5, 0.5])
        out = model(images)
        assert model.runs() == (True, False, True)
        del model.blocks[1]
        model.fix_blocks((True, True))
        assert torch.equal(model(images), out)


def test_fixed_blocks_read_nothing(model, images):
    with torch.no_grad():
        model.fix_blocks()
        before = model(images)
        model.block_skip_gating.fill_(0)
        assert torch.equal(model(images), before)
        model.running = None
        assert not torch.equal(model(images), before)


def test_removed_patches_are_not_there(model, images):
    model.add_patch_gates()
    with torch.no_grad():
        model.patch_gating[0, 10:] = -1.0
        model.gates.patch = "remove"
        removed = model(images)
        kept = model.patch_embed(images)[:, :10] * model.patch_gating[:, :10].sigmoid()
        tokens = torch.cat([model.cls_token.expand(3, -1, -1), kept], 1) + model.pos_embed[:, :11]
        for block in model.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(removed, model.head(model.norm(tokens)[:, 0]))
        model.gates.patch = "soft"
        assert not torch.allclose(model(images), removed)
        model.patch_gating.fill_(-1.0)
        model.gates.patch = "remove"
        assert model(images).isfinite().all()  # the class token alone


def test_gates_that_are_missing_are_named(model, images):
    model.gates.patch = "soft"
    with pytest.raises(RuntimeError, match=r"add_patch_gates\(\) first"):
        model(images)
    with pytest.raises(RuntimeError, match=r"add_token_scores\(\) first"):
        create("t2t_vit_7", img_size=32)(torch.zeros(1, 3, 32, 32), tau=1.0)
    with pytest.raises(ValueError, match="gumbel, soft_l0 or softmax"):
        gate_weights(torch.zeros(2), "hard")


def test_gates_of_block_halves_change_nothing(model, images):
    before = model(images)
    with torch.no_grad():
        for block in model.blocks:
            block.attn_skip_gating.fill_(5)
            block.mlp_skip_gating.fill_(-5)
    assert torch.equal(model(images), before)


def test_weights_of_gates():
    gates = torch.tensor([[-1.0, 1.0], [2.0, 0.0]])
    for mode in ("gumbel", "soft_l0", "softmax"):
        torch.testing.assert_close(gate_weights(gates, mode).sum(-1), torch.ones(2))
    assert gate_weights(gates, "soft_l0")[1].tolist() == [1.0, 0.0]
    torch.manual_seed(3)
    ours = gumbel_softmax(gates, 0.5, hard=True)
    torch.manual_seed(3)
    assert torch.equal(ours, torch.nn.functional.gumbel_softmax(gates, 0.5, hard=True))
    many = gate_weights(gates[:1].expand(4000, 2), "gumbel", hard=True)[:, 1].mean()
    assert abs(float(many) - torch.tensor(2.0).sigmoid()) < 0.02  # the probability that a new gate runs its block


def test_selected_tokens():
    tokens, scores = torch.ones(2, 10, 3), torch.randn(2, 10, requires_grad=True)
    kept = select_tokens(tokens, scores, tau=1.0, ratio=0.45)
    assert set((kept.sum(-1) > 0.5).sum(1).tolist()) <= {4, 5}  # four, and the first besides
    assert (kept[:, 0] == 1).all()
    (kept[..., 0] * torch.randn(2, 10)).sum().backward()
    assert scores.grad is not None
    assert float(scores.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="from 0 to 1"):
        select_tokens(tokens, scores, tau=1.0, ratio=1.5)


def test_masks_cover_every_weight_and_zero_it():
    model = register_masks(create("deit_desk", depth=1))
    model.blocks[0].mlp.fc1.mask[3] = 0
    register_masks(model)  # keeps what is there
    apply_masks_(model)
    assert not model.blocks[0].mlp.fc1.weight[3].any()
    weights = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")}
    assert weights == {name.removesuffix(".mask") for name, _ in model.named_buffers()}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("deit_desk8", 30, "--img_size 30: patches of 8 pixels do not fill it; give a multiple, such as 32"),
        ("deit_desk", (32, 42), "--img_size 42: patches of 4 pixels"),
        ("t2t_vit_7", 40, "--img_size 40: patches of 16 pixels do not fill it; give a multiple, such as 32"),
    ],
)
def test_sizes_that_patches_do_not_fill_are_refused(name, size, message):
    with torch.device("meta"), pytest.raises(UsageError, match=re.escape(message)):
        create(name, img_size=size)


@pytest.mark.parametrize("size", [48, (32, 48)])
def test_other_input_sizes(size):
    model = create("deit_desk", img_size=size, depth=1).eval()
    shape = (size, size) if isinstance(size, int) else size
    assert model(torch.zeros(1, 3, *shape)).shape == (1, 10)
    assert model.num_patches == shape[0] * shape[1] // 16
    with pytest.raises(Exception, match="32"):
        model(torch.zeros(1, 3, 32, 32))


def test_performer_tokens_keep_to_half_precision():
    """Sums over thousands of tokens and e^16 do not fit float16: the stage computes them in float32."""
    stage = create("t2t_vit_7").tokens_to_token.eval()
    images = 4 * torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        exact = stage(images)
        half = stage.half()(images.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_what_is_not_finite_stays_in_its_image(model, images):
    check_images_apart(model, images, atol=1e-11)
    check_images_apart(create("t2t_vit_7", num_classes=10, depth=1).eval(), torch.randn(3, 3, 224, 224))

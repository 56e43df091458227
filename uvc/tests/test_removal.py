"""Physical removal: the same outputs, the counted cost, and everything that a structure can be."""

import pytest
import torch

from common.measure.flops import count_operations, count_parameters
from uvc.models.compact import BlockShape, CompactAttention, CompactConfig, Constant, padded
from uvc.models.gates import apply_masks_
from uvc.pruning import blocks_of
from uvc.removal import compress
from uvc.tests.random_structures import make_stale_, random_network
from uvc.tests.test_real_cost import padding_macs

SMALL = {"img_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 4}
T2T = {"name": "t2t_vit_7", "img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 4, "token_dim": 8}


def images(model, batch=2):
    return torch.randn(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
def check(model, **options):
    """Compress, compare logits with the masked network's, and what runs with what is counted."""
    compressed = compress(model, **options)
    apply_masks_(model)
    batch = images(model)
    want, got = model(batch), compressed.network(batch)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()
    network = compressed.network
    executed = count_operations(network, batch[:1]).executed.macs
    assert executed == network.count().published.macs + padding_macs(network.config)
    return compressed


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("multiple", [1, 8])
def test_any_structure_gives_the_same_logits(seed, multiple):
    model, _, _ = random_network(seed, **SMALL, distilled=seed % 2 == 1)
    if seed >= 3:
        make_stale_(model, seed)
    compressed = check(model, multiple=multiple)
    assert count_parameters(compressed.network) < count_parameters(model)
    batch = images(model)
    with torch.no_grad():
        want = compressed.network(batch)
        for size in (1, 16):
            network = padded(compressed.network, size)
            assert (network(batch) - want).abs().max() < 1e-12 * want.abs().max()
            assert count_operations(network, batch[:1]).executed.macs == network.count().published.macs + padding_macs(
                network.config
            )
            mine, other = network.count().published, compressed.network.count().published
            assert all(mine[kind] == other[kind] for kind in ("linear", "matmul", "conv", "head"))
            exact = zip(padded(network, 1).parameters(), padded(compressed.network, 1).parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in exact)
    assert any(shape.full_values for shape in padded(compressed.network).config.blocks)


@pytest.mark.parametrize("patch", ["soft", "hard", "remove"])
def test_patch_gates(patch):
    model, _, _ = random_network(7, **SMALL, patch=patch)
    network = check(model).network
    kept = int((model.patch_gating >= 0).sum())
    assert network.config.tokens == (1 + kept if patch == "remove" else 17)
    if patch == "hard":
        assert len(network.config.positions) == kept + int(model.patch_gating[0, 0, 0] < 0)


@pytest.mark.parametrize("patch", ["off", "remove"])
def test_t2t_vit(patch):
    model, _, _ = random_network(3, **T2T, patch=patch)
    check(model)


def test_no_patch_left():
    model, _, _ = random_network(1, **SMALL, patch="remove")
    with torch.no_grad():
        model.patch_gating.fill_(-1)
    assert check(model).structure.patches == ()


def test_another_scale_is_kept():
    model, _, _ = random_network(3, **T2T, scale=0.25)
    assert check(model).network.config.scale == 0.25


@pytest.mark.parametrize("first", [True, False])
def test_the_sum_of_all_blocks_counts_skipped_ones(first):
    model, _, _ = random_network(2, **SMALL)
    with torch.no_grad():
        model.block_skip_gating[2] = torch.tensor([1.0, -1.0])
        if first:
            model.block_skip_gating[0] = torch.tensor([1.0, -1.0])
    model.gates.jumping = True
    check(model)


def test_nothing_left_of_a_branch_a_block_and_the_network():
    model, _, _ = random_network(1, **SMALL)
    with torch.no_grad():
        model.block_skip_gating.copy_(torch.tensor([-1.0, 1.0]).expand(4, 2))
        blocks_of(model)[0].attn.proj.get_buffer("mask").zero_()
        blocks_of(model)[1].mlp.fc2.get_buffer("mask").zero_()
        blocks_of(model)[2].attn.proj.get_buffer("mask").zero_()
        blocks_of(model)[2].mlp.fc1.get_buffer("mask").zero_()
    network = check(model).network
    assert isinstance(network.blocks[0].attn, Constant)
    assert isinstance(network.blocks[1].mlp, Constant)
    assert isinstance(network.blocks[2].mlp, Constant)
    with torch.no_grad():
        model.block_skip_gating.copy_(torch.tensor([0.5, 0.5]).expand(4, 2))  # equal is not enough to run
    assert len(check(model).network.blocks) == 0


def test_masked_value_rows_become_constants():
    """A mask of qkv alone, as structured baselines have it: the head's output is the bias of its values."""
    model, _, _ = random_network(5, **SMALL)
    with torch.no_grad():
        for block in blocks_of(model):
            block.attn.proj.get_buffer("mask").fill_(1)
            block.attn.qkv.get_buffer("mask").fill_(1)
            for part in range(3):
                block.attn.qkv.get_buffer("mask")[part * 32 + 8 : part * 32 + 16] = 0
    compressed = check(model)
    assert compressed.structure.blocks[0].heads == (0, 2, 3)


def test_unstructured_masks_are_multiplied_in():
    model, _, _ = random_network(4, **SMALL)
    with torch.no_grad():
        for name, mask in model.named_buffers():
            if name.endswith("qkv.mask") or name == "head.mask":
                mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    check(model)


def test_dropping_patches_is_the_network_that_removes_them():
    model, _, _ = random_network(6, **SMALL, patch="soft")
    batch = images(model)
    with torch.no_grad():
        dropped = compress(model, drop_patches=True).network(batch)
        apply_masks_(model)
        soft = model(batch)
        model.gates.patch = "remove"
        assert (dropped - model(batch)).abs().max() < 1e-12
        assert (dropped - soft).abs().max() > 1e-6


def test_what_cannot_be_removed_is_refused():
    model, _, _ = random_network(0, **SMALL)
    with pytest.raises(ValueError, match="no patch_gating"):
        compress(model, drop_patches=True)
    model.gates.block_gating = True
    with pytest.raises(ValueError, match="only hard gates"):
        compress(model)


@pytest.mark.parametrize("widths", [(4, 4), (1, 3), (2, 2), (4, 1)])
def test_attention_of_any_widths(widths):
    """Against the sums written out, head by head."""
    torch.manual_seed(0)
    layer = CompactAttention(6, 4, BlockShape(widths, 0, multiple=2)).double()
    x = torch.randn(2, 5, 6).double()
    qkv, start, heads = layer.qkv(x), 16, []
    for head, width in enumerate(widths):
        q, k = qkv[..., 4 * head : 4 * head + 4], qkv[..., 8 + 4 * head : 12 + 4 * head]
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ qkv[..., start : start + width])
        start += width
    mixed = torch.cat(heads, dim=-1)
    padding = layer.proj.in_features - mixed.shape[-1]
    with torch.no_grad():
        layer.proj.weight[:, mixed.shape[-1] :] = 0
    want = layer.proj(torch.cat([mixed, mixed.new_zeros(2, 5, padding)], dim=-1))
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="keeps at least one dimension"):
        BlockShape((3, 0), 5)
    with pytest.raises(ValueError, match="1 to 4 value dimensions"):
        CompactAttention(6, 4, BlockShape((5,), 0))
    with pytest.raises(ValueError, match="not the description"):
        CompactConfig.from_dict({"blocks": [{"heads": 3}], "image_size": [4, 4]})


def test_a_wrong_image_size_is_refused():
    model, _, _ = random_network(0, **SMALL)
    with pytest.raises(ValueError, match=r"takes images of 16x16"):
        compress(model).network(torch.zeros(1, 3, 32, 32).double())

"""Evo-ViT beyond the reference vectors: what skips and what is carried, training, precision, cost, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.measure.flops import CONVENTIONS, count_operations
from common.tests.reference import fill_
from hourglass_swag.models import create
from hourglass_swag.models.evo_vit import EvoEncoderBlock, EvoViT, attend_with_class_row, count_processed, easy_gather
from hourglass_swag.models.vision_transformer import VisionTransformer
from hourglass_swag.tests.counting import published_ops
from hourglass_swag.tools.flop_count import flop_count

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 64,
    "num_classes": 10,
}


def make(**options: Any) -> EvoViT:
    model = EvoViT(**SMALL, **options)
    fill_(model, 3)
    return model.eval()


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def make_block(ratio: float, tradeoff: float = 0.5) -> EvoEncoderBlock:
    block = EvoEncoderBlock(4, 32, 64, 0.0, 0.0, ratio, tradeoff)
    fill_(block, 3)
    return block.eval()


def test_the_class_row_is_that_of_the_whole_map():
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    out, row = attend_with_class_row(q, k, v)
    weights = (q @ k.mT / 8**0.5).softmax(3)
    torch.testing.assert_close(out, weights @ v)
    torch.testing.assert_close(row, weights.mean(1)[:, 0])


@torch.no_grad()
def test_skipped_patches_are_carried_unchanged():
    x, a = torch.randn(17, 2, 32), torch.rand(2, 16)
    y, after = make_block(0.4)(x, a)
    n = count_processed(16, 0.4)
    assert n == 6
    order = a.argsort(dim=1, descending=True)
    patches = easy_gather(x[1:].transpose(0, 1), order)
    assert torch.equal(y[1 + n :].transpose(0, 1), patches[:, n:])
    assert torch.equal(after[:, n:], a.gather(1, order)[:, n:])
    assert not torch.isclose(y[: 1 + n].transpose(0, 1)[:, 1:], patches[:, :n]).any()


@torch.no_grad()
def test_those_that_go_through_see_only_each_other():
    x, a = torch.randn(17, 1, 32), torch.rand(1, 16)
    y, _ = make_block(0.5)(x, a)
    chosen = torch.cat([x[:1], x[1:][a[0].argsort(descending=True)[:8]]])
    torch.testing.assert_close(y[:9], make_block(1.0)(chosen)[0])


@torch.no_grad()
def test_the_tradeoff_mixes():
    x, a = torch.randn(17, 2, 32), torch.rand(2, 16)
    row = make_block(1.0)(x)[1]
    assert torch.equal(make_block(1.0, 0.0)(x, a)[1], a)
    assert torch.equal(make_block(1.0, 1.0)(x, a)[1], row)
    torch.testing.assert_close(make_block(1.0, 0.25)(x, a)[1], 0.75 * a + 0.25 * row)


@torch.no_grad()
def test_no_pruning_is_the_dense_model_and_only_the_class_token_may_remain():
    model = make()
    dense = VisionTransformer(**SMALL).eval()
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), dense(images()))
    assert make(prune_ratio=0.05, prune_location=2)(images()).isfinite().all(), "0.05 of 16 patches is none"


@torch.no_grad()
def test_images_do_not_see_each_other():
    model, x = make(prune_ratio=0.5, prune_location=1), images(3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_training_and_evaluation_agree_and_gradients_flow():
    model, x = make(prune_ratio=0.5, prune_location=2), images()
    evaluated = model(x)
    trained = model.train()(x)
    torch.testing.assert_close(evaluated, trained)
    for output in (evaluated, trained):
        model.zero_grad()
        output.square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    make(prune_ratio=0.5, prune_location=2, dropout_rate=0.1, attention_dropout_rate=0.1).train()(x).sum().backward()


def test_a_pruned_layer_leaves_its_input_alone():
    x = torch.randn(17, 1, 32)
    before = x.clone()
    with torch.no_grad():
        make_block(0.5)(x, torch.rand(1, 16))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    model, x = make(prune_ratio=0.5, prune_location=2), images()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert (half - exact).abs().max() < 0.6 * exact.abs().max()


@torch.no_grad()
def test_odd_sizes_and_no_class_token():
    model = EvoViT(**(SMALL | {"image_size": 24}), prune_ratio=0.7, prune_location=1).eval()
    assert model(images(1, 24)).shape == (1, 10)
    assert EvoViT(**SMALL, classifier="gap", prune_ratio=0.7, prune_location=1).eval()(images(1)).shape == (1, 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prune_ratio": 0.5, "prune_location": 2},
        {"prune_ratio": [1, 0.7, 1, 0.3], "tradeoff": [0.5, 0.2, 0.8, 1]},
        {"prune_ratio": [1, 0.7, 1, 1]},
    ],
)
def test_cost_on_the_meta_device(options):
    with torch.device("meta"):
        model, x = EvoViT(**SMALL, **options).eval(), torch.empty(1, 3, 32, 32)
    counted = count_operations(model, x)
    counts, blocks = counted.published, model.encoder.blocks()  # type: ignore[operator]
    rows = [1 + count_processed(16, block.prune_ratio) for block in blocks[: model.encoder.last_pruned]]
    assert counted.executed.macs - counts.macs == 32 * sum(rows), "the class row beside fused attention"
    assert round(1e9 * sum(flop_count(model, (x,)).values())) == CONVENTIONS["swag"].total(counts)
    with torch.device("meta"):
        dense = VisionTransformer(**SMALL)
    saved = any(block.prune_ratio != 1 for block in model.encoder.blocks())  # type: ignore[operator]
    assert (CONVENTIONS["swag"].total(counts) < CONVENTIONS["swag"].total(published_ops(dense))) == saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 0.5, "prune_location": 0}, r"--evo_prune_location\) must be 1 to 3, got 0: the first layer"),
        ({"prune_ratio": 0.5, "prune_location": 4}, r"--evo_prune_location\) must be 1 to 3, got 4"),
        ({"prune_ratio": 0.0}, r"--evo_prune_ratio\), the kept fraction, must be in \(0, 1\], got 0.0"),
        ({"prune_ratio": 1.2}, r"must be in \(0, 1\], got 1.2"),
        ({"prune_ratio": [0.5, 1, 1, 1]}, "the first layer cannot prune"),
        ({"prune_ratio": [1, 0.5]}, "one for each of 4 layers, got 2"),
        ({"tradeoff": [0.5]}, "one for each of 4 layers, got 1"),
        ({"tradeoff": 1.5}, r"--evo_tradeoff\) must be in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EvoViT(**SMALL, **options)


def test_unknown_keywords_and_missing_scores():
    with pytest.raises(TypeError, match="keep_rate"):
        create("evo_vit_l16_in1k", keep_rate=0.5)
    with pytest.raises(ValueError, match="needs the class attention"):
        make_block(0.5)(torch.randn(17, 1, 32))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_equals_eager():
    model, x = make(prune_ratio=0.5, prune_location=1), images(1)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()

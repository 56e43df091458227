"""Evo-ViT beyond the reference vectors: what skips and what is carried, training, precision, cost, bad input."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common.hosts import PlanError, Tokens, lean
from common.hosts.host import take_tokens
from common.hosts.runner import attend
from common.measure.flops import CONVENTIONS, count_operations
from common.tests.reference import fill_, image
from hourglass_swag.host import SwagBlock
from hourglass_swag.models import create
from hourglass_swag.models.evo_vit import Evolution, EvoViT, count_processed
from hourglass_swag.models.ops.class_row import score_class_row
from hourglass_swag.models.vision_transformer import EncoderBlock, VisionTransformer
from hourglass_swag.tests import counting
from hourglass_swag.tests.counting import images, published_ops, rotating, steps, timm
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

evo_vit = partial(counting.make, "evo_vit")


def make(**options: Any) -> Any:
    return fill_(evo_vit(**SMALL, **options), 3).eval()


def view_of_block() -> SwagBlock:
    return SwagBlock(fill_(EncoderBlock(4, 32, 64, 0.0, 0.0), 3).eval(), "block")


def run_block(
    x: Tensor,
    ratio: float,
    attention: Tensor | None = None,
    tradeoff: float = 0.5,
    prefix: int = 1,
    *,
    representative: bool = False,
) -> tuple[Tokens, Tensor]:
    """One layer with its steps: what leaves it, and the class attention; a later layer prunes."""
    method, view = EvoViT((ratio, 0.5), None, (tradeoff, 0.5), representative), view_of_block()
    tokens = Tokens(x, prefix, None, carried={} if attention is None else {"evo_vit": Evolution(attention)})
    tokens = tokens if ratio == 1 else method.before(0, tokens)
    parts = view.qkv(tokens.x, None)
    tokens = method.between(0, tokens.update(x=tokens.x + view.project(attend(parts, tokens), parts)), parts)
    tokens = tokens.update(x=tokens.x + view.mlp(tokens.x))
    tokens = tokens if ratio == 1 else method.after(0, tokens)
    return tokens, tokens.carried["evo_vit"].attention


@torch.no_grad()
def test_the_class_row_is_that_of_the_whole_map():
    q, k = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(2))
    weights = (q @ k.mT / 8**0.5).softmax(3)
    torch.testing.assert_close(score_class_row(q, k), weights.mean(1)[:, 0])
    x = torch.randn(2, 17, 32)
    parts = view_of_block().qkv(x, None)
    weights = (parts.q @ parts.k.mT * parts.scale).softmax(3)
    torch.testing.assert_close(run_block(x, 1.0)[1], weights.mean(1)[:, 0, 1:])
    torch.testing.assert_close(run_block(x, 1.0)[0].x, view_of_block().block(x, None))


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 3])
def test_skipped_patches_are_carried_unchanged(prefix):
    x, a = torch.randn(2, prefix + 16, 32), torch.rand(2, 16)
    tokens, after = run_block(x, 0.4, a, prefix=prefix)
    n = count_processed(16, 0.4)
    assert n == 6
    order = a.argsort(dim=1, descending=True)
    patches = take_tokens(x[:, prefix:], order)
    assert torch.equal(tokens.x[:, prefix + n :], patches[:, n:])
    assert torch.equal(after[:, n:], a.gather(1, order)[:, n:])
    assert not torch.isclose(tokens.x[:, prefix : prefix + n], patches[:, :n]).any()


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 3])
def test_skipped_patches_take_the_update_of_their_representative(prefix):
    """It is the mean of the others by their class attention, and enters the block as one token more."""
    x, a = torch.randn(2, prefix + 16, 32), torch.rand(2, 16)
    tokens, after = run_block(x, 0.4, a, prefix=prefix, representative=True)
    n, order = count_processed(16, 0.4), a.argsort(dim=1, descending=True)
    patches, weights = take_tokens(x[:, prefix:], order), a.gather(1, order)[:, n:, None]
    mean = (patches[:, n:] * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    entering = torch.cat([x[:, :prefix], patches[:, :n], mean], dim=1)
    left = view_of_block().block(entering, None)
    torch.testing.assert_close(tokens.x[:, : prefix + n], left[:, :-1])
    torch.testing.assert_close(tokens.x[:, prefix + n :], patches[:, n:] + (left[:, -1:] - mean))
    assert torch.equal(after[:, n:], a.gather(1, order)[:, n:])


@torch.no_grad()
def test_those_that_go_through_see_only_each_other():
    x, a = torch.randn(1, 17, 32), torch.rand(1, 16)
    tokens, _ = run_block(x, 0.5, a)
    chosen = torch.cat([x[:, :1], x[:, 1:][:, a[0].argsort(descending=True)[:8]]], dim=1)
    torch.testing.assert_close(tokens.x[:, :9], run_block(chosen, 1.0)[0].x)


@torch.no_grad()
def test_the_tradeoff_mixes():
    x, a = torch.randn(2, 17, 32), torch.rand(2, 16)
    row = run_block(x, 1.0)[1]
    assert torch.equal(run_block(x, 1.0, a, 0.0)[1], a)
    assert torch.equal(run_block(x, 1.0, a, 1.0)[1], row)
    torch.testing.assert_close(run_block(x, 1.0, a, 0.25)[1], 0.75 * a + 0.25 * row)


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
    x = torch.randn(1, 17, 32)
    before = x.clone()
    with torch.no_grad():
        run_block(x, 0.5, torch.rand(1, 16), representative=True)
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
    model = evo_vit(**(SMALL | {"image_size": 24}), prune_ratio=0.7, prune_location=1).eval()
    assert model(images(1, 24)).shape == (1, 10)
    with pytest.raises(PlanError, match="evo_vit needs a class token, which VisionTransformer has not"):
        evo_vit(**SMALL, classifier="gap", prune_ratio=0.7, prune_location=1)
    assert evo_vit(**SMALL, classifier="gap").eval()(images(1)).shape == (1, 10), "nothing is pruned"


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
        model, x = evo_vit(**SMALL, **options).eval(), torch.empty(1, 3, 32, 32)
    counted, method = count_operations(model, x), model.methods[0]
    counts = counted.published
    scored = [step.layer for step in model.plan.steps if step.hook == "between"]
    rows = [1 + count_processed(16, method.keep[layer]) for layer in scored]
    assert scored == list(range(max([layer for layer, keep in enumerate(method.keep) if keep < 1], default=0)))
    assert counted.executed.macs - counts.macs == 32 * sum(rows), "the class row beside fused attention"
    assert round(1e9 * sum(flop_count(model, (x,)).values())) == CONVENTIONS["swag"].total(counts)
    with torch.device("meta"):
        dense = VisionTransformer(**SMALL)
    saved = any(keep != 1 for keep in method.keep)
    assert (CONVENTIONS["swag"].total(counts) < CONVENTIONS["swag"].total(published_ops(dense))) == saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_ratio": 0.5, "prune_location": 0}, r"--evo_prune_location\) must be 1 to 3, got 0: the first layer c"),
        ({"prune_ratio": 0.5, "prune_location": 4}, r"--evo_prune_location\) must be 1 to 3, got 4"),
        ({"prune_ratio": 0.0}, r"--evo_prune_ratio\), the kept fraction, must be in \(0, 1\], got 0.0"),
        ({"prune_ratio": 1.2}, r"must be in \(0, 1\], got 1.2"),
        ({"prune_ratio": [0.5, 1, 1, 1]}, r"--evo_prune_ratio\) must begin with 1, got 0.5: the first layer cannot"),
        ({"prune_ratio": [1, 0.5]}, r"keep \(--evo_prune_ratio\) must be a number or one for each of 4 layers, got 2"),
        ({"tradeoff": [0.5]}, r"tradeoff \(--evo_tradeoff\) must be a number or one for each of 4 layers, got 1"),
        ({"tradeoff": 1.5}, r"--evo_tradeoff\) must be in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(PlanError, match=message):
        evo_vit(**SMALL, **options)


def test_unknown_keywords():
    with torch.device("meta"), pytest.raises(TypeError, match="keep_rate"):
        create("evo_vit_l16_in1k", keep_rate=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "layer .* must be 1 to 3, got 0"),
        ({"layer": 1.5}, "layer must be a whole number or None, got 1.5"),
        ({"keep": 0}, r"keep .* must be in \(0, 1\], got 0"),
        ({"keep": (0.5, 1, 1, 1)}, "keep .* must begin with 1, got 0.5"),
        ({"keep": float("nan")}, r"keep .* must be in \(0, 1\], got nan"),
        ({"keep": "half"}, "keep must be a number or a tuple of numbers, got 'half'"),
        ({"tradeoff": -0.1}, r"tradeoff .* must be in \[0, 1\], got -0.1"),
        ({"representative": True, "fast": 3}, "evo_vit has no setting 'fast'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        lean(timm(), "evo_vit", **settings)


def test_defaults_and_the_published_settings():
    keep = (1.0, 0.5, 0.5, 0.5)
    assert lean(timm(), "evo_vit").methods == (EvoViT(keep, None, (0.5,) * 4, representative=True),)
    assert lean(timm(), "evo_vit", preset="swag").methods == (EvoViT(keep, None, (0.5,) * 4, representative=False),)
    assert make(prune_ratio=0.7, prune_location=2).methods == (
        EvoViT((1.0, 1.0, 0.7, 0.7), 2, (0.5,) * 4, representative=False),
    )


@torch.no_grad()
@pytest.mark.parametrize("representative", [False, True])
@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}], ids=str)
def test_features_are_in_their_places_and_no_image_sees_another(representative, prefix):
    net, x = timm(**prefix), image(3, 24)
    fast = lean(net, "evo_vit", keep=0.5, layer=2, representative=representative)
    first = 37 + prefix.get("reg_tokens", 0)
    assert fast.tokens_per_layer() == [first, first, *[first - 18 + representative] * 2, first]
    features = fast.features(x)
    assert features.shape == (3, 16, 6, 6)
    assert features.isfinite().all()
    torch.testing.assert_close(fast.features(x[1:2]), features[1:2], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 3])
def test_patches_that_skip_the_last_layer_are_those_of_before(layer):
    net, x = timm(), image(2, 24)
    fast = lean(net, EvoViT(keep=0.5, layer=layer, representative=False))
    with steps(fast) as seen:
        features = fast.forward_features(x)[:, 1:]
    entering = [operands[0] for step, operands, _ in seen if step.hook == "before"][-1]
    state = entering.carried["evo_vit"]
    assert (state.order is None) == (layer == 3)
    patch = torch.arange(36).expand(2, -1) if state.order is None else state.order
    before = torch.zeros_like(features).scatter(1, patch[..., None].expand_as(features), net.norm(entering.x)[:, 1:])
    slow = patch.gather(1, state.attention.argsort(dim=1)[:, :18])
    skipped = torch.zeros(2, 36, dtype=torch.bool).scatter(1, slow, True)
    assert torch.equal(features[skipped], before[skipped])
    assert not torch.isclose(features[~skipped], before[~skipped]).all(1).any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("make_net", "tolerance"),
    [(timm, 1e-12), (partial(timm, reg_tokens=2), 1e-12), (rotating, 1e-5)],
    ids=["plain", "registers", "rotating"],
)
def test_a_representative_of_one_patch_is_that_patch(make_net, tolerance):
    """So nothing changes, in whatever order the patches travel, with their rotation where the network has one."""
    net, x = make_net(), image(2, 24)
    fast = lean(net, EvoViT(keep=(1, 0.99, 1, 0.99)))
    dense = net.forward_features(x)
    with steps(fast) as seen:
        torch.testing.assert_close(fast.forward_features(x), dense, rtol=0, atol=tolerance)
    assert sum(step.hook == "before" for step, *_ in seen) == 2
    torch.testing.assert_close(fast(x), net(x), rtol=0, atol=tolerance)
    carried = lean(net, EvoViT(keep=(1, 0.99, 1, 0.99), representative=False))
    assert not torch.isclose(carried.forward_features(x), dense, rtol=0, atol=10 * tolerance).all(2).any()


@torch.no_grad()
@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}], ids=str)
def test_nothing_pruned_is_the_network(prefix):
    net = timm(**prefix)
    for method in (EvoViT(keep=1.0), EvoViT(keep=(1.0, 1.0, 1.0, 1.0), tradeoff=0.1)):
        torch.testing.assert_close(lean(net, method)(image(2, 24)), net(image(2, 24)), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("representative", [False, True])
def test_a_network_that_rotates(representative):
    fast, x = lean(rotating(), "evo_vit", layer=1, representative=representative), image(2, 24)
    features = fast.features(x)
    assert features.isfinite().all()
    torch.testing.assert_close(fast.features(x[:1]), features[:1], rtol=0, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_equals_eager():
    model, x = make(prune_ratio=0.5, prune_location=1), images(1)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()

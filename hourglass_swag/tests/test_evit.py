"""EViT: what is kept and fused, both scores, costs, precisions, and what is refused."""

import itertools
import math
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from common.hosts import Parts, PlanError, Tokens, lean
from common.hosts.runner import attend
from common.measure.flops import CONVENTIONS, count_operations
from common.tests.reference import array, build, image
from hourglass_swag import models
from hourglass_swag.host import SwagBlock, publish
from hourglass_swag.models import evit
from hourglass_swag.models.evit import EViT, attend_and_score, complement_idx
from hourglass_swag.models.ops.mean_attention import HAS_TRITON, has_kernel, mean_attention
from hourglass_swag.models.vision_transformer import EncoderBlock, VisionTransformer
from hourglass_swag.tests.counting import make, steps, timm, tokens_per_layer
from hourglass_swag.tools.flop_count import flop_count

TINY: dict[str, Any] = {
    "image_size": 24,
    "patch_size": 4,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 32,
    "num_classes": 5,
}
BLOCK = {"num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(array(name, shape))


def network(keep_rate: tuple[float, ...], score: Any = "mean", fuse: bool = False, **options: Any) -> Any:
    rates = {layer: rate for layer, rate in enumerate(keep_rate) if rate < 1}
    method = EViT(tuple(rates.values()), tuple(rates), fuse=fuse, score=score)
    return publish(VisionTransformer(**TINY | options), method)


def tiny(keep_rate: tuple[float, ...] = (1, 0.5, 0.7), **options: Any) -> Any:
    return build(partial(network, keep_rate), 1, **options)


def weights_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)


@pytest.mark.parametrize("rows", [1, 4, 9, 100])
def test_blocks_of_queries_give_attention_and_its_mean(rows):
    q, k, v = (draw(name, 2, 3, 9, 4) for name in "qkv")
    out, scores = attend_and_score(q, k, v, rows=rows)
    weights = weights_of(q, k)
    torch.testing.assert_close(out, weights @ v)
    torch.testing.assert_close(scores, weights.mean((1, 2)))
    torch.testing.assert_close(scores.sum(1), torch.ones(2, dtype=torch.float64))


def test_the_paper_s_score_is_the_class_row():
    view, x = SwagBlock(build(EncoderBlock, 1, **BLOCK), "block"), draw("x", 2, 10, 16)
    tokens, parts = Tokens(x, 1, None), view.qkv(x, None)
    weights = weights_of(parts.q, parts.k)
    with torch.no_grad():
        scores, places = EViT((0.5,), (0,), score="class").rank(0, tokens, parts, all_of_them=True)
        torch.testing.assert_close(scores, weights[:, :, 0].mean(1).gather(1, places))
        assert (scores.diff(dim=1) <= 0).all()
        assert places.sort(dim=1).values.tolist() == [list(range(1, 10))] * 2
        heads, _, scored = EViT((0.5,), (0,), score="mean").attend(0, tokens, parts)
    torch.testing.assert_close(heads, attend(parts, tokens))
    torch.testing.assert_close(scored.scores, weights.mean((1, 2)))
    assert not torch.allclose(scored.scores.gather(1, places), scores)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_best_stay_best_first_behind_the_prefix(fuse, prefix):
    x, scores = draw("x", 2, prefix + 10, 3), draw("scores", 2, prefix + 10).softmax(1)
    parts = Parts(x[:, None], x[:, None], x[:, None], 1.0, scores=scores)
    left = EViT((0.35,), (0,), fuse=fuse, score="mean").between(0, Tokens(x, prefix, (2, 5)), parts)
    assert left.x.shape == (2, prefix + 4 + fuse, 3)
    assert left.grid is None
    for i in range(2):
        best = scores[i, prefix:].argsort(descending=True) + prefix
        kept = [*range(prefix), *best[:4].tolist()]
        assert left.undo[0].index[i].tolist() == kept  # pyright: ignore
        assert torch.equal(left.x[i, : prefix + 4], x[i, kept])
        if fuse:
            torch.testing.assert_close(left.x[i, -1], (scores[i, best[4:], None] * x[i, best[4:]]).sum(0))


def test_keep_rate_one_is_the_dense_model():
    dense = build(VisionTransformer, 1, **TINY)
    for rates, score in itertools.product([(1, 1, 1), (1, 0.99, 1)], ["mean", "class"]):
        model = tiny(rates, score=score)
        assert tokens_per_layer(model) == [37] * 4
        assert list(model.state_dict()) == list(dense.state_dict())
        with torch.no_grad():
            logits, expected = model(image(2, 24)), dense(image(2, 24))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-14)
        assert torch.equal(logits, expected) or rates[1] < 1, "a block without a step is the network's own"


def test_complement():
    idx = torch.tensor([[[4, 0], [1, 2]]])
    assert complement_idx(idx, 5).tolist() == [[[1, 2, 3], [0, 3, 4]]]
    assert complement_idx(idx[..., :0], 2).tolist() == [[[0, 1], [0, 1]]]


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"score": "class"}, {"classifier": "gap"}], ids=str)
def test_costs_are_those_executed(options):
    with torch.device("meta"):
        model = network((0.3, 1, 0.77), **options).eval()
        images = torch.empty(1, 3, 24, 24)
    counted, tokens = count_operations(model, images), tokens_per_layer(model)
    assert counted.executed == counted.published
    C, M, macs = TINY["hidden_dim"], TINY["mlp_dim"], 36 * 48 * TINY["hidden_dim"] + 5 * TINY["hidden_dim"]
    for before, after in itertools.pairwise(tokens):
        macs += before * 4 * C * C + 2 * before**2 * C + after * 2 * C * M
        macs += before * C if after < before and options.get("score") == "class" else 0
    assert counted.executed.macs == macs, "by hand: block(N, U)"
    assert round(1e9 * sum(flop_count(model, (images,)).values())) == CONVENTIONS["swag"].total(counted.published)


def test_no_layer_that_keeps_all_sees_attention_weights(monkeypatch):
    calls: list[int] = []
    whole = evit.attend_and_score
    monkeypatch.setattr(evit, "attend_and_score", lambda q, *rest, **more: calls.append(1) or whole(q, *rest, **more))
    model = tiny((1, 0.5, 1))
    with torch.no_grad():
        model(image(1, 24))
    assert len(calls) == 1


def test_an_image_alone_is_the_image_in_a_batch():
    model = tiny(fuse=True)
    images = image(3, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(images[1:2]), model(images)[1:2])


def test_gradients_reach_every_parameter_also_through_the_fused_token():
    model = tiny(fuse=True).train()
    model(image(2, 24)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_attention_dropout_acts_in_training_alone():
    model = tiny(attention_dropout_rate=0.5)
    with torch.no_grad():
        assert torch.equal(model(image(1, 24)), model(image(1, 24)))
        model.train()
        assert not torch.equal(model(image(1, 24)), model(image(1, 24)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny((1, 0.5, 1), fuse=True)
    with torch.no_grad():
        expected = model(image(2, 24))
        got = model.to(dtype)(image(2, 24).to(dtype))
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() < 0.1 * expected.abs().max()
        with torch.autocast("cpu", dtype):
            assert model.float()(image(2, 24).float()).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"score": "class"}], ids=str)
def test_it_compiles_as_one_graph(options):
    model = tiny(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image(1, 24)), model(image(1, 24)))


def test_default_locations_of_the_sizes():
    with torch.device("meta"):
        large = models.create("e_vit_l16_in1k", image_size=512, base_keep_rate=0.7, drop_loc=[6, 12, 18])
        kept = math.ceil(0.7 * 1024)
        assert tokens_per_layer(large)[5:8] == [1025, 1025, 2 + kept]  # the class default fuses, the command line not
        huge = models.create("e_vit_h14_in1k", image_size=518)
        assert [step.layer for step in huge.plan.steps if step.hook == "between"] == [8, 16, 24]  # pyright: ignore
        desk = models.create("e_vit_desk")
        assert desk.methods == (EViT((0.7,) * 3, (2, 4, 6), fuse=False, score="mean"),)
        assert make("evit", "desk", drop_loc=[5, 2, 5]).methods[0].layers == (2, 5)


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan])
def test_keep_rates_out_of_range(rate):
    with pytest.raises(PlanError, match=r"\(--base_keep_rate\) must be in \(0, 1\], got"):
        make("evit", "desk", base_keep_rate=rate)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"--drop_loc\) must hold layers 0 to 7, got \[-1, 8\]"):
        make("evit", "desk", drop_loc=[3, 8, -1])
    with pytest.raises(ValueError, match=r"score \(--evit_score\) must be one of mean, cls, got 'max'"):
        make("evit", "desk", score="max")
    with pytest.raises(TypeError, match="keep_rates"):
        make("evit", "desk", keep_rates=0.5)
    with pytest.raises(PlanError, match="score 'class' needs a class token, which VisionTransformer has not; take 'm"):
        make("evit", "desk", score="cls", classifier="gap")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep .* must be in \(0, 1\], got 0.0"),
        ({"keep": (0.5, 0.7)}, "keep must be a number, or one for each of 3 layers, got 2"),
        ({"keep": "half"}, "keep must be a number or a tuple of numbers, got 'half'"),
        ({"layers": (1, 4)}, "layers must be a layer, 0 to 3, got 4"),
        ({"layers": (1, 1)}, r"layers must differ, got \(1, 1\)"),
        ({"score": "max"}, "score must be 'class' or 'mean' or None, got 'max'"),
        ({"restore": "zero"}, "restore must be 'nearest' or 'frozen', got 'zero'"),
        ({"rate": 0.5}, "evit has no setting 'rate'.* it has .*keep, layers, fuse, score, restore"),
        ({"preset": "paper"}, "preset must be 'swag'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        lean(timm(), "evit", **settings)


def test_defaults_and_the_published_settings():
    net = timm()
    assert lean(net, "evit").methods == (EViT((0.7,) * 3, (1, 2, 3), score="class"),)
    assert lean(net, "evit", preset="swag").methods == (EViT((0.7,) * 3, (1, 2, 3), score="mean"),)
    assert lean(net, "evit", preset="swag", score="class").methods == lean(net, "evit").methods
    headless = timm(class_token=False, global_pool="avg")
    assert lean(headless, "evit").methods[0].score == "mean"


def test_keep_rates_belong_to_their_layers_in_any_order():
    fast = lean(timm(), EViT(keep=(0.5, 0.75), layers=(3, 1)))
    assert fast.tokens_per_layer() == [37, 37, 28, 28, 15]


METHODS = {
    "class": EViT(keep=0.5),
    "mean": EViT(keep=0.5, score="mean"),
    "fused": EViT(keep=0.5, fuse=True),
    "frozen": EViT(keep=0.5, restore="frozen"),
}


HEADLESS = {"class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("name", "prefix"), [*itertools.product(METHODS, [{}, {"reg_tokens": 2}]), ("mean", HEADLESS)], ids=str
)
def test_features_have_the_full_grid_and_no_image_sees_another(name, prefix):
    fast, images = lean(timm(**prefix), METHODS[name]), image(3, 24)
    with torch.no_grad():
        features = fast.features(images)
        assert features.shape == (3, 16, 6, 6)
        assert features.isfinite().all()
        torch.testing.assert_close(fast.features(images[1:2]), features[1:2], rtol=0, atol=1e-12)
    assert fast.tokens_per_layer()[-1] < fast.tokens_per_layer()[0]


def test_frozen_patches_are_as_they_were_dropped():
    fast = lean(timm(), EViT(keep=0.5, layers=(2,), restore="frozen"))
    with torch.no_grad(), steps(fast) as seen:
        features = fast.forward_features(image(2, 24))[:, 1:]
        _, (tokens, _), left = seen[0]
        before = fast.norm(tokens.x)[:, 1:]
    kept = left.undo[0].index[:, 1:] - 1
    dropped = torch.ones(2, 36, dtype=torch.bool).scatter(1, kept, False)
    assert dropped.sum(1).tolist() == [18, 18]
    assert torch.equal(features[dropped], before[dropped])
    assert not torch.isclose(features[~dropped], before[~dropped]).all(1).any()


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("method", [EViT(keep=1.0), EViT(keep=0.99, score="mean"), EViT(layers=())], ids=str)
def test_nothing_dropped_is_the_network(method, prefix):
    net = timm(**prefix)
    with torch.no_grad():
        torch.testing.assert_close(lean(net, method)(image(2, 24)), net(image(2, 24)), rtol=0, atol=1e-12)


INTERPRETED = """
import torch
from hourglass_swag.models.ops.mean_attention import mean_attention
for shape in ((2, 3, 150, 20), (1, 2, 130, 80), (1, 1, 1, 16)):
    q, k = (3 * torch.randn(shape[0], shape[2], 3, shape[1], shape[3]).half()).transpose(1, 3).unbind(2)[:2]
    logits = q.double() @ k.double().transpose(2, 3) / shape[3] ** 0.5
    torch.testing.assert_close(mean_attention(q, k).double(), logits.softmax(3).mean((1, 2)), rtol=1e-4, atol=1e-6)
print("equal")
"""

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@needs_triton
def test_the_kernel_in_triton_s_interpreter():
    """Tiles that are not full, heads of odd width, views into packed projections, a single token."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "equal\n", done.stderr


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("channels", "pointer"), [(64, "*bf16"), (80, "*fp16")])
def test_the_kernel_compiles_without_a_gpu(architecture, channels, pointer):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hourglass_swag.models.ops import mean_attention_triton as kernels

    options = kernels.options(channels)
    warps = options.pop("num_warps")
    for kernel in (kernels.log_sums, kernels.column_sums):
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("sums", "scores"), "*fp32")
        types |= dict.fromkeys(("q", "k"), pointer) | {"scale": "fp32"} | dict.fromkeys(options, "constexpr")
        signature = {name: types[name] for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in options.items()}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
        assert compiled.metadata.shared <= 48 * 2**10
        assert compiled.asm["cubin"]


def test_the_kernel_is_for_gpus_in_half_precision_without_gradients():
    with torch.device("meta"):
        assert not has_kernel(torch.empty(1, 2, 9, 16), torch.empty(1, 2, 9, 16))
    assert mean_attention(torch.empty(2, 3, 9, 16, device="meta"), torch.empty(2, 3, 9, 16, device="meta")).shape == (
        2,
        9,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 1025, 64), (1, 16, 1370, 80), (3, 2, 37, 8)], ids=str)
def test_the_kernel_on_a_gpu(dtype, shape):
    """Its error is at most twice that of the plain form at the same type."""
    images, heads, tokens, width = shape
    qkv = torch.randn(images, tokens, 3, heads, width, device="cuda", dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert has_kernel(q, k) == HAS_TRITON
    exact = weights_of(q.double(), k.double()).mean((1, 2))
    plain = attend_and_score(q, k, v, rows=tokens)[1]
    error = (mean_attention(q, k) - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max() + 1e-6 * exact.max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_network_on_a_gpu():
    model = tiny((1, 0.5, 1)).float().cuda()
    with torch.no_grad():
        expected = model(image(2, 24).float().cuda())
        half = model.bfloat16()
        got = half(image(2, 24).bfloat16().cuda())
        assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()
        compiled = torch.compile(half, fullgraph=True)
        torch.testing.assert_close(compiled(image(1, 24).bfloat16().cuda()), got[:1], rtol=0.1, atol=0.1)

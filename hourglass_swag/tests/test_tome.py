"""Token merging: the matching and its algebra, the patched SWAG network, its costs, and what is refused."""

import copy
import itertools
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.measure.flops import CONVENTIONS, count_operations
from common.tests.reference import array, build, image
from hourglass_swag import models
from hourglass_swag.models.ops.tome import generate_colormap, make_visualization, merge, ops, parse_r, patch, utils
from hourglass_swag.models.vision_transformer import VisionTransformer
from hourglass_swag.tests.counting import blank, published_ops
from hourglass_swag.tools.costs import build_network, parse_network
from hourglass_swag.tools.flop_count import flop_count
from hourglass_swag.tools.parser import get_default_parser, get_model_args

TINY: dict[str, Any] = {
    "image_size": 24, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32,
    "num_classes": 5,
}  # fmt: skip


def tokens(*shape: int, name: str = "tokens") -> torch.Tensor:
    return torch.from_numpy(array(name, shape))


def patched(*, r: Any = 4, dtype: torch.dtype = torch.float64, seed: int = 3, trace_source: bool = False, **options):
    model = patch.swag(build(VisionTransformer, seed, dtype=dtype, **TINY | options), trace_source=trace_source)
    model.r = r
    return model


# The matching


@pytest.mark.parametrize("num_tokens", [2, 3, 16, 17])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [1, 4, 100])
def test_bipartite_matching_against_its_definition(num_tokens, prefix, r):
    metric, x = tokens(2, num_tokens, 6, name="metric"), tokens(2, num_tokens, 3)
    merged, unmerge = merge.bipartite_soft_matching(metric, r, prefix_tokens=prefix)
    expected_r = min(r, max(num_tokens - prefix, 0) // 2)
    total = merged(x, mode="sum")
    assert total.shape == (2, num_tokens - expected_r, 3)
    if not expected_r:
        assert total is x
        return
    torch.testing.assert_close(total.sum(1), x.sum(1))  # nothing is lost
    assert torch.equal(total[:, :prefix], x[:, :prefix])  # protected tokens stay in front, in their order
    restored = unmerge(torch.arange(total.shape[1]).double()[None, :, None].expand(2, -1, 1), restore_order=True)
    unit = F.normalize(metric, dim=2)
    for sample in range(2):
        row = restored[sample, :, 0].long()
        members = [torch.nonzero(row == group).flatten().tolist() for group in range(total.shape[1])]
        similarity = unit[sample] @ unit[sample].T
        best = {}  # partner and similarity of every a-token that may merge
        for a in range(0, num_tokens, 2):
            candidates = [b for b in range(1, num_tokens, 2) if b >= prefix]
            if a >= prefix and candidates:
                partner = max(candidates, key=lambda b: similarity[a, b])
                best[a] = partner, float(similarity[a, partner])
        chosen = sorted(best, key=lambda a: -best[a][1])[:expected_r]
        for a, (partner, _) in best.items():
            assert (row[a] == row[partner]) == (a in chosen)
        for group, positions in enumerate(members):
            torch.testing.assert_close(total[sample, group], x[sample, positions].sum(0))


def test_modes_and_sizes():
    metric, x = tokens(2, 9, 4, name="metric"), tokens(2, 9, 3)
    merged, _ = merge.bipartite_soft_matching(metric, 3, class_token=True)
    source = merge.merge_source(merged, x)
    assert torch.equal(source.sum(1), torch.ones(2, 9).double())  # every token is in one group
    size = source.sum(2, keepdim=True)
    torch.testing.assert_close(merged(x, mode="mean"), source @ x / size)
    largest = torch.where(source[..., None] > 0, x[:, None], -torch.inf).amax(2)
    assert torch.equal(merged(x, mode="amax"), largest)
    average, sizes = merge.merge_wavg(merged, x)
    torch.testing.assert_close(average, source @ x / size)
    assert torch.equal(sizes, size)
    again, _ = merge.bipartite_soft_matching(average, 2, class_token=True)
    average, sizes = merge.merge_wavg(again, average, sizes)
    torch.testing.assert_close((average * sizes).sum(1), x.sum(1))  # the weighted sum is conserved
    source = merge.merge_source(again, average, source)
    assert torch.equal(source.sum(2, keepdim=True), sizes)
    assert set(source.unique().tolist()) == {0.0, 1.0}


def test_merging_changes_no_argument_and_has_the_gradient_of_a_weighted_mean():
    metric, x = tokens(2, 9, 4, name="metric"), tokens(2, 9, 3).requires_grad_()
    size = tokens(2, 9, 1, name="size").abs() + 1
    before = x.detach().clone(), size.clone()
    merged, _ = merge.bipartite_soft_matching(metric, 3, scatter="native")
    for mode in merge.MODES:
        assert torch.autograd.gradcheck(lambda x, mode=mode: merged(x, mode=mode), (x,))
    assert torch.autograd.gradcheck(lambda x: merge.merge_wavg(merged, x, size)[0], (x,))
    weights = size.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: merge.merge_wavg(merged, x, s)[0], (weights,))
    assert torch.equal(x, before[0])
    assert torch.equal(size, before[1])


def test_a_larger_batch_reuses_the_match():
    metric, x = tokens(2, 9, 4, name="metric"), tokens(6, 9, 3)
    merged, unmerge = merge.bipartite_soft_matching(metric, 3)
    for mode in merge.MODES:
        parts = [merged(x[i : i + 2], mode=mode) for i in (0, 2, 4)]
        assert torch.equal(merged(x, mode=mode), torch.cat(parts))
    assert torch.equal(unmerge(merged(x)), torch.cat([unmerge(merged(x[i : i + 2])) for i in (0, 2, 4)]))
    with pytest.raises(ValueError, match="multiple of the 2 samples matched, got 3"):
        merged(x[:3])


def test_ablations_count_the_destination():
    metric, x = tokens(1, 7, 4, name="metric"), torch.full((1, 7, 2), 3.0).double()
    for merged, _ in (merge.kth_bipartite_soft_matching(metric, 3), merge.random_bipartite_soft_matching(metric, 4)):
        assert torch.allclose(merged(x, mode="mean"), torch.tensor(3.0).double())
    merged, unmerge = merge.kth_bipartite_soft_matching(metric, 3)
    assert merged(x, mode="sum").sum() == 6 * 2 * 3  # the token behind the last whole group is dropped
    assert unmerge(merged(x)).shape == (1, 6, 2)


def test_random_matching_is_random_and_keeps_everything():
    torch.manual_seed(0)
    metric, x = tokens(2, 12, 4, name="metric"), tokens(2, 12, 3)
    results = [merge.random_bipartite_soft_matching(metric, 5)[0](x, mode="sum") for _ in range(2)]
    assert results[0].shape == (2, 7, 3)
    assert not torch.equal(*results)
    torch.testing.assert_close(results[0].sum(1), x.sum(1))
    torch.manual_seed(1)
    unmerge = merge.random_bipartite_soft_matching(metric, 5)[1]
    assert unmerge(tokens(2, 7, 3)).shape == x.shape


def test_zero_metric_and_equal_tokens_are_no_accident():
    merged, _ = merge.bipartite_soft_matching(torch.zeros(1, 8, 4), 2, class_token=True)
    assert torch.isfinite(merged(torch.ones(1, 8, 3))).all()
    equal = torch.ones(1, 8, 4)
    first, second = (merge.bipartite_soft_matching(equal, 2, class_token=True)[0] for _ in range(2))
    assert torch.equal(first.keep, second.keep)  # pyright: ignore[reportAttributeAccessIssue]


def test_wrong_uses_are_named():
    metric = tokens(1, 6, 4)
    merged, _ = merge.bipartite_soft_matching(metric, 2)
    with pytest.raises(ValueError, match="mode must be one of sum, mean, amax, got 'max'"):
        merged(metric, mode="max")
    with pytest.raises(ValueError, match="k must be at most the number of tokens, 6, got 7"):
        merge.kth_bipartite_soft_matching(metric, 7)
    with pytest.raises(ValueError, match="r must be less than the number of tokens, 6, got 6"):
        merge.random_bipartite_soft_matching(metric, 6)
    with pytest.raises(ValueError, match="scatter must be one of auto, native, fused, torch_scatter, got 'fast'"):
        merge.merge_wavg(merge.bipartite_soft_matching(metric, 2, scatter="fast")[0], metric)
    for nothing in (merge.kth_bipartite_soft_matching(metric, 1), merge.random_bipartite_soft_matching(metric, 0)):
        assert nothing[0](metric) is metric


# Forms


def test_kernels_are_refused_where_they_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("they can run here")
    with pytest.raises(ImportError, match="scatter = 'fused' needs an NVIDIA GPU and the package triton"):
        ops.check_form("fused")
    with pytest.raises(RuntimeError, match=r"NVIDIA GPU and no gradients, got torch\.float64 on cpu"):
        merge.bipartite_soft_matching(tokens(1, 6, 4), 2, scatter="fused")


def test_torch_scatter_is_asked_for_by_name_only(monkeypatch):
    metric, x = tokens(2, 9, 4, name="metric"), tokens(2, 9, 3)
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    patch.swag(build(VisionTransformer, 3, **TINY))  # nothing imports it
    with pytest.raises(ImportError, match="torch-scatter cannot be imported"):
        patch.swag(build(VisionTransformer, 3, **TINY), scatter="torch_scatter")
    with pytest.raises(ValueError, match=r"--scatter: .*torch-scatter cannot be imported"):
        models.create("tome_vit_desk", scatter="torch_scatter")
    merged, _ = merge.bipartite_soft_matching(metric, 3, scatter="torch_scatter")
    with pytest.raises(ImportError, match="torch-scatter"):
        merge.merge_wavg(merged, x)


def test_torch_scatter_gives_the_same():
    pytest.importorskip("torch_scatter", reason="torch-scatter is not installed")
    metric, x = tokens(2, 9, 4, name="metric"), tokens(2, 9, 3)
    native, other = (merge.bipartite_soft_matching(metric, 3, scatter=form)[0] for form in ("native", "torch_scatter"))
    for mode in merge.MODES:
        torch.testing.assert_close(other(x, mode=mode), native(x, mode=mode))
    torch.testing.assert_close(merge.merge_wavg(other, x), merge.merge_wavg(native, x))


def test_command_lines_choose_the_form(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    words = ["-m", "tome_vit_desk", "--tome_r", "6"]
    assert get_model_args(get_default_parser().parse_args(words)) == {"tome_r": 6}
    args = get_default_parser().parse_args([*words, "--scatter", "native"])
    assert models.create(args.model, **get_model_args(args))._tome_info["scatter"] == "native"
    args = parse_network([*words, "-r", "32", "--scatter", "torch_scatter"])
    with pytest.raises(ValueError, match=r"--scatter: .*torch-scatter cannot be imported"):
        build_network(args)


# Schedules


def test_schedules():
    assert parse_r(1, (7, -1.0)) == parse_r(1, 7) == [7]
    assert parse_r(4, [3]) == [3, 0, 0, 0]
    assert sum(parse_r(11, (10, -1.0))) == sum(parse_r(11, (10, 1.0))) == 110
    assert utils.tokens_per_layer(17, [5, 0, 100], 1) == [17, 12, 12, 7]


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "at least 0, got -1"),
        ([3, -2], ValueError, "at least 0, got"),
        ((-4, 0.0), ValueError, "at least 0, got"),
        ((4, 1.5), ValueError, "between -1 and 1"),
        ((4, 1, 2), ValueError, "tokens per layer, inflection"),
        (2.5, TypeError, "int, a tuple"),
        ([1.0], TypeError, "list of ints"),
        (True, TypeError, "int, a tuple"),
        ("8", TypeError, "int, a tuple"),
    ],
)
def test_impossible_schedules_are_refused_when_set(r, error, message):
    model = patched()
    with pytest.raises(error, match=message):
        model.r = r
    assert model.r == 4


# The patched network


def test_patching_keeps_parameters_and_can_be_repeated():
    model = build(VisionTransformer, 3, **TINY)
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert patch.swag(model) is model
    assert patch.swag(model, trace_source=True) is model
    assert model._tome_info["trace_source"]  # patched again, it takes the new settings
    assert isinstance(model, VisionTransformer)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.r == 0
    model.r = 2
    assert model.methods[0].name == "tome"


def test_without_merging_it_is_the_dense_network():
    dense = build(VisionTransformer, 3, **TINY)
    with torch.no_grad():
        torch.testing.assert_close(patched(r=0)(image(2, 24)), dense(image(2, 24)))


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_merging_equal_tokens_changes_nothing(classifier):
    """Pairs of equal neighbours, no positions: with proportional attention the merged network is the dense one."""
    model = build(VisionTransformer, 3, **TINY | {"image_size": 16, "classifier": classifier})
    model.encoder.pos_embedding.data.zero_()
    patches = image(2, 8).unflatten(3, (2, 4)).repeat_interleave(2, dim=3).flatten(3)  # columns of patches in pairs
    images = torch.cat([patches, patches.flip(3)], dim=2)
    with torch.no_grad():
        dense = model(images)
        model = patch.swag(model)
        model.r = [8]
        torch.testing.assert_close(model(images), dense)
        assert model._tome_info["size"].flatten().tolist().count(2) == 16
        model = patch.swag(model, prop_attn=False)
        all_alike = classifier == "gap"  # then every key has size 2, and the bias is a constant
        assert torch.allclose(model(images), dense) == all_alike


def test_an_image_alone_is_the_image_in_a_batch():
    model = patched(r=(5, -1.0))
    with torch.no_grad():
        torch.testing.assert_close(model(image(3, 24))[1:2], model(image(3, 24)[1:2]))


def test_attention_stays_fused_and_its_bias_broadcasts(monkeypatch):
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attention(q, k, v, attn_mask=attn_mask, **options)

    model = patched(r=[0, 6, 0], dtype=torch.float32)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(image(2, 24).float())
    assert seen == [(37, None), (37, None), (31, (2, 1, 1, 31))]


def test_tracing_and_sizes_of_a_pass():
    model = patched(r=[6, 0, 5], trace_source=True)
    with torch.no_grad():
        model(image(2, 24))
    size, source = model._tome_info["size"], model._tome_info["source"]
    assert size.shape == (2, 26, 1)
    assert source.shape == (2, 26, 37)
    assert torch.equal(source.sum(2, keepdim=True), size)
    assert torch.equal(source[:, 0], F.one_hot(torch.zeros(2, dtype=torch.long), 37).double())  # the class token alone
    with torch.no_grad():
        model(image(1, 24))
    assert model._tome_info["source"].shape == (1, 26, 37)
    model.r = 0
    with torch.no_grad():
        model(image(1, 24))
    assert torch.equal(model._tome_info["source"][0], torch.eye(37).double())


def test_training():
    torch.manual_seed(0)
    model = patch.swag(VisionTransformer(**TINY, dropout_rate=0.1)).train()
    model.r = 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, targets = torch.rand(8, 3, 24, 24), torch.arange(8) % 5
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    reference, half = patched(dtype=torch.float32), patched(dtype=torch.float32).to(dtype)
    images = image(2, 24).float()
    with torch.no_grad():
        expected, got = reference(images), half(images.to(dtype))
        with torch.autocast("cpu", dtype=dtype):
            automatic = reference(images)
    assert got.dtype == dtype
    assert half._tome_info["size"].dtype == torch.float32
    assert torch.equal(half._tome_info["size"].sum(1), torch.full((2, 1), 37.0))
    assert (got.float() - expected).abs().max() < 0.3 * expected.abs().max()  # pairs of close similarity may swap
    assert torch.isfinite(automatic).all()


def test_bfloat16_sizes_count_beyond_256():
    metric = torch.ones(1, 1024, 4, dtype=torch.bfloat16)
    x, size = torch.ones(1, 1024, 2, dtype=torch.bfloat16), None
    while x.shape[1] > 1:
        merged, _ = merge.bipartite_soft_matching(metric[:, : x.shape[1]], x.shape[1])
        x, size = merge.merge_wavg(merged, x, size)
    assert size is not None
    assert size.item() == 1024
    assert x.dtype == torch.bfloat16


def test_copies_and_pickles():
    model = patched()
    images = image(1, 24)
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(images), expected)
            assert other._tome_info is not model._tome_info
            other.r = 0
    assert model.r == 4


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"])
def test_compiled_is_eager_at_batch_1_without_a_graph_break(backend):
    model = patched(r=[5, 0, 4], dtype=torch.float32, trace_source=backend == "aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    images = image(1, 24).float()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
        expected = model._tome_info["size"].clone()
        compiled(images)
    torch.testing.assert_close(model._tome_info["size"], expected)


@pytest.mark.parametrize(
    "model",
    [
        lambda: models.create("hourglass_vit_desk", clustering_location=2, num_cluster=9),
        lambda: models.create("e_vit_desk"),
        lambda: nn.Linear(2, 2),
        lambda: models.create("tome_vit_desk").encoder,
    ],
    ids=["hourglass", "evit", "linear", "encoder"],
)
def test_other_networks_are_refused_and_left_alone(model):
    network = model()
    classes = [type(module) for module in network.modules()]
    with pytest.raises(TypeError, match="tome cannot patch this network: "):
        patch.swag(network)
    assert [type(module) for module in network.modules()] == classes


def test_networks_of_the_registry():
    model = models.create("tome_vit_desk", tome_r=6)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert model._tome_info["size"].shape[1] == 65 - 8 * 6
    with pytest.raises(ValueError, match=r"--tome_r \(tome_r\): r must be at least 0, got -1"):
        models.create("tome_vit_desk", tome_r=-1)
    with pytest.raises(TypeError, match="tome_ratio"):
        models.create("tome_vit_desk", tome_ratio=1)
    dense = models.create("vit_desk")
    model.load_state_dict(dense.state_dict())


# Costs


@pytest.mark.parametrize(
    ("name", "side", "r", "published"),
    [
        ("l16", 512, 10, 317.5), ("l16", 512, 20, 271.2), ("l16", 512, 40, 184.3),
        ("h14", 518, 10, 890.0), ("h14", 518, 20, 760.0), ("h14", 518, 40, 516.9),
    ],
)  # fmt: skip
def test_published_gflops(name, side, r, published):
    with torch.device("meta"):
        model = models.create(f"tome_vit_{name}_in1k", image_size=side, tome_r=r).eval()
    assert round(CONVENTIONS["swag"].total(published_ops(model)) / 1e9, 1) == published


@pytest.mark.parametrize("options", [{}, {"classifier": "gap"}], ids=["token", "gap"])
@pytest.mark.parametrize("r", [0, 5, [0, 7, 0], 100])
def test_counts_agree(options, r):
    model = patched(r=r, dtype=torch.float32, **options)
    images = torch.rand(1, 3, 24, 24)
    counted = count_operations(model, images)
    other = count_operations(model, blank(model)).executed
    merging = {"mul", "div", "sub"}  # counted on the meta device as in the published code, which does more of them
    assert {k: n for k, n in counted.executed.items() if k not in merging} == {
        k: n for k, n in other.items() if k not in merging
    }
    tokens = utils.tokens_per_layer(model.seq_length, parse_r(3, r), model.num_class_tokens)
    head, saved = model.hidden_dim // model.num_heads, 0
    dense = count_operations(VisionTransformer(**TINY | options), images).executed
    C, M = model.hidden_dim, model.mlp_dim
    for before, after in itertools.pairwise(tokens):
        saved += (tokens[0] - before) * 4 * C * C + 2 * (tokens[0] ** 2 - before**2) * C
        saved += (tokens[0] - after) * 2 * C * M
        saved -= (before - before // 2) * (before // 2) * head if after < before else 0
    assert dense.macs - counted.executed.macs == saved, "by hand: block(N, U) and the similarity of either half"
    total = 1e9 * sum(flop_count(model, (images,)).values())
    assert round(total) == CONVENTIONS["swag"].total(counted.published)


# Images


def test_visualization_by_its_definition():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    labels = generator.integers(0, 4, (3, 5))
    source = F.one_hot(torch.from_numpy(labels).flatten(), 6).T[None].float()
    drawn = np.asarray(make_visualization(image, source, patch_size=4, class_token=False)) / 255
    assert drawn.shape == (12, 20, 3)
    groups = labels.repeat(4, 0).repeat(4, 1)
    pixels, colours = np.asarray(image) / 255, generate_colormap(6)
    for y in range(12):
        for x in range(20):
            group = groups[y, x]
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = all(0 <= v < 12 and 0 <= u < 20 and groups[v, u] == group for v, u in around)
            expected = pixels[groups == group].mean(0) if inside else colours[group]
            np.testing.assert_allclose(drawn[y, x], expected, atol=1.01 / 255)


def test_visualization_of_a_network_with_prefix_tokens():
    photo = Image.new("RGB", (24, 24))
    model = patched(trace_source=True)
    with torch.no_grad():
        model(image(1, 24))
    assert make_visualization(photo, model._tome_info["source"], patch_size=4).size == (24, 24)
    with pytest.raises(ValueError, match="37 patches do not fill an image of 24 x 24 pixels in patches of 4"):
        make_visualization(photo, model._tome_info["source"], patch_size=4, class_token=False)
    with pytest.raises(ValueError, match=r"one image, \(1, groups, tokens\), got \(2, 3, 4\)"):
        make_visualization(photo, torch.zeros(2, 3, 4))
    assert generate_colormap(3) == generate_colormap(4)[:3]


def test_benchmark_measures_and_refuses():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).train()
    throughput = utils.benchmark(model, "cpu", (3, 4, 4), batch_size=4, runs=8, verbose=True)
    assert throughput > 100
    assert not model.training
    with pytest.raises(ValueError, match="leave none to be timed"):
        utils.benchmark(model, "cpu", (3, 4, 4), runs=1, throw_out=1.0)


@pytest.mark.slow
def test_compiled_for_any_batch():
    """The second size of a batch makes it symbolic, which the merge must survive."""
    model = patched()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (1, 3, 5):
            images = image(batch, 24)
            torch.testing.assert_close(compiled(images), model(images))


def test_patching_again_takes_the_new_settings():
    model = patched(r=3)
    assert patch.swag(model, trace_source=True, prop_attn=False, scatter="native") is model
    info = model._tome_info
    assert (info["trace_source"], info["prop_attn"], info["scatter"], model.r) == (True, False, "native", 3)
    with pytest.raises(ValueError, match="scatter must be one of"):
        patch.swag(model, scatter="none")
    assert info["trace_source"], "nothing is changed by what is refused"

"""ACT beyond the reference vectors: properties, seeds, precision, cost, bad input, compilation."""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common.hosts import PlanError, lean
from common.measure.flops import CONVENTIONS
from common.tests.reference import fill_, image
from hourglass_swag.models import create
from hourglass_swag.models.act_vision_transformer import ACT, attentions, clusters
from hourglass_swag.models.ops import library
from hourglass_swag.models.ops.ACT.ada_clustering_attention import (
    AdaClusteringAttention,
    Broadcast,
    CalcCenter,
    ClustersUnknown,
    WeightedSoftMax,
    hash_codes,
)
from hourglass_swag.models.ops.ACT.attention_layer import AdaMultiheadAttention
from hourglass_swag.models.ops.ACT.extensions import ada_cluster_, plain
from hourglass_swag.models.ops.projections import set_generator
from hourglass_swag.models.vision_transformer import VisionTransformer
from hourglass_swag.tests import counting
from hourglass_swag.tests.counting import count_with_clusters, images, published_ops, run, steps, timm
from hourglass_swag.tools.costs import count
from hourglass_swag.tools.flop_count import flop_count

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 64,
    "num_classes": 10,
}


act = partial(counting.make, "act_vision_transformer")


def make(**options: Any) -> Any:
    return fill_(act(**SMALL, **options), 3).eval()


# The operators


def test_groups_are_ranks_and_counts_their_sizes():
    hashes = torch.tensor([[5, -2, 5, 2**62, -2, 5], [0, 0, 0, 0, 0, 0]])
    groups, counts = ada_cluster_(hashes)
    assert groups.tolist() == [[1, 0, 1, 2, 0, 1], [0] * 6]
    assert counts.tolist() == [[2, 3, 1], [6, 0, 0]]
    assert groups.dtype == counts.dtype == torch.int32


def test_copies_of_means_keep_the_mean():
    x = torch.randn(3, 20, 5, dtype=torch.float64)
    groups, counts = ada_cluster_(torch.randint(0, 4, (3, 20)))
    mean = CalcCenter.apply(x, groups, counts)
    torch.testing.assert_close(Broadcast.apply(mean, groups).mean(1), x.mean(1))
    torch.testing.assert_close((mean * counts[..., None]).sum(1), x.sum(1))


def test_an_empty_group_is_exactly_zero():
    mean = CalcCenter.apply(torch.randn(1, 2, 3), torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([[1, 0, 1]]))
    assert mean[0, 1].abs().max() == 0


def test_half_precision_sums_in_single():
    """4,096 times 0.1 in bfloat16 would stop growing at 32."""
    ones = torch.full((1, 4096, 2), 0.1, dtype=torch.bfloat16)
    groups, counts = torch.zeros(1, 4096, dtype=torch.int32), torch.tensor([[4096]])
    assert float(plain.sum_groups(ones, groups, 1)[0, 0, 0]) == pytest.approx(4096 * 0.1, rel=0.01)
    assert float(CalcCenter.apply(ones, groups, counts)[0, 0, 0]) == pytest.approx(0.1, rel=0.01)


def test_gradients_of_the_plain_form():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    groups = torch.randint(-1, 5, (2, 7))
    assert torch.autograd.gradcheck(lambda x, w: plain.weighted_sum(x, groups, w), (x, weights))
    assert torch.autograd.gradcheck(lambda y, w: plain.broadcast(y, groups, w), (y, weights))


# The attention


def test_weighted_softmax_counts_members():
    logits, counts = torch.randn(2, 3, 4), torch.tensor([1, 3, 0, 2])
    weights = WeightedSoftMax.apply(logits, counts)
    repeated = logits[..., [0, 1, 1, 1, 3, 3]].softmax(-1)
    expected = torch.stack(
        [repeated[..., 0], repeated[..., 1:4].sum(-1), repeated[..., 0] * 0, repeated[..., 4:].sum(-1)]
    )
    torch.testing.assert_close(weights, expected.permute(1, 2, 0).reshape(2, 3, 4))


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_equal_tokens_lose_nothing(sides):
    """Where the members of every cluster are equal, clustering is exact."""
    torch.manual_seed(0)
    distinct = torch.randn(2, 5, 8, dtype=torch.float64) * 30
    q, k, v = (distinct.repeat_interleave(3, dim=1) for _ in range(3))
    core = AdaClusteringAttention(*sides, q_hashes=16, k_hashes=16).eval()
    exact = AdaClusteringAttention().eval()
    torch.testing.assert_close(core(q, k, v), exact(q, k, v))
    assert {core.Q_clusters, core.K_clusters} <= {5, None}


def test_rounds_behind_the_32nd_change_nothing_and_warn():
    with pytest.warns(UserWarning, match="rounds behind 32"):
        AdaClusteringAttention(True, q_hashes=33)
    x, alpha, beta = torch.randn(2, 9, 4) * 50, torch.randn(4, 40), torch.rand(40)
    assert torch.equal(hash_codes(x, alpha, beta), hash_codes(x, alpha[:, :32], beta[:32]))


def test_codes_do_not_change_with_whole_buckets_added_to_all():
    x, alpha, beta = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(4, 6).double(), torch.rand(6).double()
    assert torch.equal(hash_codes(x, alpha, beta), hash_codes(x, alpha, beta + 8 * 5))
    wider = hash_codes(x * 2, alpha, beta * 2, bucket_width=16)
    assert torch.equal(wider, hash_codes(x, alpha, beta))


def test_rows_by_images_and_heads_or_flat():
    q, k, v = (torch.randn(2, 3, 11, 8) for _ in range(3))
    core = AdaClusteringAttention(True, True, q_hashes=3, k_hashes=3).eval()
    torch.manual_seed(2)
    nested = core(q, k, v)
    torch.manual_seed(2)
    torch.testing.assert_close(nested.flatten(0, 1), core(*(x.flatten(0, 1) for x in (q, k, v))))


def test_padding_does_not_reach_the_result():
    attention = AdaMultiheadAttention(32, 4, q_hashes=3, batch_first=True).eval()
    x, mask = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 6:] = True
    other = x.clone()
    other[1, 6:] += 100
    torch.manual_seed(1)
    first = attention(x, x, x, key_padding_mask=mask)[0]
    torch.manual_seed(1)
    second = attention(x, other, other, key_padding_mask=mask)[0]
    torch.testing.assert_close(first, second)


def test_multi_head_without_clusters_is_torch_s():
    ours = AdaMultiheadAttention(32, 4, group_Q=False).double().eval()
    theirs = torch.nn.MultiheadAttention(32, 4).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x, memory = torch.randn(7, 2, 32, dtype=torch.float64), torch.randn(9, 2, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x, memory, memory)[0], theirs(x, memory, memory)[0])


# The model


def test_without_clustering_it_is_the_dense_model():
    model = make(act_group_q=False)
    dense = VisionTransformer(**SMALL).eval()
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(model, images()), run(dense, images()))
    assert not model.depends_on_data


def test_seeds_decide():
    model, x = make(act_q_hashes=6), images()
    assert torch.equal(run(model, x, 1), run(model, x, 1))
    assert not torch.equal(run(model, x, 1), run(model, x, 2))
    set_generator(model, torch.Generator().manual_seed(1))
    first = run(model, x, 8)
    set_generator(model, torch.Generator().manual_seed(1))
    assert torch.equal(first, run(model, x, 9))
    assert torch.equal(first, run(make(act_q_hashes=6), x, 1))


def test_the_draws_can_be_supplied():
    model, x = make(act_q_hashes=4), images()
    asked: list[tuple[int, int, str, torch.dtype]] = []

    def draw(dim: int, n_hashes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        asked.append((dim, n_hashes, device.type, dtype))
        return torch.zeros(dim, n_hashes), torch.zeros(n_hashes)

    for attention in attentions(model):
        attention.draw = draw  # type: ignore[method-assign]
    run(model, x)
    assert asked == [(8, 4, "cpu", torch.float32)] * 3
    assert clusters(model) == [1, 1, 1], "equal projections make one cluster"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, x = make(act_q_hashes=2, act_group_k=True, act_k_hashes=2), images(1)
    exact = run(model, x)
    half = run(model.to(dtype), x.to(dtype))
    assert half.dtype == dtype
    assert half.isfinite().all()
    assert (half - exact).abs().max() < 0.6 * exact.abs().max()  # a token in another cluster changes more than rounding
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(make(act_q_hashes=2), x)
    assert mixed.isfinite().all()


def test_odd_sizes_and_one_image():
    model = make(act_q_hashes=5)
    other = act(**(SMALL | {"image_size": 24}), act_q_hashes=5).eval()
    other.load_state_dict(model.state_dict())
    assert run(other, images(1, 24)).shape == (1, 10)
    gap = act(**SMALL, classifier="gap", act_q_hashes=5).eval()
    assert run(gap, images(1)).shape == (1, 10)


def test_training_reaches_every_parameter():
    model = make(act_q_hashes=4, act_group_k=True, act_k_hashes=6).train()
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("out", "layers"), [(-1, [1, 2]), (2, [1]), (1, [1, 2]), (0, [1, 2]), (3, [1, 2])])
def test_plug_in_and_out(out, layers):
    model = make(act_plug_in_index=1, act_plug_out_index=out)
    with steps(model) as seen:
        run(model, images(1))
    assert [step.layer for step, *_ in seen] == layers
    assert [step.core for step, *_ in seen] == attentions(model)


# Cost


def test_cost_depends_on_the_clusters():
    model = make(act_q_hashes=4)
    with pytest.raises(ClustersUnknown, match="run the model on an image"):
        published_ops(model)
    counted = count(model, images(1))
    formed = clusters(model)
    assert counted == count(model, images(1)), "the same projections every time"
    assert all(attention.generator is None for attention in attentions(model))
    assert counted.executed.macs == counted.published.macs
    torch.manual_seed(0)
    total = sum(flop_count(model, (images(1),)).values())
    assert round(1e9 * total) == CONVENTIONS["swag"].total(counted.published)
    fewest, same, most = (
        count_with_clusters(copy.deepcopy(model), numbers).published for numbers in ([1] * 3, formed, [17] * 3)
    )
    assert same == counted.published
    assert fewest.macs < same.macs < most.macs


def test_the_meta_device_cannot_know_the_clusters():
    with torch.device("meta"):
        model = act(**SMALL)
        with pytest.raises(ClustersUnknown, match="which the meta device does not have: run the model on an image"):
            model(torch.empty(1, 3, 32, 32))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_q_hashes": 0}, r"q_hashes \(--act_q_hashes\) must be 1 to 32, got 0"),
        ({"act_k_hashes": -1}, r"k_hashes \(--act_k_hashes\) must be 1 to 32"),
        ({"act_plug_in_index": 3}, "act_plug_in_index must be 0 to 2, got 3"),
        ({"act_plug_in_index": -1}, "act_plug_in_index must be 0 to 2, got -1"),
        ({"act_plug_out_index": 4}, "act_plug_out_index must be 0 to 3, or -1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        act(**SMALL, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hashes": 0}, r"q_hashes \(--act_q_hashes\) must be 1 to 32, got 0"),
        ({"hashes": 2.0}, "hashes must be a whole number, got 2.0"),
        ({"key_hashes": -1}, r"k_hashes \(--act_k_hashes\) must be 1 to 32, got -1"),
        ({"layers": (1, 4)}, "layers must be a layer, 0 to 3, got 4"),
        ({"layers": (1, 1)}, r"layers must differ, got \(1, 1\)"),
        ({"bucket_width": 0.0}, "bucket_width must be positive, got 0.0"),
        ({"rounds": 3}, "act has no setting 'rounds'.* it has .*hashes, layers"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        lean(timm(), "act", **settings)


def test_defaults_and_the_published_settings():
    everywhere = ACT(24, (0, 1, 2, 3), key_hashes=24)
    assert lean(timm(), "act").methods == lean(timm(), "act", preset="swag").methods == (everywhere,)
    with torch.device("meta"):
        published = create("act_vit_l16_in1k")
    assert published.methods == (ACT(32, tuple(range(24)), key_hashes=32),)
    wide = lean(timm(), "act", layers=(3, 1), bucket_width=2.5, keys=True, queries=False, key_hashes=3)
    assert wide.methods[0].layers == (1, 3)
    assert [(core.group_Q, core.group_K, core.k_hashes, core.bucket_width) for core in attentions(wide)] == [
        (False, True, 3, 2.5)
    ] * 2


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("keys", [False, True])
def test_features_have_the_full_grid_and_no_image_sees_another(keys, prefix):
    """With the same projections: they are drawn for all images of a batch."""
    fast, x = lean(timm(**prefix), "act", hashes=4, keys=keys, bucket_width=2.0), image(3, 24)
    assert fast.depends_on_data

    def features(x: Tensor) -> Tensor:
        set_generator(fast, torch.Generator().manual_seed(2))
        with torch.inference_mode():
            return fast.features(x)

    together = features(x)
    assert together.shape == (3, 16, 6, 6)
    assert together.isfinite().all()
    formed = clusters(fast)
    assert len(formed) < sum(formed) < 36 * len(formed), "some tokens share a cluster"
    torch.testing.assert_close(features(x[1:2]), together[1:2], rtol=0, atol=1e-12)
    assert torch.equal(features(x), together)
    assert fast.tokens_per_layer(x) == [fast.plan.host.facts.tokens] * 5


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}], ids=str)
def test_nothing_clustered_is_the_network(prefix):
    net, x = timm(**prefix), image(2, 24)
    for method in (ACT(queries=False), ACT(layers=()), ACT(hashes=32, keys=True, bucket_width=1e-6)):
        fast = lean(net, method)
        torch.testing.assert_close(run(fast, x), run(net, x), rtol=0, atol=1e-12)
    assert clusters(fast) == [fast.plan.host.facts.tokens] * 8, "every token its own cluster"
    assert not lean(net, ACT(queries=False)).depends_on_data
    assert not lean(net, ACT(layers=())).depends_on_data


def test_unknown_keywords_and_masks():
    with torch.device("meta"), pytest.raises(TypeError, match="smyrf_n_hashes"):
        create("act_vit_l16_in1k", smyrf_n_hashes=3)
    attention, x = AdaMultiheadAttention(8, 2, group_K=True, batch_first=True), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(x, x, x, attn_mask=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\), got torch.float32"):
        attention(x, x, x, key_padding_mask=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="does not go with clustered keys"):
        attention(x, x, x, key_padding_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="add_bias_kv"):
        AdaMultiheadAttention(8, 2, add_bias_kv=True)
    with pytest.raises(ValueError, match="bucket_width"):
        AdaClusteringAttention(bucket_width=0)


def test_what_is_not_built_is_said_once(monkeypatch, caplog):
    library.load.cache_clear()
    monkeypatch.setattr(library, "find_library", lambda: None)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                run(make(), images(1))
        assert caplog.text.count("python setup.py build develop") == 1
    finally:
        library.load.cache_clear()


def test_a_library_of_another_torch_is_left_alone(monkeypatch, caplog, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    library.load.cache_clear()
    monkeypatch.setattr(library, "find_library", lambda: tmp_path / "_C.so")
    try:
        with caplog.at_level(logging.WARNING):
            assert run(make(), images(1)).isfinite().all()
        assert "_C.so do not work with torch" in caplog.text
    finally:
        library.load.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [False, True])
def test_compiled_equals_eager(keys):
    model, x = make(act_q_hashes=3, act_group_k=keys, act_k_hashes=3), images(1)
    compiled = torch.compile(model, fullgraph=True)
    for seed in (1, 2):
        torch.testing.assert_close(run(compiled, x, seed), run(model, x, seed), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    assert all(1 <= number <= 17 for number in clusters(model))
    torch._dynamo.reset()

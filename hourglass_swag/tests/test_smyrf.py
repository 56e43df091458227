"""SMYRF beyond the reference vectors: properties, padding, precision, cost, bad input, compilation."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common.hosts import PlanError, lean
from common.measure.flops import CONVENTIONS, count_operations
from common.tests.reference import fill_, image
from hourglass_swag.models import create
from hourglass_swag.models.ops import library
from hourglass_swag.models.ops.projections import set_generator
from hourglass_swag.models.ops.smyrf import attn
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention, attend_in_clusters, dense
from hourglass_swag.models.ops.smyrf.smyrf_attn import SmyrfMultiheadAttention
from hourglass_swag.models.ops.smyrf.utils import XBOXPLUS
from hourglass_swag.models.smyrf_vision_transformer import SMYRF
from hourglass_swag.tests import counting
from hourglass_swag.tests.counting import images, run, steps, timm
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
CLUSTERS: dict[str, Any] = {"smyrf_n_hashes": 4, "smyrf_q_cluster_size": 4, "smyrf_k_cluster_size": 4}


smyrf = partial(counting.make, "smyrf_vision_transformer")


def make(**options: Any) -> Any:
    return fill_(smyrf(**SMALL, **(CLUSTERS | options)), 3).eval()


def test_the_lift_keeps_products_and_makes_norms_equal():
    q, k = torch.randn(3, 12, 5, dtype=torch.float64), 2 * torch.randn(3, 9, 5, dtype=torch.float64)
    lift = XBOXPLUS(q, k)
    torch.testing.assert_close(lift.Q() @ lift.K().mT, q @ k.mT)
    norms = torch.cat([lift.Q().norm(dim=2), lift.K().norm(dim=2)], dim=1)
    torch.testing.assert_close(norms, norms[:, :1].expand_as(norms))


def test_rounds_are_weighted_by_their_mass():
    """By the definition, one round after the other: softmax over rounds of the log-normalisers."""
    torch.manual_seed(0)
    R, N, d, T, c = 2, 12, 4, 3, 4
    q, k, v = (torch.randn(R, N, d, dtype=torch.float64) for _ in range(3))
    order_q, order_k = SmyrfAttention(T, c, c).orders(q, k)
    outputs, masses = torch.zeros(T, R, N, d, dtype=torch.float64), torch.zeros(T, R, N, dtype=torch.float64)
    for t in range(T):
        for r in range(R):
            for first in range(0, N, c):
                rows, columns = order_q[t, r, first : first + c], order_k[t, r, first : first + c]
                logits = q[r, rows] @ k[r, columns].T / 2
                masses[t, r, rows] = logits.logsumexp(1)
                outputs[t, r, rows] = logits.softmax(1) @ v[r, columns]
    expected = (masses.softmax(0)[..., None] * outputs).sum(0)
    torch.testing.assert_close(attend_in_clusters(q, k, v, order_q, order_k, (c, c), norm_factor=2.0), expected)


def test_few_rounds_at_once_or_all(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 17, 8, dtype=torch.float64) for _ in range(3))
    order_q, order_k = SmyrfAttention(8, 4, 4).orders(q, k)
    results = []
    for elements in (1, 3 * 17 * 8 * 4, 2**30):
        monkeypatch.setitem(attn.MAX_ELEMENTS, "cpu", elements)
        results.append(attend_in_clusters(q, k, v, order_q, order_k, (4, 4)))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_one_cluster_of_everything_is_dense_attention():
    q, k, v = (torch.randn(2, 10, 4, dtype=torch.float64) for _ in range(3))
    for padded in (False, True):
        core = SmyrfAttention(3, 10, 10, padded=padded).eval()
        torch.testing.assert_close(core(q, k, v, norm_factor=2.0), dense(q, k, v, 2.0))
    larger = SmyrfAttention(3, 16, 16, padded=True).eval()
    torch.testing.assert_close(larger(q, k, v), dense(q, k, v))


def test_published_clusters_straddle_and_padded_ones_do_not():
    x = images()
    other = torch.stack([x[0], x[1] + 1])
    for padded, same in ((False, False), (True, True)):
        model = make(smyrf_padded=padded, smyrf_q_cluster_size=8, smyrf_k_cluster_size=8)
        first, second = run(model, x)[0], run(model, other)[0]
        assert torch.allclose(first, second, atol=1e-5) == same, f"padded={padded}"


def test_padded_equals_published_where_nothing_is_left_over():
    q, k, v = (torch.randn(4, 24, 8, dtype=torch.float64) for _ in range(3))
    order_q, order_k = SmyrfAttention(3, 6, 6).orders(q, k)
    results = [attend_in_clusters(q, k, v, order_q, order_k, (6, 6), padded=padded) for padded in (False, True)]
    torch.testing.assert_close(*results)


def test_padding_by_the_definition():
    q, k, v = (torch.randn(1, 7, 4, dtype=torch.float64) for _ in range(3))
    order_q, order_k = SmyrfAttention(1, 3, 3).orders(q, k)
    expected = torch.zeros_like(q)
    for first in (0, 3, 6):
        rows, columns = order_q[0, 0, first : first + 3], order_k[0, 0, first : first + 3]
        expected[0, rows] = (q[0, rows] @ k[0, columns].T).softmax(1) @ v[0, columns]
    torch.testing.assert_close(attend_in_clusters(q, k, v, order_q, order_k, (3, 3), padded=True), expected)


def test_offsets_do_not_matter_and_seeds_do():
    q, k, v = (torch.randn(2, 16, 4, dtype=torch.float64) for _ in range(3))
    results = []
    for r in (1, 100):
        core = SmyrfAttention(3, 4, 4, r=r).eval()
        core.generator = torch.Generator().manual_seed(4)
        results.append(core(q, k, v))
    torch.testing.assert_close(*results)
    model = make()
    assert torch.equal(run(model, images(), 1), run(model, images(), 1))
    assert not torch.equal(run(model, images(), 1), run(model, images(), 2))
    set_generator(model, torch.Generator().manual_seed(1))
    assert torch.equal(run(model, images(), 7), run(make(), images(), 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, x = make(), images(1)
    exact = run(model, x)
    half = run(model.to(dtype), x.to(dtype))
    assert half.dtype == dtype
    assert half.isfinite().all()
    assert (half - exact).abs().max() < 0.6 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(make(), x).isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_training_reaches_every_parameter(padded):
    model = make(smyrf_padded=padded, attention_dropout_rate=0.1).train()
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_cost_on_the_meta_device():
    for options in ({}, {"smyrf_padded": True}, {"smyrf_k_cluster_size": 4, "smyrf_plug_in_index": 1}):
        with torch.device("meta"):
            model = smyrf(**SMALL, **(CLUSTERS | options)).eval()
            x = torch.empty(1, 3, 32, 32)
        counted = count_operations(model, x)
        clustered = sum(isinstance(module, SmyrfAttention) for module in model.modules())
        lifted = (
            2 * SMALL["num_heads"] * 17 * 2 * CLUSTERS["smyrf_n_hashes"]
        )  # the two extra channels, of queries and keys
        assert counted.published.macs - counted.executed.macs == clustered * lifted
        assert round(1e9 * sum(flop_count(model, (x,)).values())) == CONVENTIONS["swag"].total(counted.published)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smyrf_n_hashes": 0}, r"n_hashes \(--smyrf_n_hashes\) must be at least 1, got 0"),
        ({"smyrf_q_cluster_size": 0}, r"q_cluster_size \(--smyrf_q_cluster_size\) must be at least 1"),
        ({"smyrf_plug_in_index": 3}, "smyrf_plug_in_index must be 0 to 2, got 3"),
        ({"smyrf_plug_out_index": -2}, "smyrf_plug_out_index must be 0 to 3, or -1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        smyrf(**SMALL, **options)


@pytest.mark.parametrize(("out", "layers"), [(-1, [1, 2]), (2, [1]), (1, [1, 2]), (0, [1, 2]), (3, [1, 2])])
def test_plug_in_and_out(out, layers):
    model = make(smyrf_plug_in_index=1, smyrf_plug_out_index=out)
    with steps(model) as seen:
        run(model, images(1))
    assert [step.layer for step, *_ in seen] == layers
    assert all(isinstance(step.core, SmyrfAttention) for step, *_ in seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hashes": 0}, r"n_hashes \(--smyrf_n_hashes\) must be at least 1, got 0"),
        ({"hashes": 2.0}, "hashes must be a whole number, got 2.0"),
        ({"cluster_size": 0}, r"q_cluster_size \(--smyrf_q_cluster_size\) must be at least 1"),
        ({"cluster_size": (4, 0)}, r"k_cluster_size \(--smyrf_k_cluster_size\) must be at least 1"),
        ({"cluster_size": (4, 9)}, "37 queries in clusters of 4 and 37 keys in clusters of 9 .* 10 and 5"),
        ({"cluster_size": 4.0}, "cluster_size must be a whole number or a tuple of 2 whole numbers, got 4.0"),
        ({"layer": 4}, "layer must be a layer, 0 to 3, got 4"),
        ({"layer": 2, "stop": 2}, "stop, the first layer without, must be 3 to 4, got 2"),
        ({"stop": 5}, "stop, the first layer without, must be 3 to 4, got 5"),
        ({"rounds": 3}, "smyrf has no setting 'rounds'.* it has .*hashes, cluster_size"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        lean(timm(), "smyrf", **settings)


def test_defaults_and_the_published_settings():
    net = timm(img_size=28)
    assert lean(net, "smyrf").methods == (SMYRF(8, (16, 16), 2, 4, padded=True),)
    with pytest.warns(UserWarning, match="in batches of a multiple of"):
        assert lean(net, "smyrf", preset="swag", cluster_size=24).methods == (SMYRF(8, (24, 24), 2, 4, padded=False),)
    with torch.device("meta"):
        published = create("smyrf_vit_l16_in1k", smyrf_plug_in_index=3)
    assert published.methods == (SMYRF(32, (64, 64), 3, 24, padded=False),)


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_features_have_the_full_grid_and_no_image_sees_another(prefix):
    """With the same projections: they are drawn for all images of a batch."""
    fast, x = lean(timm(**prefix), "smyrf", layer=0, cluster_size=8), image(3, 24)
    assert not fast.depends_on_data

    def features(x: Tensor) -> Tensor:
        set_generator(fast, torch.Generator().manual_seed(2))
        with torch.inference_mode():
            return fast.features(x)

    together = features(x)
    assert together.shape == (3, 16, 6, 6)
    assert together.isfinite().all()
    torch.testing.assert_close(features(x[1:2]), together[1:2], rtol=0, atol=1e-12)
    assert torch.equal(features(x), together)
    assert fast.tokens_per_layer() == [fast.plan.host.facts.tokens] * 5


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}], ids=str)
def test_one_cluster_is_the_network(prefix):
    net, x = timm(**prefix), image(2, 24)
    fast = lean(net, "smyrf", layer=0, cluster_size=64)
    torch.testing.assert_close(run(fast, x), run(net, x), rtol=0, atol=1e-12)
    assert not torch.allclose(run(lean(net, "smyrf", layer=0, cluster_size=8), x), run(net, x))


def test_clusters_that_do_not_fit():
    with pytest.raises(ValueError, match=r"--smyrf_q_cluster_size.*--smyrf_padded"):
        run(make(smyrf_q_cluster_size=5, smyrf_k_cluster_size=5), images(1))
    with pytest.raises(ValueError, match="do not make as many clusters: 4 and 2"):
        run(make(smyrf_k_cluster_size=8), images(1))
    with pytest.raises(ValueError, match="do not make as many clusters"):
        run(make(smyrf_k_cluster_size=8, smyrf_padded=True), images(1))
    assert run(make(smyrf_q_cluster_size=5, smyrf_k_cluster_size=5, smyrf_padded=True), images(1)).isfinite().all()


def test_masks_algorithms_and_keywords_are_refused():
    attention, x = SmyrfMultiheadAttention(8, 2, 2, 3, 3, batch_first=True), torch.randn(1, 3, 8)
    for mask in ({"key_padding_mask": torch.zeros(1, 3, dtype=torch.bool)}, {"attn_mask": torch.zeros(3, 3)}):
        with pytest.raises(ValueError, match="no masks"):
            attention(x, x, x, **mask)
    with pytest.raises(ValueError, match="no masks"):
        attention.attention(x, x, x, attn_mask=torch.zeros(3, 3))
    with pytest.raises(NotImplementedError, match="'lsh'"):
        SmyrfAttention(1, 1, 1, clustering_algo="kmeans")
    with torch.device("meta"), pytest.raises(TypeError, match="act_q_hashes"):
        create("smyrf_vit_l16_in1k", act_q_hashes=3)


def test_sequence_first_and_batch_first():
    torch.manual_seed(0)
    first = SmyrfMultiheadAttention(16, 2, 2, 4, 4, batch_first=True).eval()
    second = SmyrfMultiheadAttention(16, 2, 2, 4, 4).eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 8, 16)
    results = []
    for module, tokens in ((first, x), (second, x.transpose(0, 1))):
        torch.manual_seed(5)
        out, weights = module(tokens, tokens, tokens, need_weights=True)
        assert weights is None
        results.append(out if module.batch_first else out.transpose(0, 1))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_equals_eager(padded):
    model, x = make(smyrf_padded=padded), images(1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        torch.testing.assert_close(run(compiled, x, seed), run(model, x, seed), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    torch._dynamo.reset()


def test_cluster_sizes_that_fit_no_batch_or_only_some_are_told_at_once():
    sizes = {"smyrf_n_hashes": 8, "smyrf_q_cluster_size": 8}
    with torch.device("meta"):
        with pytest.raises(ValueError, match=r"65 queries in clusters of 8 and 65 keys in clusters of 4 .--smyrf_q_"):
            create("smyrf_vit_desk", **sizes, smyrf_k_cluster_size=4)
        with pytest.warns(UserWarning, match="fit 65 tokens in batches of a multiple of 3 images only"):
            create("smyrf_vit_desk", smyrf_n_hashes=8, smyrf_q_cluster_size=12, smyrf_k_cluster_size=12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            create("smyrf_vit_desk", **sizes, smyrf_k_cluster_size=8)
            create("smyrf_vit_desk", **sizes | {"smyrf_q_cluster_size": 7}, smyrf_k_cluster_size=7, smyrf_padded=True)


def test_only_wide_vectors_take_the_compiled_attention(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: {"attend_in_clusters": frozenset({"cpu"}), "sort_rows": {"cpu"}})
    for capability, served in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda answer=capability: answer)
        assert library.serves(torch.device("cpu"), "attend_in_clusters") is served
        assert library.serves(torch.device("cpu"), "sort_rows")

"""The methods as plug-ins: on the SWAG network against the published forms, and what they promise on others."""

import dataclasses
import re
import warnings
from typing import Any, get_type_hints

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer as TorchvisionViT

from common.hosts import NotAHost, Parts, Plan, PlanError, Tokens, lean
from common.hosts.network import METHODS as NAMES
from common.hosts.network import find_host, load, make_method
from common.hosts.settings import describe, fits
from common.tests.apart import check_images_apart
from hourglass_swag.models import create
from hourglass_swag.models.act_vision_transformer import ACT
from hourglass_swag.models.ats_vision_transformer import ATS
from hourglass_swag.models.evit import EViT
from hourglass_swag.models.evo_vit import EvoViT
from hourglass_swag.models.hourglass_vit import Hourglass
from hourglass_swag.models.ops.ACT.ada_clustering_attention import AdaClusteringAttention
from hourglass_swag.models.ops.ats import sample_tokens
from hourglass_swag.models.ops.cluster import TokenClusteringBlock, cluster_free_of_scale
from hourglass_swag.models.ops.reconstruction import reconstruction_weights, weights_free_of_scale
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention
from hourglass_swag.models.ops.tome.tome.merge import (
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    merge_wavg,
    random_bipartite_soft_matching,
)
from hourglass_swag.models.smyrf_vision_transformer import SMYRF
from hourglass_swag.models.tome_vit import ToMe

METHODS = {
    "tome": ToMe(r=3),
    "hourglass": Hourglass(layer=1, clusters=9),
    "evit": EViT(keep=0.5, layers=(1, 2)),
    "evit, mean": EViT(keep=0.5, layers=(1,), score="mean", fuse=True),
    "evit, frozen": EViT(keep=0.5, layers=(1,), restore="frozen"),
}
ALL: dict[str, Any] = {
    **METHODS,
    "evo_vit": EvoViT(),
    "ats": ATS(),
    "ats, masked": ATS(drop=False),
    "ats, copy": ATS(layers=(1, 2), restore="copy"),
    "act": ACT(hashes=8),
}
ALL["smyrf"] = SMYRF(cluster_size=4)


SHAPE: dict[str, Any] = {
    "img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5
}  # fmt: skip


def swag(**options: Any) -> Any:
    torch.manual_seed(0)
    net: Any = create("vit_desk", **options).double().eval()
    torch.nn.init.normal_(net.head.layers.head.weight)
    return net


def filled(net: Any) -> Any:
    for parameter in net.double().eval().parameters():
        torch.nn.init.normal_(parameter, 0.05 if parameter.dim() > 1 else 0.3, 0.2)
    return net


def timm(**options: Any) -> TimmViT:
    torch.manual_seed(0)
    return filled(TimmViT(**SHAPE | options))


def images(side: int = 32, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "method", "settings"),
    [
        ("hourglass_vit", {"clustering_location": 3, "num_cluster": 25}, "hourglass", {"layer": 3, "clusters": 25}),
        ("tome_vit", {"tome_r": (6, -1.0)}, "tome", {"r": (6, -1.0)}),
        ("e_vit", {"base_keep_rate": 0.6, "drop_loc": (2, 5), "fuse_token": True}, "evit",
         {"keep": 0.6, "layers": (2, 5), "fuse": True}),
        ("evo_vit", {"prune_ratio": 0.5, "prune_location": 3}, "evo_vit", {"keep": 0.5, "layer": 3}),
        ("ats_vit", {"ats_blocks": (5, 7), "drop_tokens": True}, "ats", {"layers": (5, 7)}),
    ],
)  # fmt: skip
def test_the_preset_is_the_published_row(
    name: str, options: dict[str, Any], method: str, settings: dict[str, Any]
) -> None:
    net = swag()
    row = create(f"{name}_desk", **options).double().eval()
    row.load_state_dict(net.state_dict())
    fast = lean(net, method, preset="swag", **settings)
    torch.testing.assert_close(fast(images()), row(images()), rtol=0, atol=1e-12)
    assert fast.tokens_per_layer(images()) == row.tokens_per_layer(images())  # pyright: ignore[reportCallIssue]
    if method != "tome":  # whose published form is the paper's
        assert not torch.allclose(lean(net, method, **settings).features(images()), fast.features(images()))
    with pytest.raises(PlanError, match="preset must be 'swag'"):
        lean(net, method, preset="swagg")


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_features_are_restored_on_every_grid(name: str, prefix: dict[str, Any]) -> None:
    net = timm(**prefix)
    fast = lean(net, METHODS[name])
    assert fast.tokens_per_layer()[-1] < fast.tokens_per_layer()[0]
    features = fast.features(images(40))
    assert features.shape == (2, 32, 5, 5)
    assert features.isfinite().all()
    assert fast(images(40)).shape == (2, 5)
    one = fast.features(images(40)[:1])
    torch.testing.assert_close(one, features[:1], rtol=0, atol=1e-11)  # no image depends on the others


@pytest.mark.parametrize("name", METHODS)
def test_networks_that_rotate(name: str) -> None:
    torch.manual_seed(0)
    net = Eva(**SHAPE, use_rot_pos_emb=True, num_reg_tokens=2).double().eval()
    fast = lean(net, METHODS[name])
    features = fast.features(images(40))
    assert features.shape == (2, 32, 5, 5)
    torch.testing.assert_close(fast.features(images(40)[:1]), features[:1], rtol=0, atol=1e-11)
    assert lean(net, ToMe(r=0))(images(40)).equal(net(images(40)))


def seeded(fast: Any, batch: Tensor) -> Tensor:
    torch.manual_seed(3)
    return fast(batch)


HOSTS: dict[str, Any] = {
    "timm": timm,
    "eva": lambda: filled(Eva(**SHAPE, use_rot_pos_emb=True, num_reg_tokens=2)),
    "torchvision": lambda: filled(TorchvisionViT(40, 8, 4, 2, 32, 64, num_classes=5)),
    "swag": lambda: swag(image_size=40),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_stays_in_its_image(name: str, host: str) -> None:
    fast = lean(HOSTS[host](), ALL[name])
    check_images_apart(lambda batch: (fast(batch), fast.features(batch)), images(40, 3), atol=1e-11)


ROWS: dict[str, dict[str, Any]] = {
    "hourglass_vit": {"clustering_location": 3, "num_cluster": 25},
    "tome_vit": {"tome_r": 6},
    "e_vit": {"drop_loc": (2, 5), "fuse_token": True},
    "evo_vit": {"prune_ratio": 0.5},
    "ats_vit": {"ats_blocks": (5, 7)},
    "act_vit": {"act_q_hashes": 8, "act_group_k": True},
    "smyrf_vit": {"smyrf_n_hashes": 8, "smyrf_q_cluster_size": 4, "smyrf_k_cluster_size": 4, "smyrf_padded": True},
}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_not_finite_stays_in_its_image_of_a_published_row(name: str) -> None:
    check_images_apart(create(f"{name}_desk", image_size=36, **ROWS[name]).double().eval(), images(36, 3), atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("evo_vit", {"prune_location": 99}, r"layer .--evo_prune_location. must be 0 to 7, got 99"),
        ("evo_vit", {"prune_ratio": 0.5, "prune_location": 0}, "must be 1 to 7, got 0: the first layer"),
        ("evo_vit", {"prune_ratio": [1.0] * 8, "prune_location": 8}, "must be 0 to 7, got 8"),
        ("e_vit", {"drop_loc": (), "base_keep_rate": 5.0}, r"--base_keep_rate. must be in \(0, 1\], got 5.0"),
        ("hourglass_vit", {"clustering_location": -1, "cluster_window_size": 4}, "cluster_window_size. must be odd"),
        ("hourglass_vit", {"clustering_location": -1, "cluster_iters": -1}, "cluster_iters. must not be negative"),
        ("ats_vit", {"num_tokens": 0}, "--ats_num_tokens. must be at least"),
    ],
)
def test_settings_out_of_range_are_refused_also_where_nothing_would_use_them(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create(f"{name}_desk", **options)


def test_published_clusters_of_smyrf_couple_images() -> None:
    """82 tokens of 4 heads in clusters of 16: some hold tokens of two images, as ``SMYRF.padded`` says."""
    sizes = {"smyrf_n_hashes": 16, "smyrf_q_cluster_size": 16, "smyrf_k_cluster_size": 16}
    net, batch = create("smyrf_vit_desk", image_size=36, **sizes).double().eval(), images(36, 3)
    assert seeded(net, batch).isfinite().all()
    batch[1] = torch.nan
    assert seeded(net, batch).isnan().all(1).sum() > 1


def act(groups: dict[str, bool]) -> Any:
    return lambda x: AdaClusteringAttention(**groups, q_hashes=8)(x, x / 2, x)


def clustered(x: Tensor) -> Any:
    return TokenClusteringBlock(4)(x.mT.unflatten(2, (5, 5)))


def merged(x: Tensor, **options: Any) -> Any:
    merge, unmerge = bipartite_soft_matching(x, 5, **options)
    return merge(x), merge(x, "amax"), merge_wavg(merge, x), unmerge(merge(x))


OPERATORS: dict[str, Any] = {
    "act, queries": act({"group_Q": True}),
    "act, keys": act({"group_K": True}),
    "smyrf": lambda x: SmyrfAttention(8, 4, 4, padded=True)(x, x, x),
    "smyrf, clusters that fit": lambda x: SmyrfAttention(8, 5, 5)(x, x, x),
    "clusters": clustered,
    "reconstruction": lambda x: reconstruction_weights(x, x[:, :6], 3, 0.05, "l2"),
    "tome": lambda x: merged(x, class_token=True, distill_token=True),
    "tome, patches": merged,
    "tome, k-th": lambda x: merge_wavg(kth_bipartite_soft_matching(x, 3)[0], x),
    "tome, random": lambda x: merge_wavg(random_bipartite_soft_matching(x, 7)[0], x),
    "ats": lambda x: sample_tokens(*[x[:, None]] * 3, None, n_ref_tokens=25, drop_tokens=False)[0],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_images_apart_and_take_none(name: str) -> None:
    x = torch.randn(3, 25, 16, generator=torch.Generator().manual_seed(1))
    check_images_apart(lambda batch: OPERATORS[name](batch[:, 0]), x[:, None])
    found = [leaf for leaf in tree_leaves(OPERATORS[name](x[:0])) if isinstance(leaf, Tensor)]
    assert found
    assert all(len(leaf) == 0 for leaf in found)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_patch_embedding(name: str) -> None:
    net = timm(class_token=False, global_pool="avg") if name in ("hourglass", "tome") else timm()
    fast = lean(net, ALL[name])
    fast(images(40)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.patch_embed.proj.weight.grad.abs().sum() > 0  # pyright: ignore[reportOptionalMemberAccess]


def test_gradients_flow_through_the_clusters() -> None:
    """Also where the clustering is the first thing that happens, and the automatic temperature is detached."""
    net = timm(class_token=False, global_pool="avg")
    gradients = []
    for temperature in ("auto", 1.0):
        net.zero_grad()
        fast = lean(net, Hourglass(layer=0, temperature=temperature, reconstruction_temperature=0.0))
        fast(images(40)).square().sum().backward()
        gradients.append(net.patch_embed.proj.weight.grad.norm())  # pyright: ignore[reportOptionalMemberAccess]
    assert gradients[0] > 0.1 * gradients[1] > 0


@pytest.mark.parametrize("name", ["hourglass", "evit", "ats"])
def test_under_autocast_likeness_is_measured_in_float32(name: str) -> None:
    net, batch = timm().float(), images(40).float()
    fast = lean(net, ALL[name])
    with torch.no_grad():
        expected = fast.features(batch).flatten(2)
        with torch.autocast("cpu", torch.bfloat16):
            found = fast.features(batch).float().flatten(2)
    assert torch.cosine_similarity(found, expected, dim=1).mean() > 0.97


def test_ats_keeps_a_patch_of_few() -> None:
    for side, patches in ((16, 2), (8, 1)):
        net = timm(img_size=(8, side), depth=6)
        torch.manual_seed(0)
        left = lean(net, ATS(layers=(1, 2, 3, 4, 5))).tokens_per_layer(torch.randn(2, 3, 8, side, dtype=torch.float64))
        assert left[0] == 1 + patches
        assert left[-1] == 2


def test_ats_samples_as_many_as_enter_also_of_larger_images() -> None:
    fast = lean(timm(dynamic_img_size=True), ATS(layers=(2,)))
    assert fast.tokens_per_layer(images(80))[-1] > 26


def test_evit_behind_tome_ranks_by_the_attention_that_counts_sizes() -> None:
    net = timm()
    fast = lean(net, ToMe(r=[8, 0, 0, 0]), EViT(layers=(2,), keep=0.5))
    seen: list[Any] = []
    step = next(step for step in fast.plan.steps if step.method.name == "evit")
    step.register_forward_hook(lambda step, operands, after: seen.append((operands, after)))
    fast(images(40))
    (tokens, parts), after = seen[0]
    weights = (parts.q @ parts.k.mT * parts.scale + tokens.key_bias[:, None, None]).softmax(3).mean(1)[:, 0, 1:]
    kept = weights.topk(after.x.shape[1] - 1, dim=1).indices + 1
    torch.testing.assert_close(after.x[:, 1:], tokens.x.gather(1, kept[..., None].expand(-1, -1, 32)))


@pytest.mark.parametrize("method", [EViT(fuse=True), EvoViT()])
def test_patches_without_any_attention_give_no_nan_where_tokens_rotate(method: Any) -> None:
    torch.manual_seed(0)
    net = Eva(**SHAPE, use_rot_pos_emb=True).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight.mul_(3000)
        assert lean(net, method, verify=False)(images(40).float()).isfinite().all()


def test_smyrf_takes_any_batch_when_exported_or_compiled() -> None:
    fast = lean(timm(), SMYRF(cluster_size=4))
    batch = {0: torch.export.Dim("batch", min=2, max=16)}
    exported = torch.export.export(fast, (images(40),), dynamic_shapes=(batch,)).module()
    assert exported(images(40, 3)).shape == (3, 5)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        for number in (2, 3):
            torch.testing.assert_close(seeded(compiled, images(40, number)), seeded(fast, images(40, number)))
    with pytest.raises(PlanError, match="evit at layer 1 breaks the number of tokens that smyrf needs at layer 2"):
        lean(timm(), EViT(layers=(1,)), SMYRF(layer=2, cluster_size=13, hashes=1, padded=False))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
    | st.complex_numbers() | st.sampled_from(["0.5", "class ", "auto", "3", "(1, 2)", object(), int, torch.ones(2)]),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip
HOST = find_host(timm())
SETTINGS = [(name, field.name) for name in NAMES for field in dataclasses.fields(load(NAMES[name]))]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
@hypothesis.given(value=ANYTHING)
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_setting_of_any_kind_works_or_is_refused_in_words(name: str, setting: str, value: Any) -> None:
    kind = get_type_hints(load(NAMES[name]))[setting]
    right = fits(value, kind) or (isinstance(value, list) and fits(tuple(value), kind))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = Plan(HOST, [make_method(name, {setting: value})])
    except PlanError as error:
        message = str(error)
        assert message.startswith(f"{name}: " if setting != "layer" or not right else name)
        assert right or f"{setting} must be {describe(kind)}, got {value!r}" in message
        assert "object" not in message or "object" in repr(value), message  # "'int' object is not iterable"
    else:
        assert right
        assert fits(getattr(plan.methods[0], setting), kind)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (EViT(keep="0.5"), "evit: keep must be a number or a tuple of numbers, got '0.5', did you mean 0.5?"),
        (EViT(layers=2), "evit: layers must be a tuple of whole numbers or None, got 2, did you mean (2,)?"),
        (ACT(hashes=True), "act: hashes must be a whole number, got True, did you mean 1?"),
        (ATS(drop="no"), "ats: drop must be True or False, got 'no'"),
        (ATS(restore="copi"), "restore must be 'nearest' or 'frozen' or 'copy', got 'copi', did you mean 'copy'?"),
        (ToMe(r=2.0), "a list of whole numbers or None, got 2.0, did you mean 2?"),
        (SMYRF(cluster_size=(4, 4, 4)), "must be a whole number or a tuple of 2 whole numbers, got (4, 4, 4)"),
        (Hourglass(temperature="aut"), "temperature must be 'auto' or a number, got 'aut', did you mean 'auto'?"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_setting_of_a_wrong_kind(method: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        lean(timm(), method)


def test_lists_stand_for_tuples() -> None:
    methods = EViT(layers=[0, 1], keep=[0.9, 0.5]), Hourglass(clusters=[3, 4]), ToMe(r=range(4))  # pyright: ignore[reportArgumentType]
    found = [Plan(HOST, [method]).methods[0] for method in methods]
    assert (found[0].keep, found[1].clusters, found[2].r) == ((0.9, 0.5), (3, 4), [0, 1, 2, 3])  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("smyrf", {"cluster_size": 8, "padded": False, "hashes": 1}, "in batches of a multiple of 2 images only"),
        ("act", {"hashes": 33}, "rounds behind 32 change nothing"),
    ],
)
def test_warnings_of_settings_point_at_who_gave_them(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        lean(timm(), name, **settings)
    assert {warning.filename for warning in caught} == {__file__}


def test_nothing_is_restored_from_a_fused_token_while_a_patch_was_kept() -> None:
    method = EViT(keep=0.5, layers=(0, 1), fuse=True).resolve(HOST.facts)
    first = torch.eye(8, 6, dtype=torch.float64).roll(1, 0)[None]  # a class token, 6 patches, one of zeros behind them
    first = first[:, :7] + 0.01

    def between(layer: int, tokens: Tokens, scores: list[float], keep: tuple[float, float] = (0.5, 0.5)) -> Tokens:
        parts = Parts(*[tokens.x[:, None]] * 3, 1.0, scores=torch.tensor([[0.0, *scores]], dtype=torch.float64))
        return dataclasses.replace(method, keep=keep).between(layer, tokens, parts)

    tokens = between(0, Tokens(first, 1, (2, 3)), [6, 5, 4, 3, 2, 1])  # keeps patches 0, 1, 2 and the sum of the others
    assert tokens.x.shape == (1, 5, 6)
    x = tokens.x.clone()
    x[:, 2:4] = x[:, 4:]  # the patches that will be dropped are now like the fused token
    after = between(1, tokens.update(x=x), [3, 1, 1, 4])  # keeps the fused token, then patch 0
    torch.testing.assert_close(after.x[:, 1:3], x[:, [4, 1]])
    shares = after.membership()[0]
    assert shares[:, 1:].sum(1).tolist() == [0, 0, 6, 0]  # all patches are patch 0 in the end
    alone = between(1, tokens.update(x=x), [1, 1, 1, 4], keep=(0.5, 0.25))  # nothing but the fused token
    assert alone.membership()[0, :, 1:].sum(1).tolist() == [0, 6, 0]


def test_a_patch_that_was_dropped_follows_the_one_sampled_in_its_place() -> None:
    net, batch = timm(depth=1), images(40, 3)
    dense = net.forward_features(batch)
    fast = lean(net, ATS(layers=(0,), restore="copy"))
    restored = fast.forward_features(batch)
    kept = (restored - dense).abs().amax(2) < 1e-12  # one block: what is sampled attends to the same
    assert kept[:, 0].all()
    assert (kept.sum(1) < 26).all()
    shares = fast.run(batch).membership()
    assert shares.sum(1).eq(1).all()
    for image in range(3):
        rows = {tuple(row) for row in restored[image, kept[image]].tolist()}
        assert {tuple(row) for row in restored[image].tolist()} == rows
    torch.testing.assert_close(fast.forward_features(batch[1:2]), restored[1:2], rtol=0, atol=1e-12)
    assert not torch.equal(restored, lean(net, ATS(layers=(0,))).forward_features(batch))


def test_membership_where_dropped_patches_stay_frozen() -> None:
    fast = lean(timm(), EViT(layers=(1,), keep=0.5, restore="frozen"))
    shares = fast.run(images(40)).membership()
    assert shares.shape == (2, 14, 26)
    assert shares.sum(2).eq(1).all()


@pytest.mark.parametrize("method", [ToMe(r=0), Hourglass(layer=1, clusters=(5, 5), iters=0, k=1), EViT(keep=1.0)])
def test_nothing_reduced_is_the_network(method: Any) -> None:
    net = timm(reg_tokens=2)
    torch.testing.assert_close(lean(net, method)(images(40)), net(images(40)), rtol=0, atol=1e-12)
    restored, dense = lean(net, method).forward_features(images(40)), net.forward_features(images(40))
    torch.testing.assert_close(restored, dense, rtol=0, atol=1e-12)


def test_kept_patches_have_their_own_features_and_dropped_ones_those_of_the_nearest() -> None:
    net = timm(depth=1)
    dense = net.forward_features(images(40))[:, 1:]
    restored = lean(net, EViT(keep=0.4, layers=(0,))).forward_features(images(40))[:, 1:]
    kept = (restored - dense).abs().amax(2) < 1e-12  # one block: what is kept attends to the same
    assert kept.sum(1).tolist() == [10, 10]
    for image in range(2):
        rows = {tuple(row) for row in restored[image, kept[image]].tolist()}
        assert {tuple(row) for row in restored[image].tolist()} == rows


def test_methods_compose() -> None:
    net = timm(depth=6)
    fast = lean(net, ToMe(r=[0, 0, 0, 2, 2, 0]), Hourglass(layer=1, clusters=(4, 4)), EViT(keep=0.5, layers=(5,)))
    assert fast.tokens_per_layer() == [26, 17, 17, 17, 15, 13, 7]
    assert fast.features(images(40)).shape == (2, 32, 5, 5)
    with pytest.raises(PlanError, match="tome at layer 0 breaks the grid that hourglass needs at layer 1"):
        lean(net, ToMe(r=1), Hourglass(layer=1))


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_the_automatic_temperature_is_free_of_scale(factor: float) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    clusters, _ = cluster_free_of_scale(features, (3, 3), 5, 1)
    scaled, _ = cluster_free_of_scale(features * factor, (3, 3), 5, 1)
    torch.testing.assert_close(scaled / factor, clusters, rtol=1e-9, atol=1e-9)
    tokens = features.flatten(2).mT
    weights = weights_free_of_scale(tokens, clusters, 3, "l1")
    torch.testing.assert_close(weights_free_of_scale(tokens * factor, scaled, 3, "l1"), weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 36, dtype=torch.float64))


def test_equal_patches_cluster_without_a_nan() -> None:
    fast = lean(timm(pos_embed="none"), "hourglass")
    assert fast.features(torch.zeros(1, 3, 40, 40, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tome", {"r": -1}, "r must be at least 0"),
        ("tome", {"r": [1] * 9}, "r holds 9 numbers for 4 layers"),
        ("hourglass", {"layer": 4}, "layer must be a layer, 0 to 3, got 4"),
        ("hourglass", {"clusters": (6, 2)}, "clusters must be 1 to \\(5, 5\\)"),
        (
            "hourglass",
            {"clusters": 7},
            "7 clusters \\(-n, --num_cluster\\) do not fill a grid like the patches' 5x5; give .*, or 9 or 4",
        ),
        ("hourglass", {"k": 0}, "k must be 1 to"),
        ("evit", {"keep": 0}, "must be in \\(0, 1\\], got 0"),
        ("evit", {"layers": (1, 7)}, "layers must be a layer, 0 to 3, got 7"),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lean(timm(), name, **settings)


def test_more_pairs_than_there_are_merge_half() -> None:
    assert lean(timm(), "tome", r=1000).tokens_per_layer() == [26, 14, 8, 5, 3]


def test_networks_that_reduce_tokens_already_are_no_hosts() -> None:
    with pytest.raises(NotAHost, match="this network has token methods already"):
        lean(create("e_vit_desk"), "tome")


def test_what_cannot_share_a_layer_is_refused_before_any_image() -> None:
    with pytest.raises(PlanError, match="tome and evit both reduce the tokens between the halves of layer 1"):
        lean(timm(), ToMe(r=1), EViT())
    with pytest.raises(PlanError, match="layers must differ"):
        lean(timm(), EViT(layers=(1, 1)))
    headless = timm(class_token=False, global_pool="avg")
    with pytest.raises(PlanError, match="tome at layer 0 breaks the plain attention that evit needs at layer 3"):
        lean(headless, ToMe(r=[1, 0, 0, 0]), EViT(layers=(3,)))
    with pytest.raises(PlanError, match="score 'class' needs a class token"):
        lean(headless, EViT(score="class"))
    assert lean(headless, ToMe(r=[1, 0, 0, 0], prop_attn=False), EViT(layers=(3,)))(images(40)).shape == (2, 5)


@pytest.mark.parametrize("name", ["tome", "hourglass", "evit"])
def test_costs_exports_and_smaller_images(name: str) -> None:
    net = timm(dynamic_img_size=True)
    fast = lean(net, name)
    assert fast.gmacs() < lean(net).gmacs()
    small = fast.plan.run(fast.plan.host.embed(fast, images(16)))
    assert small.x.shape[1] <= 5  # 4 patches and the class token
    batch = {0: torch.export.Dim("batch", min=2, max=16)}
    plain = lean(timm(), name)
    exported = torch.export.export(plain, (images(40),), dynamic_shapes=(batch,))
    torch.testing.assert_close(exported.module()(images(40, 3)), plain(images(40, 3)), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="the batch is empty"):
        fast(images(40)[:0])


@pytest.mark.parametrize("method", [Hourglass(clusters=-4), Hourglass(temperature=float("inf")), ToMe])
def test_what_no_kind_says_is_refused(method: Any) -> None:
    with pytest.raises(PlanError):
        lean(timm(), method)

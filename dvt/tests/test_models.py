"""Networks: properties of the paper, costs to the digit, and what they refuse."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.layers import Performer, Split, soft_split
from common.measure.flops import CONVENTIONS, count_parameters
from common.tests.apart import check_images_apart
from common.tests.reference import array, image
from dvt.costs import count_exits, exit_gflops
from dvt.dynamic import DynamicClassifier
from dvt.exits import NOBODY, confidence_and_prediction
from dvt.models import SUFFIXES, create_model
from dvt.models.backbone import Backbone
from dvt.models.cascade import Cascade, make_cascade
from dvt.models.deit import VisionTransformer
from dvt.models.reuse import resize_relations, resize_side, resize_tokens
from dvt.models.t2t_vit import T2T_ViT
from dvt.models.transformer_block import Block
from dvt.tests.tiny import resize_grid, small_cascade, t2t_cascade

VECTORS = Path(__file__).parent / "vectors"
DESK = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "num_classes": 5}
PATCHES = [{"patch_size": 8}, {"patch_size": 5}, {"patch_size": 4}]


def small(**options) -> Cascade:
    torch.manual_seed(0)
    return make_cascade(VisionTransformer, PATCHES, **(DESK | options)).eval()


@pytest.mark.parametrize(("source", "target"), [(7, 10), (10, 14), (4, 6), (6, 8), (3, 3), (5, 4), (7, (10, 5))])
def test_the_resize_is_nearest_then_adaptive_pooling(source, target):
    maps = torch.from_numpy(array("maps", (2, 3, source, source)))
    doubled = F.interpolate(maps, scale_factor=2, mode="nearest")
    torch.testing.assert_close(resize_grid(maps, target), F.adaptive_avg_pool2d(doubled, target))


def test_the_resize_has_the_stated_rows():
    matrix = resize_side(7, 10)
    rows = matrix[[0, 1, 2, 7]]
    expected = torch.tensor([[0, 1.0], [0.5, 0.5], [2 / 3, 1 / 3], [1 / 3, 2 / 3]]).double()
    torch.testing.assert_close(rows[0, :2], torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(rows[1, :2], expected[1])
    torch.testing.assert_close(rows[2, 1:3], expected[2])
    torch.testing.assert_close(rows[3, 4:6], expected[3])
    assert set(matrix.unique().tolist()) == {0.0, 1 / 3, 1 / 2, 2 / 3, 1.0}
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(10).double(), rtol=1e-15, atol=0)


def test_relations_keep_the_class_token_apart():
    """Resized along keys and then along queries, class row and column along one side only."""
    relations = torch.from_numpy(array("r", (2, 3, 50, 50)))
    got = resize_relations(relations, resize_tokens((7, 7), (10, 10)))

    def along_keys(rows: torch.Tensor) -> torch.Tensor:
        grid = resize_grid(rows[..., 1:].unflatten(-1, (7, 7)), 10)
        return torch.cat([rows[..., :1], grid.flatten(-2)], dim=-1)

    expected = along_keys(along_keys(relations).transpose(-2, -1)).transpose(-2, -1)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[..., 0, 0], relations[..., 0, 0])
    assert got.stride(-2) % 8 == 0


@pytest.mark.parametrize("reuse", [(True, True), (True, False), (False, True), (False, False)])
def test_maps_are_made_only_where_the_next_exit_reuses_them(reuse):
    model = small(feature_reuse=reuse[0], relation_reuse=reuse[1])
    images = image(2, 32).float()
    with torch.no_grad():
        first = model.run_exit(0, images)
        second = model.run_exit(1, images, first)
        third = model.run_exit(2, images, second)
        logits = model(images)
    assert [output.relations is not None for output in (first, second, third)] == [reuse[1], reuse[1], False]
    for output, answer in zip((first, second, third), logits, strict=True):
        torch.testing.assert_close(output.logits, answer)


def test_selected_images_go_on_as_they_would_alone():
    model = small()
    images = image(4, 32).float()
    keep = torch.tensor([3, 1])
    with torch.no_grad():
        first = model.run_exit(0, images)
        second = model.run_exit(1, images[keep], first.select(keep))
        torch.testing.assert_close(second.logits, model(images)[1][keep])
        mask = torch.tensor([False, True, False, True])
        assert torch.equal(first.select(mask).features, first.features[[1, 3]])


def test_a_first_stage_is_the_network_alone():
    model = small()
    alone = VisionTransformer(**DESK, patch_size=8).eval()
    alone.load_state_dict(model.stages[0].state_dict())
    images = image(2, 32).float()
    with torch.no_grad():
        torch.testing.assert_close(alone(images), model(images)[0])


def test_the_fused_attention_trains_like_the_plain_one():
    """Gradients of reused logits, with and without the attention map."""
    block = Block(16, 2, feature_reuse=False).double()
    x = torch.from_numpy(array("x", (2, 5, 16)))
    grads = []
    for hand_on in (True, False):
        reused = torch.from_numpy(array("r", (2, 2, 5, 5))).requires_grad_()
        out, relation = block(x, None, reused, hand_on=hand_on)
        assert (relation is not None) == hand_on
        out.square().sum().backward()
        grads.append(reused.grad)
    torch.testing.assert_close(*grads)


def test_a_cascade_built_without_memory_is_whole_when_it_gets_some():
    with torch.device("meta"):
        model = make_cascade(VisionTransformer, PATCHES, **DESK)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(small().state_dict())
    images = image(2, 32).float()
    with torch.no_grad():
        for ours, theirs in zip(model(images), small()(images), strict=True):
            torch.testing.assert_close(ours, theirs)
        exact = small().double()(images.double())
        for ours, theirs in zip(model.double()(images.double()), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [Split(7, 4, 2), Split(11, 6, 5), Split(3, 2, 1)])
def test_soft_splits_are_the_same_with_and_without_gradient(split):
    maps = image(2, 23)
    plain = soft_split(maps, split)
    assert torch.equal(plain, soft_split(maps.requires_grad_(), split))
    assert plain.shape == (2, split.side(23) ** 2, 3 * split.kernel**2)


def test_drop_path_and_both_dropouts_of_the_performer_are_on_in_training():
    torch.manual_seed(0)
    performer = Performer(6, 4)
    x = torch.randn(2, 9, 6)
    assert not torch.equal(performer(x), performer(x))
    performer.eval()
    assert torch.equal(performer(x), performer(x))
    model = small(drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.stages[1].blocks]
    assert rates == [0.0, 0.5]
    model.train()
    images = image(8, 32).float()
    assert not torch.equal(model(images)[2], model(images)[2])


def test_the_performer_stays_finite_in_half_precision():
    performer = Performer(8, 4).eval()
    x = 30 * torch.from_numpy(array("x", (1, 9, 8))).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert performer(x).isfinite().all()
        seen = []
        performer.positive_features = lambda value: (
            seen.append(value.dtype) or Performer.positive_features(performer, value)
        )
        performer(x)
    assert seen == [torch.float32, torch.float32]


STATED = {
    "T2t_vit_7": 1.1565, "T2t_vit_10": 1.5274, "T2t_vit_12": 1.7748, "T2t_vit_12_less_less_token": 0.4725,
    "T2t_vit_12_less_token": 0.8982, "T2t_vit_14": 4.8003, "T2t_vit_14_less_token": 2.4047,
    "T2t_vit_14_less_less_token": 1.2065, "T2t_vit_19": 8.5027, "T2t_vit_24": 13.6924, "T2t_vit_t_14": 6.1055,
    "T2t_vit_t_19": 9.8080, "T2t_vit_t_24": 14.9977, "deit_small": 4.6083, "deit_small_less_less_token": 1.1453,
    "deit_small_less_token": 2.3048,
}  # fmt: skip
"""What fvcore counts on the official code, in GMACs."""


@pytest.mark.parametrize("name", sorted(STATED))
def test_cost_of_a_network(name):
    with torch.device("meta"):
        (cost,) = exit_gflops(create_model(name))
    assert round(cost, 4) == STATED[name]


STATED_STAGES = {
    "DVT_T2t_vit_12": (0.47248502, 0.989992916, 2.035066988),
    "DVT_T2t_vit_14": (1.206548892, 2.634317844, 5.486766252),
    "DVT_Deit_small": (1.145309952, 2.511011712, 5.187461952),
}


def rounded_by_fvcore(stage: Backbone) -> int:
    """What fvcore counts more: it reads the cost of the performer's einsums off a text of four significant digits."""
    total = 0
    encoders = getattr(stage.embed, "attention1", None), getattr(stage.embed, "attention2", None)
    for encoder, grid in zip(encoders, getattr(stage.embed, "grids", ()), strict=False):
        if not isinstance(encoder, Performer):
            continue
        sums = math.prod(grid) * encoder.features
        product = sums * encoder.width
        for count, times in ((product, 3), (sums, 1)):  # a batched product is counted exactly
            total += times * (int(float(f"{2 * count:.3e}") // 2) - count)
    return total


@pytest.mark.parametrize("name", sorted(STATED_STAGES))
def test_cost_of_every_exit_to_the_last_digit(name):
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, Cascade)
    totals = [CONVENTIONS["fvcore"].total(counted.published) for counted in count_exits(model)]
    stages = np.diff([0, *totals]).tolist()
    stated = [round(gigas * 1e9) for gigas in STATED_STAGES[name]]
    assert [own + rounded_by_fvcore(stage) for own, stage in zip(stages, model.stages, strict=True)] == stated


def test_what_runs_costs_the_products_of_the_resizes():
    """By hand: W R W^T of each relation, its columns padded to whole groups of eight, and A f of each block."""
    with torch.device("meta"):
        model = create_model("DVT_desk")
    published, executed = ([getattr(c, kind) for c in count_exits(model)] for kind in ("published", "executed"))
    tokens, heads, depth, channels = [10, 17, 37], 2, 3, 12
    products = pixels = 0
    for exit, (before, now) in enumerate(itertools.pairwise(tokens), 1):
        relations = heads * depth * (before * before + now * before) * (now + -now % 8)
        products += relations + depth * channels * (now - 1) * (before - 1)
        pixels += 4 * (before - 1) * (channels * depth + heads * depth * (before + now))
        assert executed[exit]["matmul"] - published[exit]["matmul"] == products
        assert published[exit]["pool"] == published[exit]["upsample"] == pixels
    assert executed[0] == published[0]


def test_sizes_of_the_stages():
    stated = {
        "DVT_T2t_vit_12": (6_989_824, 7_744_510, 7_727_182),
        "DVT_T2t_vit_14": (21_574_656, 23_156_110, 23_151_070),
        "DVT_Deit_small": (22_878_952, 23_920_456, 23_642_824),
    }
    for name, sizes in stated.items():
        with torch.device("meta"):
            model = create_model(name)
        assert isinstance(model, Cascade)
        assert tuple(count_parameters(stage) for stage in model.stages) == sizes


def test_switches_of_the_factories():
    manifest = json.loads((VECTORS / "manifest_DVT_T2t_vit_12.json").read_text())["state_dict"]
    for features, relations in ((True, False), (False, True), (False, False)):
        with torch.device("meta"):
            model = create_model("DVT_T2t_vit_12", feature_reuse=features, relation_reuse=relations)
        expected = [
            key
            for key in manifest
            if (features or "feature_resuse" not in key) and (relations or "relation_reuse" not in key)
        ]
        assert list(model.state_dict()) == expected


@pytest.mark.parametrize("size", [224, 226, 223, 227, 240])
def test_sizes_that_work(size):
    with torch.device("meta"):
        if size in (224, 226):
            model = create_model("DVT_T2t_vit_12", img_size=size)
            assert [stage.grid for stage in model.stages] == [(7, 7), (10, 10), (14, 14)]  # pyright: ignore[reportAttributeAccessIssue]
        else:
            with pytest.raises(ValueError, match=f"img_size {size} does not give; sizes that work: 224-226"):
                create_model("DVT_T2t_vit_12", img_size=size)
        if size < 240 and size > 223:
            create_model("DVT_Deit_small", img_size=size)
        else:
            with pytest.raises(ValueError, match="sizes that work: 224-239"):
                create_model("DVT_Deit_small", img_size=size)


@pytest.mark.parametrize("kind", ["deit", "t2t"])
def test_rectangular_images(kind):
    """Tokens lie row by row, and are resized along either side by itself."""
    if kind == "deit":
        model = small(img_size=(32, 48))
        grids, size = [(4, 6), (6, 9), (8, 12)], (32, 48)
    else:
        stages = [{"tokens_type": f"performer{end}"} for end in ("_less_less_token", "")]
        alone = [T2T_ViT((64, 96), depth=1, embed_dim=16, num_heads=2, token_dim=4, **stage) for stage in stages]
        assert [stage.grid for stage in alone] == [(2, 3), (4, 6)]
        assert alone[0](torch.zeros(1, 3, 64, 96)).shape == (1, 1000)
        with pytest.raises(ValueError, match="takes images of 64x96 pixels, got 96x64"):
            alone[0](torch.zeros(1, 3, 96, 64))
        return
    assert [stage.grid for stage in model.stages] == grids
    assert [logits.shape for logits in model(image(2, size).float())] == [(2, 5)] * 3
    maps = torch.from_numpy(array("m", (2, 4, 6))).float()
    moved = resize_tokens((4, 6), (6, 9))[1:, 1:].float() @ maps.flatten(1).T
    torch.testing.assert_close(moved.T.unflatten(1, (6, 9)), resize_grid(maps, (6, 9)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_model("DVT"), "unknown model 'DVT'; the models are DVT_Deit_small"),
        (lambda: T2T_ViT(tokens_type="convolution", depth=1), "unknown tokens_type 'convolution'; the types are"),
        (lambda: T2T_ViT(img_size=250, depth=1), "gives 16x16 tokens .* position table has 225; sizes that work"),
        (lambda: T2T_ViT(embed_dim=50, num_heads=4, depth=1), "embed_dim 50 must be a multiple of num_heads 4"),
        (lambda: VisionTransformer(img_size=8), "img_size 8 is smaller than a patch of 16"),
        (lambda: VisionTransformer(32, 12, padding=1, stem=8), "must be even, got 12 and 1"),
        (
            lambda: create_model("deit_small", img_size=230),
            "16 pixels do not fill img_size 230; sizes that work: 208, 224",
        ),
        (
            lambda: create_model("DVT_desk", img_size=36),
            r"12 \(2 of padding\), 8, .* img_size 36; sizes that work: 32, 56",
        ),
        (lambda: create_model("DVT_desk", img_size=(32, 40)), "do not fill img_size 40"),
        (lambda: VisionTransformer(feature_reuse=True), "need source_grid"),
        (lambda: Cascade([VisionTransformer(**DESK)]), "at least two stages, got 1"),
        (lambda: small()(torch.zeros(1, 3, 31, 32)), "takes images of 32x32 pixels, got 31x32"),
        (lambda: small().run_exit(1, torch.zeros(1, 3, 32, 32)), "pass `before`"),
        (lambda: small().stages[1](torch.zeros(1, 3, 32, 32)), "run it in a cascade"),
        (lambda: Block(16, 2, feature_reuse=True)(torch.zeros(1, 2, 16)), "built with feature_reuse=True"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with torch.device("cpu"), pytest.raises(ValueError, match=message):
        make()


def test_a_number_of_classes_is_no_negative_one():
    with pytest.raises(ValueError, match="num_classes must be at least 0"):
        create_model("DVT_desk", num_classes=-3)


def test_stages_that_do_not_fit_are_refused():
    stages = list(small().stages)
    other = small(embed_dim=32).stages
    with pytest.raises(ValueError, match=r"same width, depth and heads, and source_grid \(4, 4\)"):
        Cascade([stages[0], other[1], other[2]])
    with pytest.raises(ValueError, match="the first stage has nothing to reuse"):
        Cascade([stages[1], stages[1], stages[2]])


@pytest.mark.parametrize(("kind", "grad"), [("deit", True), ("t2t", False)])
def test_the_cascade_is_one_graph(kind, grad):
    """No part of a forward pass falls out of torch.compile."""
    if kind == "deit":
        model, size = small(), 32
    else:
        grids = [{"tokens_type": f"performer{end}"} for end in SUFFIXES]
        options = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0, "token_dim": 4, "num_classes": 5}
        model, size = make_cascade(T2T_ViT, grids, **options).eval(), 224
    images = image(1, size).float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for ours, theirs in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["DVT_T2t_vit_12", "DVT_Deit_small"])
def test_half_precision_on_a_gpu_stays_near_full_precision(name):
    """Fused attention takes the reused logits as its mask, gradients included, and nothing overflows."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).cuda().eval()
    images = image(4, 224).float().cuda()
    exact = model(images)
    with torch.autocast("cuda", dtype=torch.float16):
        half = model(images)
    for ours, theirs in zip(half, exact, strict=True):
        assert float((ours.float() - theirs).abs().max()) < 0.02 * float(theirs.abs().max())
    sum(logits.float().square().mean() for logits in half).backward()  # pyright: ignore[reportAttributeAccessIssue]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)


@pytest.mark.parametrize(("cascade", "size"), [(small_cascade, 24), (t2t_cascade, 224)])
def test_what_is_not_finite_stays_in_its_image(cascade, size):
    """Also where images leave: thresholds that split the batch."""
    net = cascade()
    images = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_images_apart(net, images, atol=1e-11)
    with torch.no_grad():
        first, _ = confidence_and_prediction(net(images)[0])
    classifier = DynamicClassifier(net, [float(first.median()), NOBODY, 0.0])
    check_images_apart(lambda batch: tuple(classifier(batch)), images, atol=1e-6)

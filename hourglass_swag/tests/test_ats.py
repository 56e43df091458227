"""Adaptive token sampling: its steps against their formulas, both modes, costs, precisions, and what is refused."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from common.hosts import PlanError, Tokens, lean
from common.ledger.tables import NeedsWeights, load_tables
from common.measure.flops import CONVENTIONS
from common.tests.reference import array, build, image
from hourglass_swag import ledger, models
from hourglass_swag.host import SwagBlock
from hourglass_swag.models import vision_transformer
from hourglass_swag.models.ats_vision_transformer import ATS, HIDDEN
from hourglass_swag.models.ops import ats
from hourglass_swag.models.vision_transformer import EncoderBlock, VisionTransformer
from hourglass_swag.tests.counting import make, published_ops, rotating, steps, timm, tokens_per_layer
from hourglass_swag.tools.costs import count, count_costs, parse_network
from hourglass_swag.tools.flop_count import flop_count
from hourglass_swag.tools.survivors import sharpen_

TINY = {"image_size": 24, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
BLOCK = {"num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(array(name, shape))


def tiny(seed: int = 1, **options: Any) -> Any:
    options = TINY | {"num_classes": 5, "ats_blocks": (1, 2), "num_tokens": 37, "drop_tokens": True} | options
    return build(partial(make, "ats_vision_transformer"), seed, **options)


def varied(batch: int = 4) -> torch.Tensor:
    """Images of which ATS keeps different numbers of tokens."""
    return image(batch, 24) * torch.tensor([3, 1, 0.2, 0.5], dtype=torch.float64)[:batch, None, None, None]


@torch.no_grad()
def run_block(
    x: torch.Tensor, seed: int = 2, mask: torch.Tensor | None = None, zeroed: tuple[str, ...] = (), **settings: Any
) -> Tokens:
    """A layer of SWAG that samples: tokens (B, N, C) in, those of the survivors out."""
    block = build(EncoderBlock, seed, **BLOCK)
    for name in zeroed:
        torch.nn.init.zeros_(block.get_submodule(name).weight)  # pyright: ignore[reportArgumentType]
        torch.nn.init.zeros_(block.get_submodule(name).bias)  # pyright: ignore[reportArgumentType]
    method, view = ATS((0,), 37, **(ATS.swag | settings)), SwagBlock(block, "block")
    bias = None if mask is None else (mask[..., 0] - 1) * HIDDEN
    heads, tokens, parts = method.attend(0, Tokens(x, 1, None, mask=mask, key_bias=bias), view.qkv(x, None))
    tokens = tokens.update(x=tokens.x + view.project(heads, parts))
    return method.after(0, tokens.update(x=tokens.x + view.mlp(tokens.x)))


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["points", "midpoints"])
def test_the_nearest_rank_is_the_first_of_the_nearest(scale):
    cdf = torch.tensor([[0.0, 0.0, 0.25, 0.25, 0.5, 1.0], [0.0, 0.125, 0.25, 0.5, 0.75, 1.0]])
    ys = draw("ys", 2, 50).float().sigmoid() if scale else torch.tensor([[0.125, 0.375, 0.75]] * 2)
    expected = (ys[:, :, None] - cdf[:, None]).abs().argmin(2)
    assert torch.equal(ats.nearest_ranks(cdf, ys), expected)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_token_follows_the_one_that_a_point_at_its_place_samples(padding):
    """What is nearest in c among the survivors alone, as sampling finds it."""
    scores = draw("s", 3, 12).sigmoid().round(decimals=1).sort(dim=1).values
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    places = torch.stack([torch.cat([torch.tensor([0, 1]), 2 + order[row, [1, 4, 5, 11, 8]]]) for row in range(3)])
    policy = None
    if padding:
        policy = torch.ones(3, 7, 1)
        policy[1, 7 - padding :] = 0
    found = ats.find_samplers(scores, order, places, policy, prefix=2)
    assert found[:, :2].tolist() == [[0, 1]] * 3
    cdf = scores.cumsum(1)
    for row in range(3):
        left = 7 - padding if row == 1 else 7
        assert found[row, places[row, :left]].tolist() == list(range(left))
        ranks = [order[row].tolist().index(int(place) - 2) for place in places[row, 2:left]]
        kept, of = torch.tensor(sorted(ranks)), {rank: 2 + number for number, rank in enumerate(ranks)}
        expected = kept[ats.nearest_ranks(cdf[row, kept][None], cdf[row][None])[0]]
        by_score = found[row, 2:][order[row]]
        unsampled = [rank for rank in range(12) if rank not in ranks]
        for rank in unsampled:  # two sampled ones of equal c are equally right
            assert cdf[row, ranks[int(by_score[rank]) - 2]] == cdf[row, expected[rank]], (rank, of)


def test_distinct_indices():
    indices = torch.tensor([[5, 2, 2], [1, 0, 1], [1, 2, 1], [0, 0, 0]])
    assert ats.get_unique_indices(indices, 6).tolist() == [[2, 5, 6], [0, 6, 6], [1, 2, 6], [0, 6, 6]]
    assert ats.get_unique_indices(torch.zeros(1, 3, dtype=torch.long), 1).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("offset", [0.0, -40.0])
def test_the_survivors_rows_are_those_of_the_whole_map(padding, offset):
    """Also where all logits are far below those of the padding, which are 0, so that the smoothing decides."""
    q, k, v = (draw(name, 2, 3, 9, 4) for name in "qkv")
    k = k + offset * q.mean((0, 1, 2))
    policy = torch.ones(2, 9, 1, dtype=torch.float64)
    policy[1, 9 - padding :] = 0
    k, v = k * policy[:, None], v * policy[:, None]
    attention = ats.softmax_with_policy(q @ k.transpose(2, 3) / 2, policy)
    expected = (attention @ v)[:, :, [0, 4, 2]]
    got = ats.attend_with_policy(q[:, :, [0, 4, 2]], k, v, policy if padding else None)
    torch.testing.assert_close(got, expected)


def test_fused_attention_differs_by_less_than_rounding():
    q, k, v = (draw(name, 2, 3, 90, 16) for name in "qkv")
    exact = ats.attend_with_policy(q, k, v, None)
    fused = ats.attend_with_policy(q.float(), k.float(), v.float(), None)
    assert fused.dtype == torch.float32
    assert (fused.double() - exact).abs().max() < 2e-6


def test_scores_weigh_the_class_row_by_the_length_of_values():
    values = draw("v", 2, 3, 6, 4)
    attention = draw("a", 2, 3, 6, 6).softmax(3)
    scores, order = ats.score_assignment_step(attention, values)
    length = values.transpose(1, 2).flatten(2).norm(dim=2)
    expected = attention[:, :, 0].sum(1)[:, 1:] * length[:, 1:]
    torch.testing.assert_close(scores.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(scores, expected.gather(1, order) / expected.sum(1, keepdim=True))
    assert (scores.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("padding", ["seen", "masked"])
def test_dropping_keeps_the_rows_that_masking_keeps(padding):
    """Out of one layer the shortened sequence is the beginning of the masked one, whose rest is zero."""
    x = draw("x", 3, 37, 16)
    masked, dropped = (run_block(x, drop=drop, padding=padding) for drop in (False, True))
    survivors = masked.mask.sum((1, 2)).long()  # pyright: ignore[reportOptionalMemberAccess]
    number = dropped.x.shape[1]
    assert masked.x.shape[1] == 37
    assert number == survivors.max() < 37
    torch.testing.assert_close(masked.x[:, :number], dropped.x)
    assert not masked.x[:, number:].any()
    for i, left in enumerate(survivors):
        assert not dropped.x[i, left:].any()
    if dropped.mask is not None:
        assert torch.equal(dropped.mask.sum((1, 2)).long(), survivors)


def test_a_layer_drops_the_lowest_token_at_least():
    tokens = tokens_per_layer(tiny(), image(1, 24))
    assert tokens[:2] == [37, 37]
    assert 37 > tokens[2] > tokens[3] > 1


@pytest.mark.parametrize("padding", ["seen", "masked"])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens_may_leave_the_class_token_alone(tokens, padding):
    """Of two patches the published code drops both, and only that; one that gets no patch has nothing to choose."""
    left = run_block(draw("x", 2, tokens, 16), 3, padding=padding)
    assert left.mask is None
    assert left.x.shape[1] == (2 if tokens == 2 or (tokens == 3 and padding == "masked") else 1)
    assert left.x.isfinite().all()


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 8])
def test_few_tokens_before_masked_padding_are_those_of_the_image_alone(number, drop):
    x, mask = draw("x", 2, 9, 16), torch.ones(2, 9, 1, dtype=torch.float64)
    mask[1, number:] = 0
    together = run_block(x, 3, mask, padding="masked", drop=drop)
    alone = run_block(x[1:, :number], 3, padding="masked")
    left = alone.x.shape[1]
    assert together.mask[1].sum() == left  # pyright: ignore[reportOptionalSubscript]
    torch.testing.assert_close(together.x[1, :left], alone.x[0], rtol=0, atol=1e-14)
    assert not together.x[1, left:].any()


def test_the_paper_s_residual_is_the_input():
    """Without the attention's and the MLP's output only the residual is left."""
    x, zeroed = draw("x", 1, 37, 16), ("self_attention.out_proj", "mlp.linear_2")
    normalized = build(EncoderBlock, 2, **BLOCK).get_submodule("ln_1")(x)
    assert torch.equal(run_block(x, zeroed=zeroed, residual="input").x[:, 0], x[:, 0])
    assert torch.equal(run_block(x, zeroed=zeroed, residual="normalized").x[:, 0], normalized[:, 0])


def test_without_sampling_layers_it_is_the_dense_model():
    dense = build(VisionTransformer, 1, **TINY, num_classes=5)
    model = tiny(ats_blocks=(), num_tokens=197)
    assert list(model.state_dict()) == list(dense.state_dict()) == list(tiny().state_dict())
    assert not model.depends_on_data
    assert published_ops(model) == published_ops(dense)
    with torch.no_grad():
        assert torch.equal(model(image(2, 24)), dense(image(2, 24)))


@pytest.mark.parametrize("drop", [False, True])
def test_costs_are_stated_for_the_tokens_that_survive(drop):
    model, images = tiny(drop_tokens=drop), image(1, 24)
    counted = count(model, images)
    assert round(1e9 * sum(flop_count(model, (images,)).values())) == CONVENTIONS["swag"].total(counted.published)
    tokens, width, saved = tokens_per_layer(model, images), model.hidden_dim, 0
    for layer in model.methods[0].layers:  # an N x N map there; the survivors' rows and the class row here
        saved += (2 * (tokens[layer] - tokens[layer + 1]) - 1) * tokens[layer] * width
    assert counted.published.macs - counted.executed.macs == saved
    assert (saved > 0) == drop
    if not drop:
        assert published_ops(model) == counted.published


def test_padding_does_not_reach_a_batch_of_equals():
    model = tiny()
    one = image(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(one.expand(3, -1, -1, -1)), model(one).expand(3, -1))


@pytest.mark.parametrize("drop", [False, True])
def test_gradients_reach_every_parameter(drop):
    model = tiny(drop_tokens=drop).train()
    model(image(2, 24)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, drop):
    model = tiny(drop_tokens=drop, ats_blocks=(1,))
    with torch.no_grad():
        expected = model(image(2, 24))
        got = model.to(dtype)(image(2, 24).to(dtype))
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() < 0.2 * expected.abs().max()
        with torch.autocast("cpu", dtype):
            assert model.float()(image(2, 24).float()).isfinite().all()


@pytest.mark.parametrize("drop", [False, True])
def test_compiled_and_eager_agree(drop):
    model = tiny(drop_tokens=drop)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not drop)  # the survivors' number breaks the graph
    with torch.no_grad():
        for seed in range(2):
            torch.testing.assert_close(compiled(image(1, 24, seed)), model(image(1, 24, seed)))


def test_degenerate_images():
    """One patch, and patches that are all alike."""
    model = tiny(image_size=4, num_tokens=2)
    with torch.no_grad():
        assert model(image(2, 4)).isfinite().all()
        assert tiny()(torch.zeros(2, 3, 24, 24, dtype=torch.float64)).isfinite().all()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"--ats_num_tokens\) must be at least 37, .* at 24 pixels, got 36"):
        tiny(num_tokens=36)
    with pytest.raises(ValueError, match=r"--ats_num_tokens\) must be at least 37.* got 0.5"):
        tiny(num_tokens=0.5)
    tiny(num_tokens=1)  # a share: all of them
    with pytest.raises(PlanError, match=r"layers \(--ats_blocks_indexes\) must be a layer, 0 to 2, got -1"):
        tiny(ats_blocks=(3, 0, -1))
    with pytest.raises(PlanError, match="residual must be 'input' or 'normalized', got 'none'"):
        tiny(residual="none")
    with pytest.raises(TypeError, match="ats_block"):
        tiny(ats_block=(1,))
    with pytest.raises(PlanError, match="ats needs a class token, which VisionTransformer has not"):
        tiny(classifier="gap")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (1, 4)}, "layers .* must be a layer, 0 to 3, got 4"),
        ({"layers": (1, 1)}, r"layers .* must differ, got \(1, 1\)"),
        ({"layers": 2}, "layers must be a tuple of whole numbers or None, got 2, did you mean .2,."),
        ({"tokens": 1}, "tokens must be a whole number of at least 2, or None for no limit, got 1"),
        ({"tokens": 36.0}, "tokens must be a whole number or None, got 36.0, did you mean 36"),
        ({"residual": "none"}, "residual must be 'input' or 'normalized', got 'none'"),
        ({"padding": "zero"}, "padding must be 'masked' or 'seen', got 'zero'"),
        ({"restore": "zero"}, "restore must be 'nearest' or 'frozen' or 'copy', got 'zero'"),
        ({"layer": 2}, "ats has no setting 'layer', did you mean 'layers'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        lean(timm(), "ats", **settings)


def test_names_and_defaults():
    with torch.device("meta"):
        model = models.create("ats_vit_l16_in1k", image_size=512, ats_blocks=[20, 23], num_tokens=1025)
        assert model.methods == (ATS((20, 23), drop=False, **ATS.swag),)
        assert [step.layer for step in model.plan.steps if step.hook == "attend"] == [20, 23]  # pyright: ignore
        assert published_ops(models.create("ats_vit_h14_in1k", image_size=518))["linear"] > 0
    assert lean(timm(), "ats").methods == (ATS((2, 3), None, "input", padding="masked"),)
    assert lean(timm(), "ats", preset="swag").methods == (ATS((2, 3), None, "normalized", padding="seen"),)


NETWORKS = {"plain": timm, "registers": partial(timm, reg_tokens=2), "rotating": rotating}


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"layers": (0, 1, 2, 3)}, {"layers": (0, 2), "restore": "frozen"}], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_with_masked_padding_no_image_sees_another(network, settings):
    """Neither those with more tokens, to whose number it is padded, nor the padding."""
    fast, images = lean(NETWORKS[network](), "ats", **settings), varied()
    features, alone = fast.features(images), [fast.features(images[i : i + 1]) for i in range(4)]
    numbers = [fast.tokens_per_layer(images[i : i + 1]) for i in range(4)]
    assert len({tuple(tokens) for tokens in numbers}) > 1, "some images are padded"
    assert fast.tokens_per_layer(images) == [max(tokens) for tokens in zip(*numbers, strict=True)]
    assert features.shape == (4, 16, 6, 6)
    assert features.isfinite().all()
    torch.testing.assert_close(features, torch.cat(alone), rtol=0, atol=1e-12)
    logits = torch.cat([fast(images[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(fast(images), logits, rtol=0, atol=1e-12)


def test_masked_padding_trains_compiles_and_is_finite_in_half_precision():
    fast, images = lean(timm(depth=2), "ats", layers=(0, 1), drop=False), varied()
    fast(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in fast.parameters())
    with torch.no_grad():
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), fast(images))
        half = lean(timm().bfloat16(), "ats")
        assert half.features(images.bfloat16()).isfinite().all()
        with torch.autocast("cpu", torch.float16):
            assert lean(timm().float(), "ats").features(images.float()).isfinite().all()


@torch.no_grad()
def test_padding_that_is_seen_couples_images():
    fast, images = lean(timm(), "ats", padding="seen", layers=(0, 2)), varied()
    assert fast.features(images).isfinite().all()
    assert not torch.allclose(fast.features(images)[1], fast.features(images[1:2])[0])


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_masking_all_tokens_is_dropping(network):
    net, images = NETWORKS[network](), varied()
    kept = lean(net, "ats", layers=(0, 1, 3), drop=False)
    assert not kept.depends_on_data
    assert set(kept.tokens_per_layer()) == {kept.plan.host.facts.tokens}
    dropped = lean(net, "ats", layers=(0, 1, 3))
    torch.testing.assert_close(kept.features(images), dropped.features(images), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["masked", "seen"])
def test_all_prefix_tokens_stay_in_front(padding):
    fast, images = lean(timm(reg_tokens=2), "ats", layers=(0, 2), padding=padding), varied()
    with steps(fast) as seen:
        fast.features(images)
    undone = [result[1].undo[-1] for step, _, result in seen if step.hook == "attend"]
    assert len(undone) == 2
    for undo in undone:
        assert undo.index[:, :3].tolist() == [[0, 1, 2]] * 4
        assert (undo.index[:, 3:] >= 3).all()
        assert undo.mask is None or undo.mask[:, :3].all()


@torch.no_grad()
@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}], ids=str)
def test_nothing_sampled_is_the_network(prefix):
    net = timm(**prefix)
    torch.testing.assert_close(lean(net, "ats", layers=())(varied()), net(varied()), rtol=0, atol=1e-12)


@torch.no_grad()
def test_survivors_have_their_own_features_and_the_others_those_of_the_nearest():
    net, images = timm(depth=1), varied()
    dense, fast = net.forward_features(images)[:, 1:], lean(net, "ats", layers=(0,))
    restored, tokens = fast.forward_features(images)[:, 1:], fast.run(images)
    survived = (restored - dense).abs().amax(2) < 1e-12
    assert torch.equal(survived.sum(1) + 1, tokens.mask.sum((1, 2)).long())
    for i in range(4):
        rows = {tuple(row) for row in restored[i, survived[i]].tolist()}
        assert {tuple(row) for row in restored[i].tolist()} == rows


def ats_table():
    """The published table."""
    return next(table for table in load_tables("hourglass_swag") if table.name == "ats")


def published_row():
    """Its first row."""
    return ats_table().rows[0]


def test_the_ledger_asks_for_the_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(NeedsWeights, match=r"depends on the checkpoint: vit_l16_in1k\.torch or vit_l_16_swag") as found:
        ledger.costs(published_row())
    assert found.value.command.startswith("python hourglass_swag/get_flops_fps.py -m ats_vit_l16_in1k -r 512 --ats_bl")


def test_the_ledger_and_the_tool_count_with_the_checkpoint(monkeypatch, tmp_path):
    """A small network under the published name: one pass over one image, always the same."""

    shape = {key: value for key, value in TINY.items() if key != "image_size"}
    small = replace(models.REGISTRY["ats_vit_l16_in1k"], num_classes=5)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(models.REGISTRY, "ats_vit_l16_in1k", small)
    monkeypatch.setitem(vision_transformer.SIZES, "l16", vision_transformer.Size(**shape))
    flags = "--ats_blocks_indexes 1 2 --ats_num_tokens 1 --ats_drop_tokens"
    row = replace(published_row(), arguments=f"-m ats_vit_l16_in1k -r 32 {flags}")
    checkpoint = tmp_path / "hub" / "checkpoints" / "vit_l16_in1k.torch"
    checkpoint.parent.mkdir(parents=True)
    model = build(VisionTransformer, 3, dtype=torch.float32, **(TINY | {"image_size": 32}), num_classes=5)
    torch.save(model.state_dict(), checkpoint)
    found = ledger.costs(row)
    assert found == ledger.costs(row)
    assert "vit_l16_in1k.torch, one image of noise at 32" in found["gmacs"].source
    args = parse_network(row.arguments)
    costs = count_costs(args, weights=str(checkpoint))
    assert costs.gflops == found["gmacs"].value
    assert costs.gmacs == found["macs_g"].value
    assert str(checkpoint) in str(costs.counted_for)
    random = count_costs(args)
    assert random == count_costs(args) != costs
    assert "random weights" in str(random.counted_for)


def test_random_weights_with_a_wanted_number_of_survivors():
    torch.manual_seed(0)
    options = TINY | {"image_size": 64, "num_layers": 5}
    model = make("ats_vision_transformer", **options, ats_blocks=(1, 2, 4), num_tokens=1, drop_tokens=True).eval()
    images = torch.rand(1, 3, 64, 64)
    assert sum(tokens_per_layer(model, images)[i] for i in (2, 3, 5)) / 3 > 200
    found = sharpen_(model, 120, images)
    assert found == pytest.approx(120, rel=0.02)
    assert sum(tokens_per_layer(model, images)[i] for i in (2, 3, 5)) / 3 == found
    with pytest.raises(ValueError, match="no scale of the queries lets 400 tokens survive"):
        sharpen_(model, 400, images)
    assert {row.id for row in ats_table().rows} == set(ledger.IMPLIED_TOKENS)

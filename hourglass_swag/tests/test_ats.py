"""Adaptive token sampling: its steps against their formulas, both modes, costs, precisions, and what is refused."""

from dataclasses import replace

import pytest
import torch

from common.ledger.tables import NeedsWeights, load_tables
from common.measure.flops import CONVENTIONS
from common.tests.reference import array, build, image
from hourglass_swag import ledger, models
from hourglass_swag.models import ats_vision_trainsformer
from hourglass_swag.models.ats_vision_transformer import ATSBlock, ATSVisionTransformer, ATSViTB16
from hourglass_swag.models.ops import ats
from hourglass_swag.models.vision_transformer import VisionTransformer
from hourglass_swag.tests.counting import published_ops, tokens_per_layer
from hourglass_swag.tools.costs import count, count_costs, parse_network
from hourglass_swag.tools.flop_count import flop_count
from hourglass_swag.tools.survivors import sharpen_

TINY = {"image_size": 24, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
BLOCK = {"num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(array(name, shape))


def tiny(seed: int = 1, **options) -> ATSVisionTransformer:
    options = TINY | {"num_classes": 5, "ats_blocks": (1, 2), "num_tokens": 37, "drop_tokens": True} | options
    return build(ATSVisionTransformer, seed, **options)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["points", "midpoints"])
def test_the_nearest_rank_is_the_first_of_the_nearest(scale):
    cdf = torch.tensor([[0.0, 0.0, 0.25, 0.25, 0.5, 1.0], [0.0, 0.125, 0.25, 0.5, 0.75, 1.0]])
    ys = draw("ys", 2, 50).float().sigmoid() if scale else torch.tensor([[0.125, 0.375, 0.75]] * 2)
    expected = (ys[:, :, None] - cdf[:, None]).abs().argmin(2)
    assert torch.equal(ats.nearest_ranks(cdf, ys), expected)


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


def test_dropping_keeps_the_rows_that_masking_keeps():
    """Out of one layer the shortened sequence is the beginning of the masked one, whose rest is zero."""
    x = draw("x", 37, 3, 16)
    options = {**BLOCK, "n_ref_tokens": 37}
    masked, policy = build(ATSBlock, 2, **options)(x)
    dropped, short = build(ATSBlock, 2, **options, drop_tokens=True)(x)
    survivors = policy[:, :, 0].sum(1).long()
    assert len(dropped) == survivors.max() < 37
    torch.testing.assert_close(masked[: len(dropped)], dropped)
    assert not masked[len(dropped) :].any()
    for i, number in enumerate(survivors):
        assert not dropped[number:, i].any()
    if short is not None:
        assert torch.equal(short.sum((1, 2)).long(), survivors)


def test_a_layer_drops_the_lowest_token_at_least():
    tokens = tokens_per_layer(tiny(), image(1, 24))
    assert tokens[:2] == [37, 37]
    assert 37 > tokens[2] > tokens[3] > 1


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens_may_leave_the_class_token_alone(tokens):
    """Of two patches the published code drops both; a layer that gets no patch has nothing to choose."""
    block = build(ATSBlock, 3, **BLOCK, n_ref_tokens=37, drop_tokens=True)
    x, policy = block(draw("x", tokens, 2, 16))
    assert policy is None
    assert len(x) == (2 if tokens == 2 else 1)
    assert x.isfinite().all()


def test_the_paper_s_residual_is_the_input():
    x = draw("x", 37, 1, 16)
    blocks = {
        residual: build(ATSBlock, 2, **BLOCK, n_ref_tokens=37, drop_tokens=True, residual=residual)
        for residual in ("normalized", "input")
    }
    for block in blocks.values():  # without the attention's and the MLP's output only the residual is left
        for name in ("self_attention.out_proj", "mlp.linear_2"):
            torch.nn.init.zeros_(block.get_submodule(name).weight)  # pyright: ignore[reportArgumentType]
            torch.nn.init.zeros_(block.get_submodule(name).bias)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        normalized = blocks["input"].get_submodule("ln_1")(x)
        assert torch.equal(blocks["input"](x)[0][0], x[0])
        assert torch.equal(blocks["normalized"](x)[0][0], normalized[0])


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
    for layer in model.ats_blocks:  # an N x N map there; the survivors' rows and the class row here
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
    with pytest.raises(ValueError, match=r"--ats_blocks_indexes\) must hold layers 0 to 2, got \[-1, 3\]"):
        tiny(ats_blocks=(3, 0, -1))
    with pytest.raises(ValueError, match="residual must be 'normalized' or 'input', got 'none'"):
        tiny(residual="none")
    with pytest.raises(TypeError, match="ats_block"):
        ATSViTB16(ats_block=(1,))


def test_names_and_defaults():
    assert ats_vision_trainsformer.ATSVisionTransformer is ATSVisionTransformer
    with torch.device("meta"):
        model = models.create("ats_vit_l16_in1k", image_size=512, ats_blocks=[20, 23], num_tokens=1025)
        assert isinstance(model, ATSVisionTransformer)
        assert [i for i, layer in enumerate(model.encoder.layers) if isinstance(layer, ATSBlock)] == [20, 23]
        assert published_ops(models.create("ats_vit_h14_in1k", image_size=518))["linear"] > 0


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

    def small(image_size, ats_blocks, num_tokens, **options):
        return ATSVisionTransformer(**(TINY | {"image_size": 32}), ats_blocks=(1, 2), num_tokens=1, **options)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(models.REGISTRY, "ats_vit_l16_in1k", models.Entry(small, "vit_l16_in1k.torch", 5))  # pyright: ignore[reportArgumentType]
    row = replace(published_row(), arguments="-m ats_vit_l16_in1k -r 32 --ats_drop_tokens")
    checkpoint = tmp_path / "hub" / "checkpoints" / "vit_l16_in1k.torch"
    checkpoint.parent.mkdir(parents=True)
    model = build(ATSVisionTransformer, 3, dtype=torch.float32, **(TINY | {"image_size": 32}), num_classes=5)
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
    model = ATSVisionTransformer(**options, ats_blocks=(1, 2, 4), num_tokens=1, drop_tokens=True).eval()
    images = torch.rand(1, 3, 64, 64)
    assert sum(tokens_per_layer(model, images)[i] for i in (2, 3, 5)) / 3 > 200
    found = sharpen_(model, 120, images)
    assert found == pytest.approx(120, rel=0.02)
    assert sum(tokens_per_layer(model, images)[i] for i in (2, 3, 5)) / 3 == found
    with pytest.raises(ValueError, match="no scale of the queries lets 400 tokens survive"):
        sharpen_(model, 400, images)
    assert {row.id for row in ats_table().rows} == set(ledger.IMPLIED_TOKENS)

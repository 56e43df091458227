"""SWAG ViT and Hourglass ViT: published shapes and costs, agreement with torch's attention, and what is refused."""

import json
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from common.measure.flops import CONVENTIONS, count_operations, count_parameters
from common.tests.reference import array, build, fill_, image
from hourglass_swag import models
from hourglass_swag.models.vision_transformer import EncoderBlock, SelfAttention, VisionTransformer, make_vit
from hourglass_swag.tests.counting import make, tokens_per_layer

VECTORS = Path(__file__).parent / "vectors"
INDEX = json.loads((VECTORS / "manifest_index.json").read_text())
PUBLISHED = json.loads((VECTORS / "flops_published.json").read_text())
HOURGLASS = partial(make, "hourglass_vit")
TINY = {"image_size": 24, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        return models.create(name, **options).eval()


def implemented(method: str) -> list[str]:
    return [name for name in INDEX if method in name]


@pytest.mark.parametrize("name", implemented("vit"))
def test_state_dict_is_that_of_the_published_checkpoint(name):
    row = INDEX[name]
    manifest = json.loads((VECTORS / row["manifest"].split()[0]).read_text())
    expected = {key: shape for key, shape in manifest.items() if key != "params"}
    if " without head" in row["manifest"]:
        expected = {key: shape for key, shape in expected.items() if not key.startswith("head.")}
        first = int(row["manifest"].rsplit(" ", 1)[1])
        expected["encoder.pos_embedding"] = [first, *expected["encoder.pos_embedding"][1:]]
    options = {"num_cluster": 529} if "hourglass" in name else {}
    model = on_meta(name, image_size=row["image_size"], **options)
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(expected.items())
    assert count_parameters(model) == row["params"]
    assert len(expected) == row["keys"]


def test_every_published_name_is_registered():
    published = {name for name in models.names() if not name.endswith("_desk")}
    assert set(INDEX) | {f"{method}_vit_{size}_in1k" for method in ("act",) for size in ("l16", "h14")} == published
    assert all("in1k" in name or name.endswith("_desk") for name in models.names(classifiers=True))


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['model']}{row['flags'].replace(' ', '')}")
def test_published_gflops_and_executed_macs(row):
    options = {key: int(value) for key, value in (pair.split("=") for pair in row["kwargs"].split(",") if pair)}
    start = time.perf_counter()
    model = on_meta(row["model"], image_size=row["resolution"], **options)
    counted = count_operations(model, torch.empty(1, 3, row["resolution"], row["resolution"], device="meta"))
    gflops = CONVENTIONS["swag"].total(counted.published) / 1e9
    assert round(gflops, 1) == row["published"]
    assert gflops == pytest.approx(row["tool"], rel=5e-5)
    assert counted.executed.macs == counted.published.macs
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 5},
        {"classifier": "gap"},
        {
            "conv_stem_layers": [
                {"kernel": 3, "stride": 2, "out_channels": 6},
                {"kernel": 5, "stride": 2, "out_channels": 8},
            ]
        },
    ],
    ids=["token", "gap", "stem"],
)
@pytest.mark.parametrize("location", [None, 0, 2])
def test_executed_macs_by_hand(options, location):
    width, mlp, classes = TINY["hidden_dim"], TINY["mlp_dim"], options.get("num_classes", 0)
    first = (0 if "gap" in options.values() else 1) + 36
    stem = 36 * 3 * 16 * width
    if "conv_stem_layers" in options:
        stem = 144 * 6 * 3 * 9 + 36 * 8 * 6 * 25 + 36 * 8 * width
    for after in (False, True):
        if location is None:
            model = VisionTransformer(**TINY, **options)
        else:
            model = HOURGLASS(
                **TINY, **options, clustering_location=location, num_cluster=(2, 3), cluster_after_output=after
            )
        tokens = [first] * 3
        clustering = 0
        if location is not None:
            later = slice(location + after, None)
            tokens[later] = [first - 36 + 6] * len(tokens[later])
            clustering = 5 * 2 * 6 * 36 * width
        blocks = sum(N * (4 * width**2 + 2 * width * mlp) + 2 * N * N * width for N in tokens)
        by_hand = stem + blocks + clustering + width * classes
        assert count_operations(model, torch.rand(1, 3, 24, 24)).executed.macs == by_hand


def test_attention_is_that_of_torch():
    ours = SelfAttention(16, 4).double()
    theirs = nn.MultiheadAttention(16, 4).double()
    theirs.load_state_dict(fill_(ours, 3).state_dict())
    x = torch.from_numpy(array("x", (7, 2, 16)))
    expected, _ = theirs(x, x, x)
    torch.testing.assert_close(ours(x.transpose(0, 1)).transpose(0, 1), expected)


def test_attention_starts_like_torch():
    torch.manual_seed(0)
    ours = SelfAttention(64, 4)
    theirs = nn.MultiheadAttention(64, 4)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1, abs=1e-12)


def test_a_fresh_classifier_outputs_zeros_and_starts_as_published():
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, num_classes=7)
    assert torch.equal(model(torch.rand(2, 3, 24, 24)), torch.zeros(2, 7))
    state = model.state_dict()
    assert state["encoder.pos_embedding"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not state["class_token"].any()
    assert not state["conv_proj.bias"].any()
    assert state["conv_proj.weight"].std().item() == pytest.approx((1 / 48) ** 0.5, rel=0.1)
    assert 0 < state["encoder.layers.layer_0.mlp.linear_1.bias"].abs().max() < 1e-4


def test_an_image_alone_is_the_image_in_a_batch():
    model = build(HOURGLASS, 1, **TINY, num_classes=5, clustering_location=1, num_cluster=4)
    images = image(3, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(images[1:2]), model(images)[1:2])


def test_sequence_first_and_batch_first_storage_agree():
    block = build(EncoderBlock, 2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout_rate=0.0, attention_dropout_rate=0.0)
    x = torch.from_numpy(array("x", (9, 3, 16)))
    with torch.no_grad():
        out = block(x)
        torch.testing.assert_close(block(x.transpose(0, 1).contiguous().transpose(0, 1)), out)
    assert out.shape == x.shape


def test_before_a_layer_is_after_the_one_before():
    common = {**TINY, "num_classes": 5, "num_cluster": 9}
    before = build(HOURGLASS, 4, **common, clustering_location=2, cluster_after_output=False)
    after = build(HOURGLASS, 4, **common, clustering_location=1, cluster_after_output=True)
    with torch.no_grad():
        torch.testing.assert_close(before(image(2, 24)), after(image(2, 24)))


def test_off_is_the_dense_model():
    options = {**TINY, "num_classes": 5}
    dense = build(VisionTransformer, 4, **options)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        off = build(HOURGLASS, 4, **options, clustering_location=-1, num_cluster=9)
        torch.testing.assert_close(off(image(2, 24)), dense(image(2, 24)))


def test_named_sizes_refuse_a_location_beyond_the_layers():
    with torch.device("meta"):
        for location in (-2, 8):
            with pytest.raises(ValueError, match=rf"-l, --clustering_location. must be 0 to 7, or -1 .*got {location}"):
                models.create("hourglass_vit_desk", clustering_location=location, num_cluster=16)
        models.create("hourglass_vit_desk", clustering_location=7, num_cluster=16)


def test_gap_clusters_all_tokens():
    model = build(
        HOURGLASS, 4, **TINY, classifier="gap", clustering_location=1, num_cluster=9, cluster_after_output=False
    )
    assert tokens_per_layer(model) == [36, 9, 9, 9]
    with torch.no_grad():
        assert model(image(2, 24)).shape == (2, 16)


def test_gradients_reach_the_first_layers_through_the_clusters():
    model = build(HOURGLASS, 4, **TINY, num_classes=5, clustering_location=1, num_cluster=9).train()
    model(image(2, 24)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_wrong_arguments_are_named():
    with pytest.raises(
        ValueError,
        match=r"num_clusters .-n, --num_cluster. must be a square, got 1000; nearest are 961, 1024",
    ):
        on_meta("hourglass_vit_l16_in1k", image_size=512, num_cluster=1000)
    with pytest.raises(TypeError, match="fuse_token"):
        on_meta("vit_l16_in1k", fuse_token=True)
    with pytest.raises(TypeError, match="clustering_locaton"):
        on_meta("hourglass_vit_l16_in1k", clustering_locaton=3)
    with pytest.raises(TypeError, match="fixes cluster_after_output=False"):
        on_meta("hourglass_vit_l16_in1k", cluster_after_output=True)
    with pytest.raises(ValueError, match="multiple of patch_size = 16, got 500; nearest are 496, 512"):
        on_meta("vit_l16_in1k", image_size=500)
    with pytest.raises(ValueError, match=r"multiple of patch_size = 16, got 0; nearest are 16$"):
        on_meta("vit_l16_in1k", image_size=0)
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, 24, 24\), got \(1, 3, 32, 32\)"):
        VisionTransformer(**TINY)(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="classifier"):
        VisionTransformer(**TINY, classifier="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="num_classes"):
        VisionTransformer(**TINY, num_classes=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"multiply to patch_size = 4, got \[2, 4\]"):
        VisionTransformer(**TINY, conv_stem_layers=[(3, 2, 8), (3, 4, 8)])
    with pytest.raises(ValueError, match="odd, got 4"):
        VisionTransformer(**TINY, conv_stem_layers=[{"kernel": 4, "stride": 4, "out_channels": 8}])
    with pytest.raises(ValueError, match="unknown model 'vit_l32'"):
        models.create("vit_l32")


def test_callers_image_size_wins():
    assert on_meta("vit_b16_in1k").image_size == 384
    assert on_meta("vit_b16_in1k", image_size=224).image_size == 224
    assert models.vit_b16_in1k is models.FACTORIES["vit_b16_in1k"]
    with torch.device("meta"):
        assert make_vit("b16").image_size == 224
    with pytest.raises(AttributeError, match="vit_x"):
        models.vit_x  # noqa: B018


def test_published_costs_of_a_block():
    with torch.device("meta"):
        block = EncoderBlock(16, 1024, 4096, 0.0, 0.0)
    x = torch.empty(1025, 3, 1024, device="meta")
    assert block.flops(x) == 3 * 15086966800
    assert block.activations(x, x) == 27306000


def test_the_dense_and_hourglass_models_compile_as_one_graph():
    for model in (
        build(VisionTransformer, 1, **TINY, num_classes=5),
        build(HOURGLASS, 1, **TINY, num_classes=5, clustering_location=1, num_cluster=9),
    ):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(image(2, 24)), model(image(2, 24)))

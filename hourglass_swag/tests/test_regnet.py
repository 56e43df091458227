"""RegNet: published state dicts and costs, torchvision's files, every kind of block and stem."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

from common.measure.flops import CONVENTIONS, count_operations, count_parameters
from common.tests.reference import build, fill_, image
from hourglass_swag import models
from hourglass_swag.models import weights
from hourglass_swag.models.regnet import AnyNet, AnyNetParams, BlockType, RegNet, RegNetParams, StemType
from hourglass_swag.tools.costs import count_costs, parse_network
from hourglass_swag.tools.flop_count import flop_count

VECTORS = Path(__file__).parent / "vectors"
INDEX = json.loads((VECTORS / "manifest_index.json").read_text())
SHAPE = {"depth": 5, "w_0": 16, "w_a": 14.0, "w_m": 2.2, "group_width": 8}


@pytest.mark.parametrize("name", [name for name in INDEX if name.startswith("regnety")])
def test_state_dict_is_that_of_the_published_checkpoint(name):
    row = INDEX[name]
    manifest = json.loads((VECTORS / row["manifest"].split()[0]).read_text())
    expected = {key: shape for key, shape in manifest.items() if key != "params"}
    if " without head" in row["manifest"]:
        expected = {key: shape for key, shape in expected.items() if not key.startswith("head.")}
    with torch.device("meta"):
        model = models.create(name)
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(expected.items())
    assert count_parameters(model) == row["params"]
    assert len(expected) == row["keys"]


@pytest.mark.parametrize("size", [16, 32, 128])
def test_costs_are_those_that_torchvision_documents(size):
    """Its "GFLOPS" are multiply-accumulates."""
    documented = getattr(torchvision.models, f"RegNet_Y_{size}GF_Weights").IMAGENET1K_SWAG_E2E_V1.meta["_ops"]
    costs = count_costs(parse_network(f"-m regnety_{size}gf_in1k -r 384"))
    assert costs.gmacs == pytest.approx(documented, abs=5e-4 if size < 100 else 5e-3)
    with torch.device("meta"):
        model = models.create(f"regnety_{size}gf_in1k").eval()
        images = torch.empty(1, 3, 384, 384)
    assert costs.gflops == pytest.approx(sum(flop_count(model, (images,)).values()))


@pytest.mark.parametrize("block", list(BlockType))
@pytest.mark.parametrize("stem", list(StemType))
@pytest.mark.parametrize("activation", ["RELU", "SILU"])
def test_every_kind_of_block_and_stem(block, stem, activation):
    shape = RegNetParams(**SHAPE, block_type=block, stem_type=stem, activation=activation, num_classes=3)
    model = build(RegNet, 1, params=shape, image_size=45)
    x = image(1, 45)
    with torch.no_grad():
        assert model(x).shape == (1, 3)
    counted = count_operations(model, x)
    assert round(1e9 * sum(flop_count(model, (x,)).values())) == CONVENTIONS["swag"].total(counted.published)
    model.train()(image(2, 45)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def torchvision_twin() -> torch.nn.Module:
    """torchvision's network of the same shape."""
    from torchvision.models.regnet import BlockParams
    from torchvision.models.regnet import RegNet as TheirRegNet

    params = BlockParams.from_init_params(**SHAPE, se_ratio=0.25)
    return fill_(TheirRegNet(params, num_classes=4).double().eval(), 3)


def test_torchvision_s_network_gives_the_same_logits(tmp_path):
    theirs = torchvision_twin()
    ours = RegNet(RegNetParams(**SHAPE, num_classes=4)).double().eval()
    report = ours.load_state_dict(theirs.state_dict())
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(ours(image(2, 64)), theirs(image(2, 64)))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    with torch.device("meta"):
        loaded = RegNet(RegNetParams(**SHAPE, num_classes=4)).eval()
    weights.load_weights(loaded, tmp_path / "theirs.pth")
    with torch.no_grad():
        torch.testing.assert_close(loaded(image(1, 64).float()).double(), ours(image(1, 64)), rtol=1e-4, atol=1e-4)


def test_names_of_torchvision_s_files_are_current():
    for size in (16, 32, 128):
        url = getattr(torchvision.models, f"RegNet_Y_{size}GF_Weights").IMAGENET1K_SWAG_E2E_V1.url
        assert weights.TORCHVISION_FOLDER + weights.TORCHVISION_FILES[f"regnety_{size}gf_in1k.torch"] == url


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"encoder.pos_embedding": torch.zeros(1)}, tmp_path / "vit.torch")
    with pytest.raises(models.CheckpointError, match=r"(?s)vit.torch does not fit RegNet.*stem\.stem\.0\.weight"):
        weights.load_weights(RegNet(RegNetParams(**SHAPE)), tmp_path / "vit.torch")


def test_images_of_any_size_and_maps_without_a_head():
    model = build(RegNet, 1, params=RegNetParams(**SHAPE), image_size=7)
    with torch.no_grad():
        assert model(image(2, 64)).shape[2:] == model(image(2, 49)).shape[2:] == (4, 4)
        half = model.bfloat16()(image(1, 64).bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_stages_listed_one_by_one_are_the_same_network():
    stages = RegNetParams(**SHAPE).get_expanded_params()
    listed = AnyNetParams(
        depths=[stage.depth for stage in stages],
        widths=[stage.width for stage in stages],
        group_widths=[stage.group_width for stage in stages],
        bottleneck_multipliers=[stage.bottleneck_multiplier for stage in stages],
        strides=[stage.stride for stage in stages],
    )
    assert listed.get_expanded_params() == stages
    one, other = build(AnyNet, 1, params=listed), build(RegNet, 1, params=RegNetParams(**SHAPE))
    with torch.no_grad():
        assert torch.equal(one(image(1, 32)), other(image(1, 32)))


def test_published_stages():
    def stages(**shape) -> list[tuple[int, int, int]]:
        return [(stage.width, stage.depth, stage.group_width) for stage in RegNetParams(**shape).get_expanded_params()]

    assert stages(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264) == [
        (528, 2, 264),
        (1056, 7, 264),
        (2904, 17, 264),
        (7392, 1, 264),
    ]


@pytest.mark.parametrize("wrong", [{"w_a": -1}, {"w_0": 20}, {"w_0": 0}, {"w_m": 1}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(ValueError, match="RegNetParams needs w_a >= 0"):
        RegNetParams(**(SHAPE | wrong))


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="RES_BLOCK"):
        RegNet(RegNetParams(**SHAPE, block_type="RES_BLOCK"))
    with pytest.raises(TypeError, match="use_sse"):
        models.create("regnety_16gf", use_sse=True)

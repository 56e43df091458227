"""Sliceable MobileNet v2 and UniFormer: full width, slices as networks of their own, batch statistics, costs."""

import math
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from common.measure.flops import count_operations, gmacs
from common.run.errors import UsageError
from scala import export, main_scala
from scala.layers import sliced_state_dict
from scala.models_mobilenet import MobileNetV2_scala
from scala.models_uniformer import MODELS, UniFormer_scala
from scala.narrowing import calibrate_
from scala.slicing import sliced_size

SMALL = {"img_size": 64, "depths": (1, 1, 2, 1), "widths": (16, 32, 32, 64), "heads": (2, 4), "num_classes": 5}


def scramble_(model: nn.Module) -> nn.Module:
    """Weights and statistics without the symmetries of a fresh network, in double precision."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(1 + 0.2 * noise.abs() if "var" in name else 0.1 * noise + (value.ndim == 1) * 0.5)
    return model.double().eval()


def narrow_timm(model: nn.Module, source: MobileNetV2_scala, ratio: float) -> nn.Module:
    """timm's MobileNet v2 with every layer replaced by a plain one that holds the slice's weights."""
    own = sliced_state_dict(source, ratio) | source.statistics(ratio)
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0]) if name else model
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Conv2d):
            weight = own[f"{name}.weight"]
            groups = len(weight) if module.groups > 1 else 1
            plain = nn.Conv2d(
                weight.shape[1] * groups, len(weight), module.kernel_size, module.stride, module.padding,  # pyright: ignore
                groups=groups, bias=False,
            )  # fmt: skip
            plain.weight.data = weight
            setattr(parent, leaf, plain)
        elif isinstance(module, nn.BatchNorm2d):
            leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            values = {leaf: own[f"{name}.{leaf}"] for leaf in leaves}
            plain = nn.BatchNorm2d(len(values["weight"]), eps=module.eps)
            plain.load_state_dict(values)
            activation = getattr(module, "act", nn.Identity())
            setattr(parent, leaf, nn.Sequential(plain, activation))
    model.classifier = nn.Linear(own["classifier.weight"].shape[1], source.num_classes)
    model.classifier.load_state_dict({"weight": own["classifier.weight"], "bias": own["classifier.bias"]})
    return model.double().eval()


def test_mobilenet_is_timms_at_full_width_and_narrow_timm_at_others() -> None:
    model = MobileNetV2_scala(img_size=32, num_classes=5, granularity=0.125)
    scramble_(model)
    dense = timm.create_model("mobilenetv2_100", num_classes=5).double().eval()
    own = model.state_dict()
    assert list(dense.state_dict()) == [name for name in own if "narrow" not in name]
    dense.load_state_dict({name: own[name] for name in dense.state_dict()})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x, 1.0), dense(x), rtol=1e-12, atol=1e-12)
        for ratio in (0.25, 0.375):
            alone = narrow_timm(timm.create_model("mobilenetv2_100", num_classes=5), model, ratio)
            torch.testing.assert_close(model(x, ratio), alone(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_slice_of_uniformer_is_a_uniformer_of_that_width(ratio: float, overlap: bool) -> None:
    model = scramble_(UniFormer_scala(**SMALL, granularity=0.25, overlap=overlap))
    widths = [sliced_size(width, ratio) for width in SMALL["widths"]]
    alone = UniFormer_scala(**SMALL | {"widths": widths}, smallest_ratio=1.0, granularity=1.0, overlap=overlap)
    state = {name: value.clone() for name, value in sliced_state_dict(model, ratio).items()}
    for name in state:
        if ".qkv." in name:  # the slice keeps the scale of the full head
            state[name][: len(state[name]) // 3] *= math.sqrt(ratio)
    alone.load_state_dict(state | model.statistics(ratio))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x, ratio), alone.double().eval()(x, 1.0), rtol=1e-9, atol=1e-10)


BUILDERS = [partial(MobileNetV2_scala, img_size=32, num_classes=5), partial(UniFormer_scala, **SMALL)]


@pytest.mark.parametrize("build", BUILDERS)
def test_smallest_and_half_share_no_weight_but_the_heads_bias(build: partial) -> None:
    model = build(granularity=0.25)
    x = torch.randn(4, 3, model.img_size, model.img_size)
    touched = {}
    for ratio in (0.25, 0.5):
        model.zero_grad()
        model(x, ratio).square().sum().backward()
        touched[ratio] = {name: value.grad != 0 for name, value in model.named_parameters() if value.grad is not None}
    shared = {
        name for name, mask in touched[0.25].items() if bool((mask & touched[0.5].get(name, torch.tensor(False))).any())
    }
    assert shared == {"classifier.bias" if hasattr(model, "classifier") else "head.bias"}


def test_every_trained_width_moves_its_own_statistics_only() -> None:
    model = UniFormer_scala(**SMALL, granularity=0.25).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(3 + torch.randn(4, 3, 64, 64), 0.5)
    for name, value in model.named_buffers():
        changed = value != before[name]
        if "narrow" in name:
            width = sliced_size(value.shape[1], 0.5)
            assert changed[1, :width].any()
            assert not changed[[0, 2]].any()
            assert not changed[1, width:].any()
        else:
            assert not changed.any(), name


def test_calibration_gives_an_untrained_width_the_statistics_of_its_batches() -> None:
    model = MobileNetV2_scala(img_size=32, num_classes=5, granularity=0.25).double()
    batches = [2 + torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    model.eval()
    with pytest.raises(ValueError, match=r"no statistics for width ratio 0\.375: .*0\.25, 0\.5, 0\.75, 1"):
        model(batches[0], 0.375)
    assert calibrate_(model, 0.375, batches) == 2
    kernel = sliced_state_dict(model, 0.375)["conv_stem.weight"]
    stem = torch.cat([F.conv2d(batch, kernel, stride=2, padding=1) for batch in batches])
    mean, variance = (model.statistics(0.375)[f"bn1.running_{name}"] for name in ("mean", "var"))
    torch.testing.assert_close(mean, stem.mean((0, 2, 3)))
    halves = torch.stack([part.var((0, 2, 3)) for part in stem.split(8)])
    torch.testing.assert_close(variance, halves.mean(0))
    assert torch.isfinite(model(batches[0], 0.375)).all()
    before = {name: value.clone() for name, value in model.statistics(0.375).items()}
    model(batches[0], 0.375)
    assert all(torch.equal(value, before[name]) for name, value in model.statistics(0.375).items())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_(model, 0.375, [])
    calibrate_(model, 0.5, batches)  # a trained width: the statistics are the model's own
    assert (model.bn1.narrow_mean != 0).any(dim=1).tolist() == [False, True, False]


def test_counted_costs_are_those_of_networks_of_that_width() -> None:
    """Also at a width without batch statistics, of which only the shapes count."""
    with torch.device("meta"):
        model, dense = MobileNetV2_scala(), timm.create_model("mobilenetv2_100")
        assert model.count_ops(1.0).macs == count_operations(dense, torch.empty(1, 3, 224, 224)).executed.macs
        for ratio in (0.3125, 13 / 32):
            alone = MobileNetV2_scala(multiplier=ratio)
            assert model.count_ops(ratio) == alone.count_ops(1.0)
        for overlap in (False, True):
            model = UniFormer_scala(**SMALL, granularity=0.25, overlap=overlap)
            widths = [sliced_size(width, 0.5) for width in SMALL["widths"]]
            alone = UniFormer_scala(**SMALL | {"widths": widths}, granularity=0.25, overlap=overlap)
            assert model.count_ops(0.5) == alone.count_ops(1.0)


def test_costs_and_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        mobile, *uniformers = (timm.create_model(name) for name in ("mobilenet_v2_scala", *MODELS))
    assert gmacs(mobile.count_ops(1.0)) == pytest.approx(0.300, abs=1e-3)  # arXiv:1801.04381, Table 4
    assert mobile.count_parameters(1.0) == 3_504_872
    small, plus = uniformers
    assert small.count_parameters(1.0) / 1e6 == pytest.approx(22, abs=0.5)  # arXiv:2201.04676, Table 1
    assert gmacs(small.count_ops(1.0)) == pytest.approx(3.6, abs=0.05)
    assert plus.count_parameters(1.0) / 1e6 == pytest.approx(24, abs=0.5)
    assert gmacs(plus.count_ops(1.0), "fvcore") == pytest.approx(4.22, abs=0.01)  # Scala's figure of UniFormer-S
    assert gmacs(plus.count_ops(0.25), "fvcore") == pytest.approx(0.33, abs=0.015)


def test_bad_widths_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 5/320"):
        timm.create_model("uniformer_small_scala").check_ratio(0.2)
    with pytest.raises(ValueError, match="from 1/16"):
        MobileNetV2_scala().check_ratio(0.01)
    with pytest.raises(ValueError, match="multiples of 32"):
        UniFormer_scala(**SMALL)(torch.zeros(1, 3, 40, 64), 1.0)
    for name in ("mobilenet_v2_scala", *MODELS):
        with pytest.raises(ValueError, match="no published weights"):
            timm.create_model(name, pretrained=True)


def test_batch_statistics_in_training_are_of_the_batch() -> None:
    model = MobileNetV2_scala(img_size=32, granularity=0.25).train()
    x = 5 + 2 * torch.randn(16, 3, 32, 32)
    stem = F.conv2d(x, sliced_state_dict(model, 0.5)["conv_stem.weight"], stride=2, padding=1)
    model(x, 0.5)
    torch.testing.assert_close(model.statistics(0.5)["bn1.running_mean"], 0.1 * stem.mean((0, 2, 3)))
    assert model.bn1.num_batches_tracked == 0  # counts those of the largest width
    model(x, 1.0)
    assert model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["mobilenet_v2_scala"])
def test_the_program_trains_and_evaluates_a_network_with_batch_statistics(
    name: str, imagenet: Path, tmp_path: Path
) -> None:
    words = [
        "--data-path", str(imagenet), "--model", name, "--granularity", "0.25", "--input-size", "32", "--device", "cpu",
        "--workers", "0", "--batch-size", "8", "--num-classes", "2", "--drop-path", "0",
    ]  # fmt: skip
    recipe = ["--epochs", "2", "--full_warm_epoch", "1", "--warmup-epochs", "0", "--no-repeated-aug", "--lr", "1e-3"]
    trained = main_scala.main([*words, *recipe, "--output_dir", str(tmp_path)])
    assert [row["ratio"] for row in trained["widths"]] == [0.25, 0.5, 0.75, 1.0]
    state = torch.load(tmp_path / "checkpoint.pth")["model"]
    assert all((row != 0).any() for row in state["bn1.narrow_mean"])  # every width has moved its statistics
    evaluated = main_scala.main([*words, "--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--eval_ratio", "all"])
    assert evaluated["widths"] == trained["widths"]
    between = [*words, "--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--eval_ratio", "0.375"]
    with pytest.raises(UsageError, match=r"has none for 0\.375: give --calibrate-batches"):
        main_scala.main([*between, "--allow-untrained"])
    assert main_scala.main([*between, "--allow-untrained", "--calibrate-batches", "2"])["images"] == 6
    words = ["--checkpoint", str(tmp_path / "checkpoint.pth"), "--ratio", "0.25", "--output", str(tmp_path / "quarter")]
    assert export.main(words)["quarter.safetensors"] < 1e-5

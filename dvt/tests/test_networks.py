"""A cascade of networks that share nothing: as its networks by hand, with thresholds for a budget, or refused."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit
from common.data.loaders import build_dataset
from common.measure.flops import count_operations, gmacs
from common.run.errors import UsageError
from common.run.export import export_program
from common.tests.reference import fill_
from dvt import inference
from dvt.costs import exit_gmacs
from dvt.evaluation import ImageSource
from dvt.exits import first_exit, thresholds_for_budget
from dvt.networks import EarlyExit, open_networks


def plain(width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A timm network of 4x4 tokens, whose logits differ much from image to image."""
    settings = {"img_size": 32, "patch_size": 8, "num_classes": 6, "embed_dim": width, "depth": 2, **options}
    net = fill_(timm.create_model("test_vit", **settings).to(dtype), seed)
    nn.init.normal_(net.head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return net.eval()


def draw_images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count), dtype=dtype)


@torch.no_grad()
def by_hand(networks: list[Any], threshold: list[float], images: Tensor) -> tuple[Tensor, list[int]]:
    """Logits and exits, one image and one network at a time."""
    logits, exits = [], []
    for image in images.split(1):
        for k, net in enumerate(networks):
            answer = net(image)
            if k == len(networks) - 1 or answer.float().softmax(1).max() >= threshold[k]:
                break
        logits.append(answer)
        exits.append(k)
    return torch.cat(logits), exits


def middle(net: nn.Module, images: Tensor, share: float = 0.5) -> float:
    """A threshold that this share of the images reaches, between two confidences."""
    with torch.no_grad():
        sure = net(images).float().softmax(1).amax(1).sort(descending=True).values
    return float(sure[round(share * len(images)) - 1 :][:2].mean())


@pytest.mark.parametrize("kind", ["widths", "slice", "tome inside", "three", "in a cascade"])
def test_equals_its_networks_by_hand(kind: str) -> None:
    small, large, images = plain(16, 1), plain(32, 2), draw_images(12)
    networks = {
        "widths": [small, large],
        "slice": [leanvit.slice_width(large, 0.5), large],
        "tome inside": [leanvit.lean(large, "tome", r=2), large],
        "three": [small, leanvit.lean(plain(32, 3), "tome", r=3), large],
        "in a cascade": [leanvit.cascade([small, plain(16, 4)], [middle(small, images)]), large],
    }[kind]
    thresholds = [middle(net, images) for net in networks[:-1]]
    net = leanvit.cascade(networks, thresholds)
    logits, exits = by_hand(networks, thresholds, images)
    assert len(set(exits)) == len(networks)
    answer = net.answer(images)
    assert answer.exits.tolist() == exits
    torch.testing.assert_close(answer.logits, logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(net(images), answer.logits)
    assert net(images[:0]).shape == (0, 6)


def test_later_networks_see_only_what_is_left_and_copies_are_their_own() -> None:
    small, large, images = plain(16, 1), plain(32, 2), draw_images(12)
    net = leanvit.cascade([small, large], [middle(small, images, 0.75)])
    expected = net(images)
    seen: list[int] = []
    watch = large.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    net(images)
    watch.remove()
    assert seen == [3]
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    large.head.bias.data += 1
    for other in copies:
        assert torch.equal(other(images), expected)
    assert not torch.equal(net(images), expected)
    assert set(net.state_dict()) == {
        f"cascade.networks.{k}.{key}" for k, each in enumerate((small, large)) for key in each.state_dict()
    }


def test_thresholds_for_a_budget_are_found_on_a_folder_or_batches(imagenet: Path) -> None:
    small, large = plain(16, 1, torch.float32), plain(32, 2, torch.float32)
    net = leanvit.cascade([small, large])
    probe = torch.empty(1, 3, 32, 32, device="meta")
    costs = [gmacs(count_operations(each, probe).executed) for each in (small, large)]
    costs[1] += costs[0]
    budget = costs[0] + 0.5 * (costs[1] - costs[0])
    found = net.calibrate(imagenet / "val", budget, batch_size=5)
    assert found.gmacs == pytest.approx(costs, rel=1e-12)
    assert found.early_gmacs <= budget
    assert found.exit_percent == [50, 50]
    assert net.thresholds == found.thresholds
    transform = timm.data.create_transform(  # pyright: ignore[reportAttributeAccessIssue]
        (3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.95
    )
    dataset = build_dataset("folder", imagenet / "val", "val", transform)
    images, labels = (torch.stack([torch.as_tensor(pair[k]) for pair in dataset]) for k in (0, 1))  # pyright: ignore
    again = leanvit.cascade([small, large])
    assert again.calibrate([(images, labels)], budget) == found
    with torch.no_grad():
        logits = torch.stack([small(images), large(images)])
    sure, answers = logits.softmax(-1).max(-1)
    thresholds = thresholds_for_budget(sure, costs, budget)
    assert found.thresholds == pytest.approx(thresholds.tolist())
    exits = first_exit(sure, thresholds)
    assert found.early_top1_percent == pytest.approx(
        100 * float((answers.gather(0, exits[None])[0] == labels).double().mean())
    )
    assert found.top1_percent == pytest.approx((100 * (answers == labels).double().mean(1)).tolist())
    with pytest.raises(ValueError, match="out of reach: the first exit costs"):
        net.calibrate([(images, labels)], costs[0] / 2)
    with pytest.raises(ValueError, match="label"):
        net.calibrate([(images, labels + 6)], budget)


def test_an_empty_batch_is_no_reason_not_to_find_thresholds() -> None:
    images, labels = draw_images(8), torch.zeros(8, dtype=torch.long)
    net = leanvit.cascade([plain(16, 1), plain()])
    costs = exit_gmacs(net.cascade, images)
    batches = [(images[:0], labels[:0]), (images, labels)]
    assert net.calibrate(batches, sum(costs) / 2) == net.calibrate(batches[1:], sum(costs) / 2)


def test_the_networks_are_exported_one_by_one(tmp_path: Path) -> None:
    small, large = (plain(width, seed, torch.float32, depth=1) for width, seed in ((16, 1), (32, 2)))
    images = draw_images(6, torch.float32)
    net = leanvit.cascade([small, leanvit.lean(large, "tome", r=2)], [0.5])
    for number, stage in enumerate(net.cascade.stages):
        file = tmp_path / f"exit{number}.pt2"
        assert export_program(stage, images[:3], file) < 1e-5
        run = torch.export.load(file).module()
        torch.testing.assert_close(run(images[3:4]), stage(images[3:4]))


def test_the_command_finds_thresholds_and_leaves_early(imagenet: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import timm\n\n\ndef made(width):\n"
        "    return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=6, embed_dim=width, depth=2)\n"
        "\n\ndef small():\n    return made(16)\n\n\ndef large():\n    return made(32)\n"
    )
    small, large = plain(16, 1, torch.float32), plain(32, 2, torch.float32)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    fast = leanvit.lean(large, "tome", r=2)
    leanvit.save(fast, tmp_path / "fast.safetensors")
    words = [f"{tmp_path}/nets.py:small={tmp_path}/small.pth", str(tmp_path / "fast.safetensors")]
    shared = ["--data_url", str(imagenet), "-j", "0", "--device", "cpu", "--batch_size", "5"]
    exits, seen = open_networks(words)
    assert seen == {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_ratio": 0.95}
    images = next(iter(ImageSource(dataset="imagenet", root=str(imagenet), batch_size=12, **seen).held_out()))[0]
    costs = exit_gmacs(exits, images)
    budget = sum(costs) / 2
    found = inference.main(["--networks", *words, *shared, "--dynamic", "--budget", f"{budget:.6g}"])
    assert found["flops"] == pytest.approx(costs)
    full, early = found["rows"]
    assert early["gmacs"] < full["gmacs"] == pytest.approx(costs[1])
    with torch.no_grad():
        logits = torch.stack([small(images), fast(images)])
    exits = first_exit(logits.softmax(-1).amax(-1), torch.tensor(early["thresholds"]))
    assert early["exit_percent"] == pytest.approx([100 * float((exits == k).double().mean()) for k in (0, 1)])
    curve = inference.main(["--networks", *words, *shared])
    assert len(curve["budgeted_batch_classification"][0]) == 59
    for wrong, message in ((words[:1], "at least two"), (["test_vit", words[1]], "test_vit=FILE")):
        with pytest.raises((UsageError, SystemExit), match=message if len(wrong) > 1 else "2"):
            inference.main(["--networks", *wrong, *shared])


class Odd(nn.Module):
    """Says nothing of itself."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), *self.shape)


def test_networks_that_do_not_go_together_are_named() -> None:
    small = plain(16, 1)
    for networks, message in (
        ([small], "at least two networks, got 1"),
        ([small, "deit"], r"networks\[1\]: expected a network"),
        (
            [small, plain(num_classes=5)],
            r"numbers of classes are 6 of networks\[0\] \(VisionTransformer\), 5 of networks",
        ),
        ([small, _headless()], r"networks\[1\] \(VisionTransformer\) has no head"),
        ([small, plain(img_size=48)], r"sides of images are \(32, 32\) of networks\[0\].*\(48, 48\) of networks\[1\]"),
        ([small, plain(dtype=torch.float32)], "weights are torch.float64 on cpu"),
    ):
        with pytest.raises(UsageError, match=message):
            leanvit.cascade(networks, [0.5])
    with pytest.raises(ValueError, match="thresholds of the first 1 exits"):
        leanvit.cascade([small, plain()], [0.5, 0.5, 0.5])
    for threshold, message in ((float("nan"), "nan is not a confidence"), (90, "90 is not"), ("x", "one confidence")):
        with pytest.raises(ValueError, match=message):
            leanvit.cascade([small, plain()], [threshold])  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=message):
            leanvit.cascade([small, plain()]).set_thresholds([threshold, 0.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="at least two networks, got 1"):
        leanvit.cascade(small)
    images = draw_images(2)
    for shape, message in (
        ((7,), r"networks\[1\] \(Odd\) gives \(2, 7\), expected logits \(2, 6\)"),
        ((2, 6), "2, 2, 6"),
    ):
        with pytest.raises(UsageError, match=message):
            leanvit.cascade([small, Odd(shape)])(images)
    net = leanvit.cascade([Odd((6,)), Odd((6,))])
    with pytest.raises(UsageError, match="give transform="):
        net.calibrate("nowhere", 1.0)
    assert isinstance(net, EarlyExit)
    with pytest.raises(RuntimeError, match=r"call \.eval"):
        net.train()(images)
    net = leanvit.cascade([small, plain()])
    small.train()  # by who else has it
    with pytest.raises(RuntimeError, match=r"call \.eval"):
        net(images)


def _headless() -> Any:
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0).double()

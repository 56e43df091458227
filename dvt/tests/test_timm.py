"""Cascades of timm's networks: as timm and as the published cascade compute them, trained, exported, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from common.run.checkpoint import CheckpointError
from common.run.errors import UsageError
from common.tests.reference import fill_
from dvt import inference, main, pack
from dvt.dynamic import DynamicClassifier
from dvt.exits import confidence_and_prediction, find_thresholds, first_exit
from dvt.models import create_model, patch_of
from dvt.models.cascade import make_cascade
from dvt.models.deit import VisionTransformer
from dvt.models.timm_stage import make_timm_stage

NAME = "timm:test_vit"
KINDS = ("test_vit", "test_vit2", "test_vit4")
"""Class token; register, average pool and LayerScale; and with RMS norm."""


def draw_images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def filled(net: nn.Module) -> Any:
    """Deterministic weights in float64, in evaluation mode."""
    return fill_(net.double(), 3).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_alone_is_the_network_of_timm(kind: str) -> None:
    for grid, padding, patch in ((4, 0, 8), (3, 2, 12)):
        assert patch_of(32, grid) == (patch, padding)
        stage = filled(make_timm_stage(kind, grid, img_size=32, num_classes=5))
        side = 32 + 2 * padding
        plain = timm.create_model(kind, img_size=side, patch_size=patch, num_classes=5, dynamic_img_size=False)
        plain.double().eval().load_state_dict(stage.state_dict())  # under timm's own names
        images = draw_images(2)
        with torch.no_grad():
            expected = plain(nn.functional.pad(images, [padding] * 4))
            torch.testing.assert_close(stage(images), expected, rtol=1e-12, atol=1e-12)
            handed = stage.run(images, hand_on=True)
            torch.testing.assert_close(handed.logits, expected, rtol=1e-11, atol=1e-11)
        assert handed.relations.shape == (2, stage.depth * 2 if kind != "test_vit4" else 27, *[grid**2 + 1] * 2)


def test_the_cascade_of_a_plain_network_is_the_published_one() -> None:
    """The same weights under the same names in our DeiT's cascade give the same logits, with every reuse."""
    grids, size = (2, 4, 8), {"embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3.0, "num_classes": 5}
    images = draw_images(2)
    for feature, relation in ((True, True), (True, False), (False, True)):
        reuse = {"feature_reuse": feature, "relation_reuse": relation, "img_size": 32}
        own = filled(make_cascade(VisionTransformer, [{"patch_size": 32 // grid} for grid in grids], **size, **reuse))
        made: Any = create_model(NAME, grids=grids, num_classes=5, **reuse).double().eval()
        made.load_state_dict(own.state_dict())
        with torch.no_grad():
            for found, expected in zip(made(images), own(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_early_exit_with_registers_equals_all_exits_and_everything_learns() -> None:
    cascade = filled(create_model("timm:test_vit2", grids=(2, 4), num_classes=5, img_size=32))
    images = draw_images(6)
    with torch.no_grad():
        logits = torch.stack(cascade(images))
    confidence = confidence_and_prediction(logits)[0]
    thresholds = find_thresholds(confidence, torch.tensor([0.5, 0.5])) * (1 - 1e-5)
    output = DynamicClassifier(cascade, thresholds)(images)
    exits = first_exit(confidence, thresholds)
    assert output.exits.tolist() == exits.tolist()
    assert sorted(exits.tolist()) == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(output.logits, logits[exits, torch.arange(6)], rtol=1e-10, atol=1e-10)
    sum(answer.logsumexp(1).sum() for answer in cascade.train()(images)).backward()
    assert not [name for name, value in cascade.named_parameters() if value.grad is None]


def test_a_stage_begins_as_the_network_whose_weights_it_has(caplog: pytest.LogCaptureFixture) -> None:
    images = draw_images(2)
    plain = filled(timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5, dynamic_img_size=False))
    options: dict[str, Any] = {"weights": plain.state_dict(), "img_size": 32, "num_classes": 5}
    made: Any = create_model(NAME, grids=(2, 4), **options, feature_reuse=False).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(made(images)[1], plain(images).to(torch.float64), rtol=1e-4, atol=1e-4)
    reusing: Any = create_model(NAME, grids=(2, 4), **options)
    first = reusing.stages[1].blocks[0]
    assert torch.equal(first.mlp.fc1.weight[:, :64], plain.blocks[0].mlp.fc1.weight.float())
    assert first.mlp.fc1.weight.shape == (192, 64 + 48)
    assert not caplog.records
    other: Any = create_model(NAME, grids=(2, 4), **{**options, "num_classes": 3}, source="five.pth")
    assert "five.pth: head.weight is for 5 classes, the network has 3" in caplog.text
    assert other.stages[0].head.weight.shape == (3, 64)
    with pytest.raises(CheckpointError, match=r"five\.pth does not fit"):
        create_model(NAME, grids=(2, 4), **{**options, "weights": {"norm.weight": torch.ones(64)}}, source="five.pth")


COMMON = ["--img-size", "32", "-j", "0", "--device", "cpu"]
TRAIN = ["--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "-b", "8", "--no-aug", "--mixup", "0",
         "--cutmix", "0", "--model-ema-decay", "0.5"]  # fmt: skip


def test_from_own_weights_to_an_exported_cascade(imagenet: Path, tmp_path: Path, capsys, caplog) -> None:
    output = ["--output", str(tmp_path), "--experiment"]
    one = main.main([str(imagenet), "--model", NAME, "--grids", "4", *COMMON, *TRAIN, *output, "one"])
    assert set(one) >= {"exit1_top1"}
    assert "6 classes, those of the data" in caplog.text + capsys.readouterr().err
    weights = tmp_path / "train" / "one" / "last.pth.tar"
    network = ["--model", NAME, "--grids", "2", "4", *COMMON]
    words = [str(imagenet), *network, *TRAIN, *output, "two"]
    main.main([*words, "--weights", str(weights)])
    last = tmp_path / "train" / "two" / "last.pth.tar"
    again = main.main([*words, "--epochs", "2", "--resume", str(last)])
    rows = [json.loads(row) for row in (tmp_path / "train" / "two" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [0, 1]
    tested = main.main([str(imagenet), *network, "--eval_checkpoint", str(last)])
    assert tested["exit2_top1"] == again["exit2_top1"]
    packed, file = tmp_path / "packed.pth.tar", tmp_path / "cascade.pt2"
    words = [str(imagenet), *network, "--checkpoint", str(last), "--output", str(packed), "--export", str(file)]
    content = pack.main(words)
    assert content["dynamic_threshold"].shape == (59, 2)
    assert content["anytime_classification"][1] == pytest.approx(tested["exit2_top1"])
    cascade: Any = create_model(NAME, grids=(2, 4), img_size=32, num_classes=6).eval()
    cascade.load_state_dict(content["model_state_dict"])
    images = draw_images(3).float()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(file).module()(images), cascade(images), rtol=1e-4, atol=1e-5)
    costs = content["flops"]
    words = [*network, "--checkpoint_path", str(packed), "--data_url", str(imagenet), "--dynamic"]
    found = inference.main([*words, "--budget", f"{sum(costs) / 2:.6g}"])
    assert found["rows"][1]["gmacs"] < costs[1]
    full = inference.main([*words, "--eval_mode", "1"])["rows"][0]
    assert full["top1_percent"] == pytest.approx(tested["exit2_top1"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "its class is SwinTransformer, and only timm's VisionTransformer"),
        ("eva02_tiny_patch14_224", "its class is Eva"),
        ("deit_tiny_distilled_patch16_224", "head_dist"),
        ("vit_tiny_r_s16_p8_224", r"patch_embed \(HybridEmbed\)"),
        ("vit_base_patch16_rpn_224", "blocks.0 is a ResPostBlock"),
        ("tst_vit", "timm has no network 'tst_vit'; near are test_vit"),
    ],
)
def test_what_cannot_be_a_stage_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_timm_stage(name, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", NAME, "--grids", "4", "2"], "--grids: grids must grow from stage to stage, got 4 2"),
        (["--model", "DVT_desk", "--grids", "2", "4"], "DVT_desk has its own grids"),
        (["--model", "DVT_desk", "--weights", "FILE"], "--weights belongs to --model timm:NAME"),
        (["--model", "timm:"], "invalid choice: 'timm:'"),
        (["--model", NAME, "--weights", "A", "--initial-checkpoint", "B"], "give one of them"),
    ],
)
def test_wrong_flags_say_what_to_do(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main.parse_args(words if "DVT_desk" in words else ["DIR", *words])
    assert message in capsys.readouterr().err


def test_images_that_the_grids_do_not_fill_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"4x4 patches do not fill images of 33 pixels; sides that work: \[32, 34, 30, 36\]"
    ):
        main.main(["nowhere", "--model", NAME, "--grids", "4", "--img-size", "33"])

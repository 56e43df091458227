"""inference.py: its three modes against plain loops, early exit from the command line, and incomplete files."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from common.run.checkpoint import CheckpointError
from dvt import inference
from dvt.costs import exit_gflops
from dvt.evaluation import ImageSource
from dvt.loading import PACKED_KEYS, read_packed
from dvt.models import create_model

FLAGS = ["--model", "DVT_desk", "--num-classes", "6", "-j", "0", "--device", "cpu", "--batch_size", "5"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A packed checkpoint of the desk network, with weights that are sure of some images and not of others."""
    torch.manual_seed(3)
    model = create_model("DVT_desk", num_classes=6)
    for stage in model.stages:  # pyright: ignore[reportAttributeAccessIssue]
        stage.embed.proj.weight.data *= 10  # what tells images apart
        stage.head.weight.data.normal_(std=0.2)
    ramp = torch.linspace(0.2, 0.9, 59)
    file = tmp_path_factory.mktemp("packed") / "packed.pth.tar"
    content = {
        "model_state_dict": model.state_dict(),
        "flops": [0.5, 1.5, 4.0],
        "anytime_classification": [10.0, 20.0, 30.0],
        "dynamic_threshold": torch.stack([ramp, ramp.flip(0), torch.full((59,), -1e8)], dim=1),
        "budgeted_batch_classification": [[1.0 + p / 30 for p in range(59)], [50.0] * 59],
    }
    torch.save(content, file)
    return file


def logits_of(packed: Path, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (K, n, C) of all exits, and targets, by the network itself."""
    model = create_model("DVT_desk", num_classes=6).eval()
    model.load_state_dict(torch.load(packed, weights_only=True)["model_state_dict"])
    with torch.no_grad():
        parts = [(torch.stack(model(images)), targets) for images, targets in batches]
    return torch.cat([logits for logits, _ in parts], dim=1), torch.cat([targets for _, targets in parts])


def walk(scores: torch.Tensor, targets: torch.Tensor, flops: list[float], thresholds: torch.Tensor) -> tuple:
    """Accuracy and mean cost, image by image."""
    right, cost = 0, 0.0
    for number, target in enumerate(targets.tolist()):
        for exit in range(3):
            confidence, answer = scores[exit, number].max(dim=0)
            if confidence >= thresholds[exit]:
                right += int(answer) == target
                cost += flops[exit]
                break
    return 100 * right / len(targets), cost / len(targets)


def printed_lists(text: str) -> dict[str, list]:
    lines = text.strip().splitlines()[-3:]
    return {name: json.loads(value) for name, value in (line.split(" : ") for line in lines)}


def test_mode_0_needs_no_data(packed, capsys):
    result = inference.main([*FLAGS, "--checkpoint_path", str(packed), "--eval_mode", "0", "--data_url", "nowhere"])
    stored = torch.load(packed, weights_only=True)
    printed = printed_lists(capsys.readouterr().out)
    assert list(printed) == ["flops", "anytime_classification", "budgeted_batch_classification"]
    for name, value in printed.items():
        assert value == stored[name] == result[name]


@pytest.mark.parametrize("slash", ["", "/"])
def test_mode_1_takes_the_thresholds_of_the_file(packed, imagenet, tmp_path, capsys, slash):
    only_val = tmp_path / "data"
    only_val.mkdir()
    (only_val / "val").symlink_to(imagenet / "val")  # train/ is not needed
    words = ["--checkpoint_path", str(packed), "--eval_mode", "1", "--data_url", f"{only_val}{slash}"]
    result = inference.main([*FLAGS, *words, "--output", str(tmp_path / "result.json")])
    stored = torch.load(packed, weights_only=True)
    logits, targets = logits_of(packed, ImageSource("imagenet", str(imagenet), 32, 5).held_out())
    scores = logits.softmax(dim=-1)
    costs, accuracies = result["budgeted_batch_classification"]
    for p in range(0, 59, 7):
        accuracy, cost = walk(scores, targets, stored["flops"], stored["dynamic_threshold"][p])
        assert accuracies[p] == pytest.approx(accuracy)
        assert costs[p] == pytest.approx(cost, rel=1e-6)
    assert len(set(costs)) > 3, "the thresholds must tell images apart for this test to mean something"
    anytime = (scores.argmax(dim=-1) == targets).double().mean(dim=1) * 100
    assert result["anytime_classification"] == pytest.approx(anytime.tolist(), rel=1e-6)
    assert printed_lists(capsys.readouterr().out)["budgeted_batch_classification"] == [costs, accuracies]
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["anytime_classification"] == result["anytime_classification"]
    assert kept["images"] == 12


def test_mode_2_finds_thresholds_and_needs_only_weights(packed, imagenet, tmp_path):
    stored = torch.load(packed, weights_only=True)
    torch.save({"state_dict": stored["model_state_dict"]}, tmp_path / "training.pth.tar")
    words = ["--checkpoint_path", str(tmp_path / "training.pth.tar"), "--data_url", str(imagenet)]
    result = inference.main([*FLAGS, *words, "--no-augment-search"])
    model = create_model("DVT_desk", num_classes=6)
    assert result["flops"] == exit_gflops(model)  # pyright: ignore[reportArgumentType]
    (tmp_path / "swapped").mkdir()
    (tmp_path / "swapped" / "val").symlink_to(imagenet / "train")
    logits, _ = logits_of(packed, ImageSource("imagenet", str(tmp_path / "swapped"), 32, 5).held_out())
    confidence = logits.softmax(dim=-1).amax(dim=-1)
    thresholds = torch.tensor(result["dynamic_threshold"])
    for p in (1, 20, 40):  # the quota of the first exit leaves there, and ties with it
        share = math.exp(math.log(p / 20)) / sum(math.exp(k * math.log(p / 20)) for k in (1, 2, 3))
        quota = int(24 * share)
        assert int((confidence[0] >= thresholds[p - 1, 0]).sum()) == quota
    again = inference.main([*FLAGS, *words, "--no-augment-search"])
    assert again["dynamic_threshold"] == result["dynamic_threshold"]
    augmented = inference.main([*FLAGS, *words, "--seed", "1"])
    assert augmented["dynamic_threshold"] == inference.main([*FLAGS, *words, "--seed", "1"])["dynamic_threshold"]
    assert augmented["dynamic_threshold"] != result["dynamic_threshold"]
    packed_costs = inference.main([*FLAGS, "--checkpoint_path", str(packed), "--data_url", str(imagenet)])
    assert packed_costs["flops"] == stored["flops"], "a packed file's own costs count"


def test_a_network_with_one_exit(small_models, imagenet, tmp_path, capsys):
    model = create_model("T2t_vit_7", num_classes=6)
    torch.save({"net": model.state_dict(), "acc": 1.0, "epoch": 3}, tmp_path / "ckpt.pth")
    words = ["--model", "T2t_vit_7", "--checkpoint_path", str(tmp_path / "ckpt.pth"), "--data_url", str(imagenet)]
    result = inference.main([*words, "--num-classes", "6", "-j", "0", "--device", "cpu"])
    batches = ImageSource("imagenet", str(imagenet), 224, 12).held_out()
    with torch.no_grad():
        hits = [float((model.eval()(images).argmax(dim=1) == targets).double().mean()) for images, targets in batches]
    assert result["anytime_classification"] == pytest.approx([100 * hits[0]], rel=1e-6)
    assert printed_lists(capsys.readouterr().out)["flops"] == result["flops"]


def test_early_exit_from_the_command_line(packed, imagenet, tmp_path, capsys):
    words = [*FLAGS, "--checkpoint_path", str(packed), "--data_url", str(imagenet), "--dynamic"]
    stored = torch.load(packed, weights_only=True)
    logits, targets = logits_of(packed, ImageSource("imagenet", str(imagenet), 32, 5).held_out())
    result = inference.main([*words, "--threshold", "0.4", "0.5", "--eval_mode", "1"])
    full, early = result["rows"]
    thresholds = torch.tensor([0.4, 0.5, -1e8])
    accuracy, cost = walk(logits.softmax(dim=-1), targets, stored["flops"], thresholds)
    assert (early["top1_percent"], early["gmacs"]) == pytest.approx((accuracy, cost))
    assert full["gmacs"] == pytest.approx(4.0)
    assert early["throughput_ips"] > 0
    inference.main([*words, "--budget", "1.5", "2.5", "--eval_mode", "1", "--output", str(tmp_path / "early.json")])
    rows = json.loads((tmp_path / "early.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full cascade", "budget 1.5", "budget 2.5"]
    assert "img/s" in capsys.readouterr().out.splitlines()[-1]
    found = inference.main([*words, "--budget", "2.0"])["rows"][1]
    assert found["gmacs"] < 4.0


@pytest.mark.parametrize(
    ("drop", "mode", "message"),
    [
        ("flops", "0", "lacks flops, which --eval_mode 0 needs; found model_state_dict"),
        ("anytime_classification", "0", "lacks anytime_classification"),
        ("budgeted_batch_classification", "0", "lacks budgeted_batch_classification"),
        ("dynamic_threshold", "1", "lacks dynamic_threshold, which --eval_mode 1 needs"),
        ("model_state_dict", "1", "lacks model_state_dict"),
        ("model_state_dict", "2", "expected weights under one of the keys"),
    ],
)
def test_a_missing_entry_is_named_with_the_mode_that_needs_it(packed, imagenet, tmp_path, drop, mode, message):
    content = torch.load(packed, weights_only=True)
    del content[drop]
    torch.save(content, tmp_path / "part.pth.tar")
    words = ["--checkpoint_path", str(tmp_path / "part.pth.tar"), "--eval_mode", mode, "--data_url", str(imagenet)]
    with pytest.raises(CheckpointError, match=rf"part\.pth\.tar.*{re.escape(message)}"):
        inference.main([*FLAGS, *words])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("flops", [1.0, 2.0], "flops must hold 3 finite numbers"),
        ("flops", "x", "flops must hold 3 finite numbers"),
        ("flops", [1.0, 2.0, float("nan")], "flops must hold 3 finite numbers"),
        ("dynamic_threshold", torch.full((59, 3), torch.nan), "dynamic_threshold holds what is no number"),
        ("dynamic_threshold", torch.zeros(59), r"dynamic_threshold has shape \(59,\), expected"),
        ("budgeted_batch_classification", [[1.0], [2.0, 3.0]], "must hold 1 finite numbers"),
        ("budgeted_batch_classification", {}, r"must be \[costs, accuracies\]"),
    ],
)
def test_entries_of_a_wrong_shape_are_named(packed, key, value, message):
    content = {**torch.load(packed, weights_only=True), key: value}
    with pytest.raises(CheckpointError, match=rf"some\.pth: .*{message}"):
        read_packed(content, PACKED_KEYS, source="some.pth", why="a test")


def test_wrong_commands_and_data(packed, imagenet, tmp_path, capsys):
    words = [*FLAGS, "--checkpoint_path", str(packed)]
    for flags, message in (
        (["--budget", "2"], "--budget belongs to --dynamic"),
        (["--dynamic", "--eval_mode", "0"], "use --eval_mode 1"),
        (["--eval_mode", "3"], "invalid choice"),
        (["--model", "T2t_vit_7", "--eval_mode", "1"], "T2t_vit_7 has one exit and no thresholds"),
        (["--model", "T2t_vit_7", "--dynamic"], "without --dynamic"),
        (["--model", "T2t_vit_6"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            inference.main([*words, *flags])
        assert message in capsys.readouterr().err
    data = ["--data_url", str(imagenet), "--eval_mode", "1"]
    with pytest.raises(ValueError, match=r"a budget of 0.1 GFLOPs .* the first exit costs 0.5, the last 4"):
        inference.main([*words, *data, "--dynamic", "--budget", "0.1"])
    with pytest.raises(ValueError, match="out of reach"):
        inference.main([*words, *data, "--dynamic", "--budget", "4.1"])
    with pytest.raises(CheckpointError, match=r"(?s)does not fit.*head.weight"):
        inference.main([*words, *data, "--num-classes", "5"])
    with pytest.raises(Exception, match="nowhere"):
        inference.main([*words, "--data_url", "nowhere", "--eval_mode", "1"])
    (tmp_path / "val").mkdir()
    with pytest.raises(Exception, match="val"):
        inference.main([*words, "--data_url", str(tmp_path), "--eval_mode", "1"])

"""Transfer to other data: T2T-ViT's groups and rates, what is taken over, and whole runs on digits and folders."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Subset

from common.data import build, loaders
from common.run import launch
from common.run.checkpoint import CheckpointError, CheckpointManager, resize_pos_embed
from common.run.errors import UsageError
from common.run.files import ROOT
from dvt import cifar, loading, models, transfer_learning
from dvt.models import create_model
from dvt.tests.tiny import SMALL_GRIDS, small_cascade, t2t_cascade

TINY = models.Entry("deit", {"img_size": 24, "embed_dim": 16, "depth": 1, "num_heads": 2}, tuple(SMALL_GRIDS))


@pytest.fixture
def tiny_desk(monkeypatch):
    monkeypatch.setitem(models.MODELS, "DVT_desk", TINY)


def few_digits(monkeypatch) -> None:
    """Train and test on 64 digits each."""
    whole_split = build.open_split
    monkeypatch.setattr(build, "open_split", lambda *args, **more: Subset(whole_split(*args, **more), range(64)))


def names_of(model, group):
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(value)] for value in group["params"]}


def test_groups_of_a_cascade():
    model = t2t_cascade()
    backbone, heads = cifar.parameter_groups(model, lr=0.05, ratio=0.01)
    assert (backbone["lr"], heads["lr"]) == (pytest.approx(5e-4), 0.05)
    stages = ("less_less_token", "less_token", "normal_token")
    assert names_of(model, heads) == {f"{stage}.head.{kind}" for stage in stages for kind in ("weight", "bias")}
    tuned = names_of(model, backbone)
    assert {name for name in tuned if "relation_reuse_conv" in name} == {
        f"{stage}.relation_reuse_conv.{layer}.{kind}"
        for stage in stages[1:]
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }
    assert any("feature_resuse_mlp" in name for name in tuned)
    stay = {name for name, _ in model.named_parameters()} - tuned - names_of(model, heads)
    ends = {name.split(".", 1)[1] for name in stay}
    performer = {f"tokens_to_token.attention{k}.w" for k in (1, 2)}  # random features, frozen in training, too
    assert ends == {"cls_token", "norm.weight", "norm.bias", "pos_embed"} | performer
    assert not any(dict(model.named_parameters())[name].requires_grad for name in stay)


def test_all_that_is_tuned_is_decayed_and_the_backbone_rises_at_a_small_rate():
    optimizer = cifar.build_optimizer(small_cascade(), lr=0.01)
    schedule = cifar.build_schedule(optimizer, epochs=60)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    optimizer.step()
    first = optimizer.param_groups[0]["lr"]
    for _ in range(60):
        schedule.step()
    assert first == pytest.approx(1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-4, 2e-4])


def test_heads_start_afresh_and_tables_are_resized():
    source = small_cascade(1, torch.float32, num_classes=7)
    target = small_cascade(2, torch.float32)
    fresh = loading.load_backbone(target, source.state_dict(), source="file")
    assert len(fresh) == 6
    assert all(".head." in name for name in fresh)
    torch.testing.assert_close(target.less_token.blocks[0].mlp.fc1.weight, source.less_token.blocks[0].mlp.fc1.weight)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(target.less_token.head.weight[:7], source.less_token.head.weight)
    # a table that rises along one side still does
    plane = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).reshape(1, 16, 2)
    table = torch.cat([torch.full((1, 1, 2), 9.0), plane], dim=1)
    grown = resize_pos_embed(table, (8, 8))
    assert grown.shape == (1, 65, 2)
    assert grown[0, 0].tolist() == [9, 9]
    grid = grown[0, 1:].view(8, 8, 2)
    assert grid.mean().item() == pytest.approx(1.5)
    assert (grid[..., 0].diff(dim=0)[1:-1] > 0.3).all()
    assert grid[..., 0].diff(dim=1).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="no square"):
        resize_pos_embed(table[:, :16], (8, 8))
    lacking = {name: value for name, value in source.state_dict().items() if "blocks" not in name}
    with pytest.raises(CheckpointError, match=r"blocks\.0"):
        loading.load_backbone(target, lacking, source="file")


def test_images():
    from PIL import Image

    image = Image.new("RGB", (32, 32), (255, 0, 0))
    test = cifar.test_transform(224)(image)
    assert test.shape == (3, 224, 224)
    expected = [(1 - cifar.MEAN[0]) / cifar.STD[0], -cifar.MEAN[1] / cifar.STD[1], -cifar.MEAN[2] / cifar.STD[2]]
    assert test[:, 7, 7].tolist() == pytest.approx(expected, abs=1e-5)
    assert cifar.train_transform(224)(image).shape == (3, 224, 224)


def test_from_a_cascade_to_digits_interrupted_and_resumed(tiny_desk, tmp_path, monkeypatch):
    source = create_model("DVT_desk", num_classes=7)
    few_digits(monkeypatch)
    torch.save({"state_dict_ema": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "pre.pth")
    words = ["--model", "DVT_desk", "--dataset", "digits", "--lr", "0.05", "--b", "32", "--workers", "0", "--device",
             "cpu", "--transfer-learning", "True", "--transfer-model", str(tmp_path / "pre.pth"), "--epochs", "2",
             "--transfer-ratio", "0.3"]  # fmt: skip
    result = transfer_learning.main([*words, "--output", str(tmp_path / "whole")])
    assert set(result) == {"exit1_top1", "exit2_top1", "exit3_top1", "exit3_top5", "best_top1"}
    whole = torch.load(tmp_path / "whole" / "last.pth", weights_only=True)
    (published,) = (tmp_path / "whole").glob("ckpt_0.05_0.0005_*.pth")
    content = torch.load(published, weights_only=True)
    assert set(content) == {"net", "acc", "epoch"}
    assert content["acc"] == result["best_top1"]

    class Interrupted(Exception):
        pass

    def stop(*_):
        raise Interrupted

    with monkeypatch.context() as patch:  # after the first epoch's checkpoint, before the second epoch
        patch.setattr(CheckpointManager, "save", _save_and(stop, after=2))
        with pytest.raises(Interrupted):
            transfer_learning.main([*words, "--output", str(tmp_path / "broken")])
    assert torch.load(tmp_path / "broken" / "last.pth", weights_only=True)["progress"]["epoch"] <= 1
    transfer_learning.main([*words, "--output", str(tmp_path / "broken"), "--resume"])
    broken = torch.load(tmp_path / "broken" / "last.pth", weights_only=True)
    for name, value in whole["model"].items():
        assert torch.equal(value, broken["model"][name]), name
    frozen = ("cls_token", "norm.weight", "pos_embed")
    for stage in ("less_less_token", "less_token", "normal_token"):
        for name in frozen:
            assert torch.equal(whole["model"][f"{stage}.{name}"], source.state_dict()[f"{stage}.{name}"])


@pytest.mark.parametrize("kept", [(False, False), (False, True)])
def test_a_cascade_trained_without_reuse_is_transferred(tiny_desk, tmp_path, monkeypatch, kept):
    few_digits(monkeypatch)
    source = create_model("DVT_desk", num_classes=7, feature_reuse=kept[0], relation_reuse=kept[1])
    torch.save(source.state_dict(), tmp_path / "pre.pth")
    words = ["--model", "DVT_desk", "--dataset", "digits", "--b", "32", "--workers", "0", "--device", "cpu",
             "--transfer-learning", "True", "--transfer-model", str(tmp_path / "pre.pth"), "--epochs", "1",
             "--output", str(tmp_path)]  # fmt: skip
    transfer_learning.main(words)
    (published,) = tmp_path.glob("ckpt_*.pth")
    net = torch.load(published, weights_only=True)["net"]
    assert list(net) == list(source.state_dict())
    again = loading.load_network("DVT_desk", {"net": net}, source=published, num_classes=10)
    assert (again.less_token.feature_reuse, again.less_token.relation_reuse) == kept
    with pytest.raises(CheckpointError, match="feature_resuse_mlp"):
        transfer_learning.main([*words, "--feature-reuse"])


def _save_and(then, *, after):
    calls = []
    save = CheckpointManager.save

    def wrapper(*args, **options):
        calls.append(save(*args, **options))
        if len(calls) == after:
            then()
        return calls[-1]

    return wrapper


@pytest.mark.slow
def test_two_processes_on_class_folders(imagenet, tmp_path):
    words = ["--model", "DVT_desk", "--dataset", "folder", "--data", str(imagenet), "--num-classes", "6", "--b", "8",
             "--epochs", "1", "--workers", "0", "--device", "cpu", "--output", str(tmp_path)]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "dvt/transfer_learning.py", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("exit1_top1")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["train_images"] == 24


def test_bad_command_lines(capsys, tmp_path, monkeypatch):
    for words, message in (
        (["--transfer-learning", "True"], "needs --transfer-model"),
        (["--transfer-model", "x.pth"], "only with --transfer-learning"),
    ):
        with pytest.raises(SystemExit):
            transfer_learning.parse_args(words)
        assert message in capsys.readouterr().err
    args = transfer_learning.parse_args(["--dataset", "cifar100", "--gp", "avg"])
    assert (args.num_classes, args.img_size, args.hflip, args.batch_size) == (None, 224, 0.5, 128)
    assert loaders.default_num_classes(args.dataset) == 100
    assert "--gp has no effect" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", lambda *_, **__: launch.World(0, 3, 0, torch.device("cpu"), None))
        with pytest.raises(UsageError, match="a multiple of it"):
            transfer_learning.main(["--dataset", "cifar100", "--data", str(tmp_path)])
    with pytest.raises(UsageError, match="the data set has 10 classes and the network 9"):
        transfer_learning.main(["--model", "DVT_desk", "--dataset", "digits", "--workers", "0", "--device", "cpu",
                                "--output", str(tmp_path), "--num-classes", "9"])  # fmt: skip
    with pytest.raises(CheckpointError, match=r"there is no .*last\.pth"):
        transfer_learning.main(
            ["--model", "DVT_desk", "--dataset", "digits", "--workers", "0", "--resume", "--output", str(tmp_path),
             "--device", "cpu"]
        )  # fmt: skip

"""The program as users start it: training, resuming, evaluating at any width, on one process and on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from common.run.errors import DataError, UsageError
from common.run.files import ROOT
from common.tests.forks import free_port
from scala import engine_scala, main_scala, sweep
from scala.models_scala import create
from scala.slicing import WidthError

SHAPE = ["--input-size", "32", "--patch-size", "8", "--embed-dim", "32", "--num-heads", "4", "--depth", "2"]
TINY = ["--device", "cpu", "--workers", "0", "--batch-size", "4", *SHAPE]
MODEL = ["--model", "deit_tiny_distilled_patch16_224_scala"]
TRAIN = [
    "--epochs",
    "2",
    "--full_warm_epoch",
    "1",
    "--granularity",
    "0.125",
    "--warmup-epochs",
    "0",
    "--no-repeated-aug",
]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | more


def start(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "scala/main_scala.py", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, errors


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, imagenet: Path) -> Path:
    """Folder of a short training run of a distilled network, X = 7."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--data-path", str(imagenet), "--output_dir", str(folder), "--num-classes", "1000"]
    main_scala.main([*TINY, *MODEL, *TRAIN, *words])
    return folder


def test_training_leaves_what_the_published_program_leaves(trained: Path) -> None:
    content = state(trained / "checkpoint.pth")
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"} <= set(content)
    assert content["epoch"] == 1
    assert (trained / "best_checkpoint.pth").exists()
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    first, second, *widths = lines
    assert first["epoch"] == 0
    assert first["train_loss_3q"] == first["train_loss_1q_ce"] == 0
    assert first["train_loss"] == first["train_loss_full"] > 0
    parts = sum(second[f"train_loss_{name}"] for name in ("full", "3q", "2q", "1q"))
    assert second["train_loss"] == pytest.approx(parts, rel=1e-5)
    assert set(second) >= {"train_lr", "test_loss", "test_acc1", "test_acc5", "n_parameters"}
    assert [row["Width ratio"] for row in widths] == [0.25 + 0.125 * step for step in range(7)]
    measured = json.loads((trained / "widths.json").read_text())["widths"]
    assert [row["top1_percent"] for row in measured] == [row["Acc1"] for row in widths]
    assert (trained / "widths.png").read_bytes().startswith(b"\x89PNG")


def evaluate(trained: Path, imagenet: Path, *words: str) -> dict[str, Any]:
    flags = ["--eval", "--resume", str(trained / "checkpoint.pth"), "--data-path", str(imagenet)]
    return main_scala.main([*TINY, *MODEL, *flags, *words])


def test_a_checkpoint_evaluates_at_every_width(
    trained: Path, imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run gives what single runs give, with the cost of each width; only val/ is needed."""
    (tmp_path / "val").symlink_to(imagenet / "val")
    swept = evaluate(trained, tmp_path, "--eval_ratio", "all", "--output_dir", str(tmp_path / "out"))
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[-1]) == pytest.approx(swept["top1_percent"], abs=1e-3)
    assert [row["ratio"] for row in swept["widths"]] == [0.25 + 0.125 * step for step in range(7)]
    assert [row["images"] for row in swept["widths"]] == [6] * 7
    logged = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()[2:]]
    assert [row["top1_percent"] for row in swept["widths"]] == [row["Acc1"] for row in logged]
    single = evaluate(trained, tmp_path, "--eval_ratio", "0.5")
    assert single["loss"] == swept["widths"][2]["loss"]
    two = evaluate(trained, tmp_path, "--eval_ratio", "0.5,1.0")
    assert [row["loss"] for row in two["widths"]] == [swept["widths"][index]["loss"] for index in (2, 6)]
    assert swept["gmacs"] > swept["widths"][0]["gmacs"] > 0
    assert (tmp_path / "out" / "widths.md").read_text().startswith("| width ratio |")
    recorded = json.loads((tmp_path / "out" / "widths.json").read_text())["arguments"]
    assert (recorded["model"], recorded["granularity"], recorded["input_size"]) == (MODEL[1], 0.125, 32)


def test_a_width_that_gives_nan_leaves_the_others(
    trained: Path, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine_scala.AtRatio.forward
    monkeypatch.setattr(
        engine_scala.AtRatio,
        "forward",
        lambda self, images: forward(self, images) * (torch.nan if self.ratio == 0.5 else 1),
    )
    with pytest.raises(DataError, match=r"width 0\.5 gives logits that are not numbers"):
        evaluate(trained, imagenet, "--eval_ratio", "0.25", "0.5", "1", "0.25", "--output_dir", str(tmp_path))
    rows = json.loads((tmp_path / "widths.json").read_text())["widths"]
    assert [row["ratio"] for row in rows] == [0.25, 1, 0.25]


def test_a_checkpoint_is_exported_at_every_width_for_timm(trained: Path, tmp_path: Path) -> None:
    """The network, its overrides and its widths come from the checkpoint; timm gives the slice's logits."""
    from scala import export
    from scala.standalone import load_standalone

    for ratio in (0.25 + 0.125 * step for step in range(7)):
        words = ["--checkpoint", str(trained / "checkpoint.pth"), "--ratio", str(ratio), "--output"]
        assert export.main([*words, str(tmp_path / f"{ratio}.safetensors")])[f"{ratio}.safetensors"] < 1e-5
        theirs = load_standalone(tmp_path / f"{ratio}.safetensors")
        assert isinstance(theirs, timm.models.deit.VisionTransformerDistilled)
        assert theirs.embed_dim == 32 * ratio
    average = [*words[:3], "0.5", "--weights", "model_ema", "--output", str(tmp_path / "average")]
    assert export.main(average)["average.safetensors"] < 1e-5
    with pytest.raises(UsageError, match=r"--ratio 0\.4375 was not trained"):
        export.main([*words[:3], "0.4375", "--output", str(tmp_path / "none")])


def test_a_checkpoint_says_its_network(trained: Path, imagenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a flag for it; what is printed is the published line, with the mean over images beside it."""
    words = ["--eval", "--resume", str(trained / "checkpoint.pth"), "--data-path", str(imagenet), "--eval_ratio", "0.5"]
    found = main_scala.main(["--device", "cpu", "--workers", "0", "--batch-size", "4", *words])
    assert found["loss"] == evaluate(trained, imagenet, "--eval_ratio", "0.5000001")["loss"]
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"* Acc@1 {found['top1_percent']:.3f} Acc@5 {found['top5_percent']:.3f} loss ")
    assert line.endswith(f"{found['batch_loss']:.3f} (mean over batches; over images {found['loss']:.3f})")


def test_an_untrained_width_is_refused_unless_allowed(
    trained: Path, imagenet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"0\.4375 was not trained; the trained ones are 0\.25, 0\.375, 0\.5, "):
        evaluate(trained, imagenet, "--eval_ratio", "0.4375")
    with pytest.raises(WidthError, match="valid ratios"):
        evaluate(trained, imagenet, "--eval_ratio", "0.4375", "--allow-untrained")
    assert "expect the accuracy of chance" in capsys.readouterr().err
    assert evaluate(trained, imagenet, "--eval_ratio", "0.125", "--allow-untrained")["images"] == 6


def test_flags_that_contradict_the_checkpoint_are_refused(trained: Path, imagenet: Path) -> None:
    with pytest.raises(UsageError, match=r"--smallest_ratio 0\.5 contradicts .*trained with 0\.25"):
        evaluate(trained, imagenet, "--smallest_ratio", "0.5")
    with pytest.raises(UsageError, match=r"--granularity 0\.25 contradicts"):
        evaluate(trained, imagenet, "--granularity", "0.25")
    for words, advice in (
        (["--embed-dim", "64"], r"a width of 32 \(--model or --embed-dim\)"),
        (["--num-classes", "7"], r"1000 classes \(--num-classes\)"),
        (["--model", "deit_tiny_patch16_224_scala"], r"a distillation token \(a \*_distilled_\*"),
    ):
        with pytest.raises(Exception, match=advice):
            evaluate(trained, imagenet, *words)


def test_an_official_file_with_a_namespace_is_read(trained: Path, imagenet: Path, tmp_path: Path) -> None:
    content = state(trained / "checkpoint.pth")
    from argparse import Namespace

    official = {"model": content["model"], "args": Namespace(smallest_ratio=0.25, largest_ratio=1.0), "epoch": 1}
    torch.save(official, tmp_path / "official.pth")
    words = ["--eval", "--data-path", str(imagenet), "--eval_ratio", "0.5", "--resume", str(tmp_path / "official.pth")]
    assert main_scala.main([*TINY, *MODEL, *words])["images"] == 6


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, imagenet: Path) -> None:
    """Widths, mixup and stochastic depth go on as if nothing had happened."""
    flags = [*TINY, *MODEL, "--epochs", "2", "--full_warm_epoch", "0", "--granularity", "0.125", "--no-repeated-aug",
             "--data-path", str(imagenet), "--save-every-steps", "1", "--lr", "0.1"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main_scala.main([*flags, "--output_dir", str(whole)])
    process = start(*flags, "--output_dir", str(broken))
    while process.poll() is None and not (broken / "checkpoint.pth").exists():
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = state(broken / "checkpoint.pth")["progress"]["step"]
    assert before < 8
    main_scala.main([*flags, "--output_dir", str(broken), "--resume", "auto"])
    expected, found = state(whole / "checkpoint.pth"), state(broken / "checkpoint.pth")
    for part in ("model", "model_ema"):
        assert all(torch.equal(expected[part][key], found[part][key]) for key in expected[part])
    assert (whole / "log.txt").read_text() == (broken / "log.txt").read_text()


def test_a_finished_run_resumed_repeats_no_width(
    tmp_path: Path, imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(epochs: int) -> list[tuple[int, float]]:
        more = ["--epochs", str(epochs), "--full_warm_epoch", "0", "--granularity", "0.25", "--no-repeated-aug"]
        files = ["--data-path", str(imagenet), "--output_dir", str(tmp_path), "--resume", "auto"]
        main_scala.main([*TINY, *MODEL, *more, *files])
        rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        return [(row["step"], row["ratio"]) for row in rows if row["event"] == "width"]

    widths = [(4, 0.25), (4, 0.5), (4, 0.75), (4, 1.0)]
    assert train(1) == widths
    published = (tmp_path / "log.txt").read_text()
    assert train(1) == widths
    assert (tmp_path / "log.txt").read_text() == published

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "evaluate_widths", die)
        with pytest.raises(KeyboardInterrupt):
            train(1)
    assert train(1) == widths
    assert (tmp_path / "log.txt").read_text() == published
    assert train(2) == [*widths, *((8, ratio) for _, ratio in widths)]  # a longer run keeps those of the shorter


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "other"), [("torchrun", "launch"), ("launch", "torchrun")])
def test_the_scripts_of_record_run_on_two_processes(launcher: str, other: str, imagenet: Path, tmp_path: Path) -> None:
    """run.sh trains one of its networks (narrowed), eval.sh evaluates it through the other launcher."""
    teacher = timm.create_model("deit_tiny_patch16_224")
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    out = tmp_path / "out"
    variables = environment(
        NPROC="2", LAUNCHER=launcher, PORT=str(free_port()), TEACHER_S=str(tmp_path / "teacher.pth"),
        TEACHER_B=str(tmp_path / "teacher.pth"),
    )  # fmt: skip
    small = [*TINY, "--teacher-model", "deit_tiny_patch16_224", "--num-classes", "1000", "--output_dir", str(out)]
    short = ["--epochs", "1", "--full_warm_epoch", "0", "--granularity", "0.125"]
    size = "s" if launcher == "torchrun" else "b"
    run = ["bash", "scala/run.sh", str(imagenet), size, *small, *short]
    result = subprocess.run(run, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) == 7 + 2 + 7 + 1  # a line per width, the table, the number
    model = "deit_small_distilled_patch16_224_scala" if size == "s" else "deit_base_distilled_patch16_224_scala"
    assert state(out / "checkpoint.pth")["args"]["model"] == model
    row = json.loads((out / "log.jsonl").read_text().splitlines()[1])
    assert row["train_images"] == 2 * 4 * 2
    words = ["bash", "scala/eval.sh", str(imagenet), str(out / "checkpoint.pth"), *TINY, "--model", model]
    variables |= {"LAUNCHER": other, "PORT": str(free_port())}
    result = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    final = float(result.stdout.splitlines()[-1])
    swept = {row["ratio"]: row for row in json.loads((out / "widths.json").read_text())["widths"]}
    assert final == pytest.approx(swept[0.5]["top1_percent"], abs=1e-3)


def test_scripts_say_how_they_are_used() -> None:
    for script in ("run.sh", "eval.sh"):
        result = subprocess.run(["bash", f"scala/{script}"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2
        assert f"bash scala/{script} DATA" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "deit_tiny_patch16_224_scala", "--no-model-ema", "--mixup", "0", "--cutmix", "0"],
        ["--model", "deit_tiny_patch16_224_scala", "--cosub"],
        ["--cosub", "--token_type", "dist_token"],
        ["--bce-loss", "--smoothing", "0", "--no-train-mode"],
        ["--ce_type", "teacher", "--transfer_type", "US", "--distill_type", "hard", "--ThreeAugment", "--src"],
        ["--attn-only", "--model", "deit_tiny_patch16_224_scala", "--ce_type", "teacher"],
        ["--init-values", "0.1", "--grad-checkpointing", "--model", "deit_tiny_patch16_224_scala"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_combinations_that_failed_officially_train(words: list[str], imagenet: Path) -> None:
    flags = ["--epochs", "1", "--full_warm_epoch", "0", "--granularity", "0.25", "--no-repeated-aug"]
    row = main_scala.main([*TINY, *MODEL, *flags, "--data-path", str(imagenet), *words])
    assert [width["ratio"] for width in row["widths"]] == [0.25, 0.5, 0.75, 1.0]
    assert row["images"] == 6


def test_isolated_activation_switched_off_belongs_to_the_checkpoint(imagenet: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--full_warm_epoch", "0", "--granularity", "0.25", "--no-repeated-aug"]
    folder = ["--data-path", str(imagenet), "--output_dir", str(tmp_path)]
    row = main_scala.main([*TINY, *MODEL, *flags, *folder, "--no-isolated-activation"])
    words = ["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--data-path", str(imagenet), "--device", "cpu"]
    losses = [[width["loss"] for width in found["widths"]] for found in (
        row, main_scala.main([*words, "--workers", "0", "--eval_ratio", "all"]),
        main_scala.main([*words, "--workers", "0", "--eval_ratio", "all", "--isolated-activation"]),
    )]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert [a == pytest.approx(b, rel=1e-6) for a, b in zip(losses[0], losses[2], strict=True)] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(("warm", "warned"), [("2", True), ("1", True), ("0", False)])
def test_a_run_that_trains_no_slim_width_says_so(
    warm: str, warned: bool, imagenet: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--epochs", "1", "--full_warm_epoch", warm, "--granularity", "0.25", "--no-repeated-aug"]
    main_scala.main([*TINY, *MODEL, *flags, "--data-path", str(imagenet)])
    text = f"the 3 others stay at chance: --full_warm_epoch {warm} is not below --epochs 1"
    assert (text in caplog.text) == warned


def test_separate_training_is_the_largest_width_alone(imagenet: Path, tmp_path: Path) -> None:
    flags = ["--model", "deit_tiny_patch16_224_scala", "--epochs", "1", "--full_warm_epoch", "1", "--no-repeated-aug"]
    folder = ["--data-path", str(imagenet), "--output_dir", str(tmp_path)]
    row = main_scala.main([*TINY, *flags, *folder])
    assert [width["ratio"] for width in row["widths"]] == [1.0]
    words = ["--eval", "--resume", str(tmp_path / "checkpoint.pth"), "--data-path", str(imagenet), *flags[:2]]
    assert [width["ratio"] for width in main_scala.main([*TINY, *words, "--eval_ratio", "all"])["widths"]] == [1.0]
    with pytest.raises(UsageError, match=r"the trained ones are 1\."):
        main_scala.main([*TINY, *words, "--eval_ratio", "0.25"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--granularity", "0.2"], "does not divide the range"),
        (["--smallest_ratio", "0.5", "--granularity", "0.25"], "at least 4 widths"),
        (["--granularity", "0.0625"], "valid ratios are the multiples of 4/32"),
        (["--model", "resnet50"], "no model of this package"),
        (["--input-size", "33"], "--input-size .img_size. 33 is no multiple of the patch"),
        (["--global-batch-size", "3"], "need an even batch"),
        (["--num-classes", "1"], "has 2 classes and the network 1"),
        (["--finetune", "nowhere.pth"], "no such file"),
        (["--data-path", "nowhere"], "nowhere"),
        (["--official-anchors", "--model", "deit_tiny_patch16_224_scala"], "does not take one of the flags"),
        (["--no-isolated-activation", "--model", "mobilenet_v2_scala"], "does not take one of the flags"),
    ],
)
def test_settings_that_are_refused(words: list[str], message: str, imagenet: Path) -> None:
    base = ["--epochs", "1", "--full_warm_epoch", "0", "--granularity", "0.25", "--no-repeated-aug"]
    with pytest.raises(Exception, match=message):
        main_scala.main([*TINY, *MODEL, *base, "--data-path", str(imagenet), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distillation-type", "hard"], "needs --teacher-path"),
        (
            ["--distillation-type", "hard", "--model", "deit_tiny_patch16_224_scala"],
            "needs a model with",
        ),
        (["--distillation-type", "soft", "--teacher-path", "F", "--finetune", "F"], "leave one out"),
        (["--distillation-type", "soft", "--teacher-path", "F", "--cosub"], "leave --distillation-type out"),
        (["--bce-loss"], "give --smoothing 0"),
        (["--batch-size", "5"], "even --batch-size"),
        (["--src"], "give both"),
        (["--eval_ratio", "half"], "width ratios such as 0.5, or all"),
        (["--cooldown-epochs", "10"], "--cooldown-epochs would have no effect"),
        (["--resplit"], "no augmentation splits"),
        (["--dr", "0.1"], "--dr would have no effect"),
        (["--sched", "step"], "invalid choice"),
        (["--ce_type", "both"], "invalid choice"),
        (["--token_type", "patch"], "invalid choice"),
        (["--granularity", "-1"], "must be positive"),
    ],
)
def test_flags_that_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_scala.parse_args([*MODEL, *words])
    assert message in capsys.readouterr().err


def test_published_spellings_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    args = main_scala.parse_args(
        ["--discrete_ratio", "0.0625", "--dist-eval", "--world_size", "4", "--num_workers", "3"]
    )
    assert (args.granularity, args.workers) == (0.0625, 3)
    warned = capsys.readouterr().err
    assert "warning: --dist-eval has no effect" in warned
    assert "warning: --world_size has no effect" in warned


def test_finetuning_takes_what_fits(imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a plain network of other classes and size into a distilled one, and the other way round; the data counts."""
    options = {"patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 3}
    source = create("deit_tiny_patch16_224_scala", img_size=48, **options)
    torch.save({"model": source.state_dict()}, tmp_path / "plain.pth")
    torch.save({"model": create("deit_tiny_distilled_patch16_224_scala", img_size=32, **options).state_dict()},
               tmp_path / "distilled.pth")  # fmt: skip
    flags = ["--epochs", "1", "--full_warm_epoch", "0", "--granularity", "0.25", "--no-repeated-aug", "--lr", "1e-9"]
    for file, model in (("plain.pth", "deit_tiny_distilled_patch16_224_scala"),
                        ("distilled.pth", "deit_tiny_patch16_224_scala")):  # fmt: skip
        words = ["--finetune", str(tmp_path / file), "--model", model, "--data-path", str(imagenet)]
        row = main_scala.main([*TINY, *flags, *words, "--output_dir", str(tmp_path / model)])
        assert row["images"] == 6
        told = capsys.readouterr().err
        assert "the data set has 2 classes, not imagenet's 1000" in told
        assert "its head of 3 classes is replaced by a fresh one of 2" in told
        after = state(tmp_path / model / "checkpoint.pth")["model"]
        assert len(after["head.weight"]) == 2
        before = state(tmp_path / file)["model"]
        torch.testing.assert_close(
            after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"], atol=1e-4, rtol=0
        )

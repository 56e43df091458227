"""Both stages as a user runs them: the published scripts with two processes, kills and resumes, wrong input."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict

from common.data.paths import INSIDE
from common.run.engine import Optimization, evaluate
from common.run.errors import DataError, UsageError
from common.run.files import ROOT
from common.tests.forks import free_port, run_forked, torchrun_variables
from uvc import arguments, joint_train, post_train
from uvc.build import build_primal_dual, build_student, load_network
from uvc.engine import FineTuning, JointTraining
from uvc.loading import load_masked
from uvc.models import DESK, MODELS, create
from uvc.models.deit import GatedDeiT
from uvc.structure import Structure
from uvc.tests.conftest import OWN

TINY = ["--model_type", "deit_desk", "--num_workers", "0", "--device", "cpu", "--train_batch_size", "4"]
STAGE1 = [
    *TINY, "--distillation-type", "soft", "--distillation-alpha", "0.1", "--num_epochs", "2", "--warmup_epochs", "1",
    "--warmup_steps", "2", "--learning_rate", "1e-3", "--log_interval", "2", "--gating_interval", "2", "--slr", "1",
    "--rlr", "1", "--z_grad_clip", "1", "--enable_patch_gating", "1",
]  # fmt: skip
STAGE2 = [*TINY, "--epochs", "2", "--warmup-epochs", "1", "--distillation-type", "soft", "--learning_rate", "1e-2"]
RUN = "debug"


def stage1(material: SimpleNamespace, folder: Path, *more: str) -> list[str]:
    """Words of a tiny stage 1."""
    return [*STAGE1, "--data_dir", material.data, "--model_path", material.dense, "--output_dir", str(folder), *more]


def stage2(material: SimpleNamespace, folder: Path, checkpoint: Path, *more: str) -> list[str]:
    """Words of a tiny stage 2."""
    files = ["--data_dir", material.data, "--model_path", material.dense, "--output_dir", str(folder)]
    return [*STAGE2, *files, "--checkpoint_dir", str(checkpoint), *more]


@pytest.fixture(scope="module")
def found(material: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished stage 1: its folder, last numbers and last file."""
    folder = tmp_path_factory.mktemp("stage1")
    metrics = joint_train.main(stage1(material, folder))
    return SimpleNamespace(folder=folder / RUN, metrics=metrics, file=folder / RUN / "deit_desk_2.pth.tar")


def rows(folder: Path, event: str) -> list[dict[str, Any]]:
    """Rows of the record."""
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in read if row["event"] == event]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two nested states are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            place
            for i, pair in enumerate(zip(one, other, strict=False))
            for place in differences(*pair, f"{where}/{i}")
        ]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [where]


def kept_state(folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint that a run goes on from."""
    content = torch.load(folder / RUN / "last.pth", weights_only=True)
    content["progress"].pop("seconds")
    return {key: content[key] for key in ("model", "optimizer", "lr_scheduler", "extra", "progress")}


# Published commands


def run_script(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A shell script of the package, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PORT": str(free_port()), "WORKERS": "0"}
    done = subprocess.run(
        ["bash", str(ROOT / "uvc" / name), *words],
        env=environment | variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_classes_in_another_order_are_refused(material, found, tmp_path):
    """The same names, of which the first is missing: the number of classes does not tell."""
    other = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(Path(material.data, split, "n00"), other / split / "n02")
        shutil.copytree(Path(material.data, split, "n01"), other / split / "n01")
    words = stage2(SimpleNamespace(**{**vars(material), "data": str(other)}), tmp_path / "out", found.file)
    with pytest.raises(DataError, match=r"deit_desk_2\.pth\.tar: these are not the classes that it was trained on"):
        post_train.main(words)
    with pytest.raises(DataError, match="these are not the classes that it was trained on"):
        post_train.main([*words, "--eval"])


@pytest.mark.slow
def test_published_scripts_with_two_processes(material, tmp_path):
    variables = {"DATA": material.data, "MODEL": material.dense, "OUTPUT": str(tmp_path)}
    short = ["--num_epochs", "2", "--warmup_epochs", "1", "--log_interval", "2", "--gating_interval", "2"]
    printed = run_script(
        "run_uvc_train.sh", *TINY, *short, "--slr", "1", "--rlr", "1", "--enable_writer", "1", **variables
    )
    folder = tmp_path / "mc_deit_tiny_patch16_224_with_patch"
    result = json.loads((folder / "result.json").read_text())
    last = printed.stdout.strip().splitlines()[-1]
    assert last.startswith(
        f"top-1 {result['top1_percent']:.3f} %, remaining cost {result['remaining_cost_percent']:.2f} %"
    )
    assert result["images"] == 11
    assert rows(folder, "epoch")[-1]["train_images"] == 24
    assert list((folder / "tensorboard").iterdir())
    assert "--eval_every has no effect" in printed.stderr

    checkpoint = str(folder / "deit_desk_2.pth.tar")
    printed = run_script("run_post_train.sh", *TINY, "--epochs", "1", CHECKPOINT=checkpoint, **variables)
    folder = tmp_path / "ft_deit_tiny_patch16_224"
    result = json.loads((folder / "result.json").read_text())
    assert printed.stdout.strip().splitlines()[-1].startswith(f"top-1 {result['top1_percent']:.3f} %")
    again = post_train.main(["--checkpoint_dir", str(folder / "deit_desk.pth.tar"), "--data_dir", material.data,
                             "--num_workers", "0", "--device", "cpu", "--eval", "--output_dir", ""])  # fmt: skip
    assert again["top1_percent"] == result["top1_percent"]


@pytest.mark.parametrize("name", ["run_uvc_train.sh", "run_post_train.sh"])
def test_scripts_say_what_they_need_and_their_flags_parse(name, monkeypatch):
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    done = subprocess.run(
        ["bash", str(ROOT / "uvc" / name)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "usage: DATA=DIR" in done.stderr
    text = (ROOT / "uvc" / name).read_text().split('_train.py"', 1)[1].replace("\\\n", " ")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = [word for word in shlex.split(text.replace('"$@"', "")) if word]
    words = [
        "2" if word.startswith("${WORKERS") else "pretrained" if word.startswith("${MODEL") else word for word in words
    ]
    script = joint_train if "uvc_train" in name else post_train
    args = script.parse_args([*words, "--device", "cpu"])
    assert args.model_path.endswith("deit_tiny_patch16_224-a1311bcf.pth")


# Stage 1


def test_stage1_learns_under_the_budget_and_records_it(found):
    assert found.metrics["remaining_cost_percent"] < 100
    structure = rows(found.folder, "structure")
    assert [row["step"] for row in structure] == [2, 4, 6, 8, 10, 12]
    last = structure[-1]
    assert len(last["s"]) == len(last["gates"]) == 6
    assert len(last["r"][0]) == 4
    assert structure[0]["s"] == [[0.0, 0.0]] * 6  # warm-up
    assert max(max(row) for row in last["s"]) > 0
    assert last["z"] != structure[0]["z"]
    assert last["z_lr"] == 50.0  # later ones win where there are more than epochs
    epoch = rows(found.folder, "epoch")[-1]
    assert epoch["test_remaining_cost_percent"] == pytest.approx(100 * last["remaining"])
    assert (found.folder / "structure.png").read_bytes().startswith(b"\x89PNG")
    extra = torch.load(found.folder / "last.pth", weights_only=True)["extra"]["uvc"]
    assert extra["s"].tolist() == last["s"]


def test_the_file_holds_the_architecture_found(found, material):
    content = torch.load(found.file, weights_only=True)
    structure = Structure.from_dict(content["uvc"]["structure"])
    masked = load_masked(found.file)
    assert Structure.from_model(masked.model) == structure
    assert masked.model.gates.patch == "remove"
    kept = content["uvc"]["variables"]["heads_kept"]
    assert [len(block.heads) for block in structure.blocks] <= kept
    result = post_train.main(stage2(material, Path(), found.file, "--eval", "--output_dir", ""))
    assert result["top1_percent"] == found.metrics["top1_percent"]
    assert result["remaining_cost_percent"] == pytest.approx(found.metrics["remaining_cost_percent"], abs=1e-3)
    again = joint_train.main(
        stage1(material, Path(), "--eval", "--resume", str(found.folder / "last.pth"), "--output_dir", "")
    )
    assert again["top1_percent"] == found.metrics["top1_percent"]


def test_stage1_starts_again_from_a_file_of_its_own(found, material, tmp_path):
    """Of gates that skip a block, too: the cost is of all blocks, and the masks begin anew."""
    content = torch.load(found.file, weights_only=True)["model"]
    content["block_skip_gating"][2] = torch.tensor([1.0, -1.0])
    torch.save(content, tmp_path / "again.pth")
    words = stage1(material, tmp_path, "--model_path", str(tmp_path / "again.pth"), "--teacher-path", material.dense)
    model = build_student(arguments.joint_run(joint_train.parse_args(words)).student, 2)
    assert model.runs() == (True, True, False, True, True, True)
    weight, mask = content["blocks.1.mlp.fc2.weight"], content["blocks.1.mlp.fc2.mask"]
    assert not mask.all()
    assert torch.equal(model.blocks[1].mlp.fc2.weight, weight * mask)
    assert bool(model.blocks[1].mlp.fc2.mask.all())
    metrics = joint_train.main([*words, "--num_epochs", "1", "--warmup_epochs", "0"])
    assert 0 < metrics["remaining_cost_percent"] < 100


def kill_at(step: int, stage: type) -> Callable[[], None]:
    """Make a stage kill its process after a step, before that step is saved."""

    def install() -> None:
        original = stage.after_step

        def after_step(self: Any, info: Any) -> Any:
            if info.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, info)

        stage.after_step = after_step  # pyright: ignore[reportAttributeAccessIssue]

    return install


def check_resume(program: Any, words: Callable[[Path], list[str]], stage: type, folder: Path, kills: list[int]) -> None:
    """A run that is killed at some steps and resumed ends where an unbroken one does."""
    whole, broken = folder / "whole", folder / "broken"
    (ended,) = run_forked(lambda: program.main(words(whole)), timeout_s=400)
    assert ended.status == 0, ended.output
    for step in kills:
        install = kill_at(step, stage)
        (ended,) = run_forked(
            lambda install=install: (install(), program.main([*words(broken), "--resume", "auto"])), timeout_s=400
        )
        assert ended.status == -signal.SIGKILL, ended.output
    (ended,) = run_forked(lambda: program.main([*words(broken), "--resume", "auto"]), timeout_s=400)
    assert ended.status == 0, ended.output
    assert "resumed from" in ended.output
    assert differences(kept_state(whole), kept_state(broken)) == []
    timeless = [
        {key: value for key, value in row.items() if "seconds" not in key} for row in rows(whole / RUN, "epoch")
    ]
    for row, again in zip(timeless, rows(broken / RUN, "epoch"), strict=True):
        assert row == {key: again[key] for key in row}


@pytest.mark.slow
def test_stage1_killed_and_resumed_is_bit_identical(material, tmp_path):
    # Adam and the averages of gate gradients carry state of their own; kills in the warm-up and between gate updates
    flags = ["--save-every-steps", "1", "--soptim", "adam", "--gating_interval", "4", "--warmup_reset", "1"]
    check_resume(
        joint_train,
        lambda folder: stage1(material, folder, *flags),
        JointTraining,
        tmp_path,
        [3, 10],
    )


@pytest.mark.slow
def test_stage2_killed_and_resumed_is_bit_identical(material, found, tmp_path):
    check_resume(
        post_train,
        lambda folder: stage2(material, folder, found.file, "--save-every-steps", "2"),
        FineTuning,
        tmp_path,
        [9],
    )


@pytest.mark.slow
def test_ranks_keep_equal_variables_and_accumulate(material, tmp_path):
    """As torch.distributed.launch starts them: the rank of the machine on the command line alone."""
    environments = torchrun_variables(2)
    words = stage1(material, tmp_path, "--gradient_accumulation_steps", "2", "--enable_patch_gating", "2")

    def job() -> Any:
        local = os.environ.pop("LOCAL_RANK")
        kept: list[JointTraining] = []
        original = JointTraining.enter

        def enter(self: JointTraining, *positions: int) -> None:
            kept.append(self)
            original(self, *positions)

        JointTraining.enter = enter
        joint_train.run(lambda: joint_train.main([*words, f"--local_rank={local}"]))
        state = kept[-1].primal_dual
        weights = {name: value.detach() for name, value in kept[-1].model.named_parameters()}
        return {name: getattr(state, name).detach() for name in ("s", "r", "y", "p", "z")} | weights

    ended = run_forked(job, environments, timeout_s=400)
    assert [process.status for process in ended] == [0, 0], ended
    first, second = (process.result for process in ended)
    assert differences(first, second) == []
    assert float(first["s"].max()) > 0


def test_the_loss_scale_of_fp16_is_taken_out_of_the_patch_gates(found, material, tmp_path, monkeypatch):
    """No optimizer under the scaler holds them."""
    seen: list[torch.Tensor] = []
    original = JointTraining.step

    def step(self: JointTraining, batch: Any, optimization: Optimization) -> Any:
        state = torch.get_rng_state()
        for scale in (0.0, 1024.0):
            torch.set_rng_state(state)
            optimization.zero_grad()
            assert self.model.patch_gating is not None
            self.model.patch_gating.grad = None
            scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
            original(self, batch, Optimization(self.optimizer, scaler=scaler))
            assert self.model.patch_gating.grad is not None
            seen.append(self.model.patch_gating.grad.clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(JointTraining, "step", step)
    with pytest.raises(KeyboardInterrupt):
        joint_train.main(stage1(material, tmp_path, "--mixup", "0", "--cutmix", "0"))
    torch.testing.assert_close(seen[1], seen[0])


def test_official_form(material, tmp_path):
    metrics = joint_train.main(stage1(material, tmp_path, "--official", "--num_epochs", "1", "--warmup_epochs", "0"))
    folder = tmp_path / RUN
    assert len(rows(folder, "epoch")) == 2  # one more than asked for
    state = torch.load(folder / "deit_desk_2.pth.tar", weights_only=True)
    assert "patch_gating" in state
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert {row["z_lr"] for row in rows(folder, "structure")} == {10.0}  # the first of the list, for ever
    (dump,) = folder.glob("gating_*.json")
    assert sorted(json.loads(dump.read_text())) == ["10", "12", "2", "4", "6", "8"]
    assert metrics["expected_cost_percent"] > 0
    masked = load_masked(folder / "deit_desk_2.pth.tar", model_type="deit_desk")
    assert masked.model.gates.patch == "soft"
    result = post_train.main(stage2(material, tmp_path / "ft", folder / "deit_desk_2.pth.tar", "--epochs", "1"))
    assert result["blocks_running"] == metrics["blocks_running"]
    state = torch.load(tmp_path / "ft" / RUN / "deit_desk.pth.tar", weights_only=True)["model"]
    for name, mask in state.items():
        if name.endswith(".mask"):
            assert not state[name.replace(".mask", ".weight")][mask == 0].any(), name


@pytest.mark.parametrize(
    ("name", "flags", "both"),
    [
        ("t2t_vit_7", ["--enable_patch_gating", "2", "--use_gumbel", "0"], []),
        ("deit_tiny_distilled_patch16_224", ["--enable_patch_gating", "0"], ["--enable_deit", "1"]),
    ],
)
def test_other_networks_through_both_stages(name, flags, both, material, tmp_path):
    state = create(name, num_classes=2, img_size=32).state_dict()
    plain = {key: value for key, value in state.items() if not any(word in key for word in OWN)}
    torch.save({"model": plain, "state_dict_ema": plain}, tmp_path / "dense.pth")
    files = SimpleNamespace(data=material.data, dense=str(tmp_path / "dense.pth"))
    short = ["--img_size", "32", "--num_epochs", "1", "--warmup_epochs", "0", *flags]
    found = joint_train.main(stage1(files, tmp_path / "one", *both, *short, "--model_type", name))
    checkpoint = tmp_path / "one" / RUN / f"{name}_1.pth.tar"
    words = stage2(files, tmp_path / "two", checkpoint, *both, "--epochs", "1", "--model_type", name)
    result = post_train.main(words)
    assert result["remaining_cost_percent"] == pytest.approx(found["remaining_cost_percent"], abs=1e-3)
    assert found["remaining_cost_percent"] < 100
    weights = load_masked(tmp_path / "two" / RUN / f"{name}.pth.tar").model.state_dict()
    assert not torch.equal(weights["head.weight"], plain["head.weight"])


# Wrong input

DIGITS = [
    "--model_type",
    "deit_desk",
    "--dataset",
    "digits",
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--output_dir",
    "",
]
FREE = ["--pretrained", "0", "--distillation-type", "none"]


@pytest.mark.parametrize("name", INSIDE)
def test_what_ships_inside_needs_no_folder(name):
    args = joint_train.parse_args([*DIGITS, *FREE, "--dataset", name])
    arguments.check_paths(args)
    assert args.data_dir == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*DIGITS, *FREE, "--budget", "0.001"], r"--budget 0\.001 cannot be met: with these flags 0\.0\d+"),
        (
            [*DIGITS, *FREE, "--budget", "0.5", "--enable_block_gating", "0", "--enable_pruning", "0"],
            "1.0000 of the cost",
        ),
        ([*DIGITS, "--distillation-type", "none"], "--model_path is missing"),
        ([*DIGITS, "--pretrained", "0"], "needs the teacher's weights"),
        ([*DIGITS, *FREE, "--enable_deit", "1"], "no distillation token"),
        ([*DIGITS, *FREE, "--model_type", "ViT-B_16"], "has no gates"),
        ([*DIGITS, *FREE, "--model_type", "deit_tiny_patch16_224_half"], "without a configuration"),
        ([*DIGITS, *FREE, "--model_type", "t2t_vit_t_14"], "does not count"),
        ([*DIGITS, *FREE, "--model_type", "resnet50"], "unknown model 'resnet50'"),
        (
            [*DIGITS, "--pretrained", "0", "--teacher-model", "resnet50", "--teacher-path", "x"],
            "must be a deit, t2t or timm",
        ),
        ([*DIGITS, "--distillation-type", "none", "--model_path", "nowhere.pth"], r"nowhere\.pth: no such file"),
        (["--data_dir", "nowhere", "--device", "cpu"], "nowhere"),
        ([*DIGITS, "--pretrained", "0", "--num_epochs", "5", "--warmup_epochs", "5"], "nothing would be pruned in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stage1_refuses(words, message):
    with pytest.raises(Exception, match=message):
        joint_train.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "1.5"], "must be above 0 and at most 1"),
        (["--zlr_schedule_list", "a,b"], "numbers from 0 on, separated by commas"),
        (["--slr", "nan"], "argument --slr: must be a number from 0 on, got nan"),
        (["--mixup", "nan"], "argument --mixup: must be a number from 0 on, got nan"),
        (["--train_batch_size", "6", "--gradient_accumulation_steps", "4"], "no multiple"),
        (["--train_batch_size", "4", "--gradient_accumulation_steps", "4"], "must be at least 2"),
        (["--cutmix-minmax", "0.1"], "expected 2 arguments"),
        (["--enable_pruning", "2"], "must be 0 or 1"),
        (["--model_type", "deit_desk", "--model_path", "pretrained"], "no published dense checkpoint of deit_desk"),
    ],
)
def test_flags_that_cannot_be(words, message, capsys):
    with pytest.raises((SystemExit, UsageError)) as error:
        joint_train.parse_args(words)
    assert message in capsys.readouterr().err + str(error.value)


def test_stage2_refuses(material, found, tmp_path):
    with pytest.raises(Exception, match="--checkpoint_dir is missing"):
        post_train.main(["--device", "cpu"])
    with pytest.raises(Exception, match="--pretrained 1"):
        post_train.main(["--device", "cpu", "--pretrained", "1"])
    other = ["--model_type", "deit_tiny_patch16_224"]
    with pytest.raises(Exception, match=r"its width is 64, that of deit_tiny_patch16_224 is 192"):
        post_train.main(stage2(material, tmp_path, found.file, *other))
    with pytest.raises(Exception, match="2 classes, the data 10"):
        post_train.main([*DIGITS, "--checkpoint_dir", str(found.file)])
    with pytest.raises(Exception, match="takes 32 pixels"):
        post_train.main(stage2(material, tmp_path, found.file, "--img_size", "64"))
    with pytest.raises(Exception, match="--eval does not read --resume"):
        post_train.main(stage2(material, tmp_path, found.file, "--eval", "--resume", "auto"))


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--model_path", "pretrained"], arguments.WEIGHTS["deit_small_patch16_224"]),
        ([], arguments.WEIGHTS["deit_small_patch16_224"]),
        (["--model_path", "mine.pth"], "mine.pth"),
    ],
)
def test_the_teacher_of_stage2_is_that_of_the_file(words, path, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "deit_small_patch16_224", (GatedDeiT, {**DESK, "img_size": 16, "depth": 1}))
    file = tmp_path / "deit_small_patch16_224_30.pth.tar"
    torch.save(create("deit_small_patch16_224").state_dict(), file)
    words = [*words, "--checkpoint_dir", str(file)]
    args = post_train.parse_args(words)
    name = load_network(args.checkpoint_dir, args.stated_model_type, img_size=None).model_type
    settings = arguments.post_run(args, name)
    assert name == settings.teacher.model_type == settings.arguments["model_type"] == "deit_small_patch16_224"
    assert settings.teacher.source == path


def test_a_network_of_which_nothing_runs(found, material, tmp_path, capfd):
    content = torch.load(found.file, weights_only=True)
    content["model"]["block_skip_gating"] = torch.zeros_like(content["model"]["block_skip_gating"])
    torch.save(content["model"], tmp_path / "deit_desk_skipped.pth")
    result = post_train.main(stage2(material, tmp_path, tmp_path / "deit_desk_skipped.pth", "--epochs", "1"))
    assert result["blocks_running"] == 0
    assert 0 < result["remaining_cost_percent"] < 1
    assert "no block runs" in capfd.readouterr().err


def test_a_budget_beyond_the_clip_is_warned_of(capfd):
    settings = arguments.joint_run(joint_train.parse_args([*DIGITS, *FREE, "--budget", "0.3"]))
    build_primal_dual(build_student(settings.student, 10), settings.primal_dual, seed=0)
    assert "--z_grad_clip 0.7 avoids that" in capfd.readouterr().err


# Evaluation, the measure of the cost, and settings in files


def test_evaluation_prints_and_writes_every_number(found, material, tmp_path, capfd, monkeypatch):
    shown: list[bool] = []

    def seen(*args: Any, show_progress: bool, **named: Any) -> dict[str, float]:
        shown.append(show_progress)
        return evaluate(*args, show_progress=show_progress, **named)

    monkeypatch.setattr("uvc.stages.evaluate", seen)
    resumed = ["--eval", "--resume", str(found.folder / "last.pth")]
    for program, words in (
        (post_train, stage2(material, tmp_path / "post", found.file, "--eval")),
        (joint_train, stage1(material, tmp_path / "joint", *resumed)),
    ):
        result = program.main(words)
        printed = capfd.readouterr()
        folder = Path(words[words.index("--output_dir") + 1]) / RUN
        assert json.loads((folder / "result.json").read_text()) == result
        assert not (folder / "log.jsonl").exists()
        top1, cost = f"top-1 {result['top1_percent']:.3f} %", f"remaining cost {result['remaining_cost_percent']:.2f} %"
        last = f"{top1}, {cost}, top-5 {result['top5_percent']:.3f} %, loss {result['loss']:.4f}"
        assert printed.out.splitlines()[-1] == last
        assert shown.pop() is True


def test_rates_of_zero_leave_the_weights(material, tmp_path):
    rates = ["--learning_rate", "0", "--warmup_lr", "0", "--num_epochs", "2", "--enable_pruning", "0"]
    joint_train.main(stage1(material, tmp_path, *rates, "--warmup_epochs", "1"))
    state = torch.load(tmp_path / RUN / "deit_desk_2.pth.tar", weights_only=True)["model"]
    dense = torch.load(material.dense, weights_only=True)["model"]
    assert all(torch.equal(state[name], value) for name, value in dense.items())


def test_both_stages_mean_the_same_cost_whatever_the_budget_is_on(material, tmp_path, capfd):
    flags = ["--flops_with_mhsa", "0", "--num_epochs", "1", "--warmup_epochs", "0", "--enable_patch_gating", "0"]
    found = joint_train.main(stage1(material, tmp_path, *flags))
    assert "expected: of the output projections" in capfd.readouterr().err
    file = tmp_path / RUN / "deit_desk_1.pth.tar"
    result = post_train.main(stage2(material, Path(), file, "--eval", "--output_dir", ""))
    assert result["remaining_cost_percent"] == pytest.approx(found["remaining_cost_percent"], abs=1e-3)
    assert found["remaining_cost_percent"] != pytest.approx(found["expected_cost_percent"], abs=0.01)


def test_settings_in_a_file(tmp_path, capsys):
    words = ["--model_type", "deit_desk", "--budget", "0.4", "--zlr_schedule_list", "1,5", "--official", "--eval"]
    words += ["--cutmix-minmax", "0.2", "0.5", "--enable_pruning", "0"]
    with pytest.raises(SystemExit):
        joint_train.parse_args([*words, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(printed)
    python = "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'run': {'budget': 0.3}})\n"
    (tmp_path / "run.py").write_text(python)
    (tmp_path / "run.json").write_text('{"budget": 0.3, "zlr_schedule_list": [2, 3]}')
    typed = vars(joint_train.parse_args(words)) | {"config": str(tmp_path / "run.yaml")}
    read = joint_train.parse_args(["--config", str(tmp_path / "run.yaml")])
    assert vars(read) == typed
    assert joint_train.parse_args([f"--config={tmp_path / 'run.yaml'}", "--budget", "0.6"]).budget == 0.6
    assert joint_train.parse_args(["--config", str(tmp_path / "run.py")]).budget == 0.3
    assert joint_train.parse_args(["--config", str(tmp_path / "run.json")]).zlr_schedule_list == [2, 3]
    nested = "x: &a {seed: 1}\nz: &b {a: *a, b: *a}\nu: &c {a: *b, b: *b}\nv: {a: *c, b: *c}\n"
    for text, message in ((nested, "nested deeper than 2"), ("slr: [[1], [2]]", "--slr takes values, and none")):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            joint_train.parse_args(["--config", str(tmp_path / "bomb.yaml")])
    config = ConfigDict({"run": {"budget": 0.3, "zlr_schedule_list": (2, 3)}})
    (tmp_path / "tagged.yaml").write_text(config.to_yaml())
    assert joint_train.parse_args(["--config", str(tmp_path / "tagged.yaml")]).zlr_schedule_list == [2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"bugdet": 0.3}', "there is no flag --bugdet"),
        ("a.json", "[1]", "holds a list"),
        ("a.json", "{", "JSONDecodeError"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']", "ConstructorError"),
        ("a.py", "x = 1", "KeyError: 'get_config'"),
        ("a.py", "import ml_collections_is_not_here", "ml_collections_is_not_here"),
    ],
)
def test_files_of_settings_that_cannot_be_used(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        joint_train.parse_args(["--config", str(tmp_path / name)])
    with pytest.raises(UsageError, match="no such file"):
        joint_train.parse_args(["--config", str(tmp_path / "none.json")])


def test_without_ml_collections_one_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ml_collections", None)
    with pytest.raises(UsageError, match=r"pip install 'leanvit\[papers\]'"):
        joint_train.parse_args(["--print_config"])
    (tmp_path / "a.py").write_text("import ml_collections")
    with pytest.raises(UsageError, match=r"pip install 'leanvit\[papers\]'"):
        joint_train.parse_args(["--config", str(tmp_path / "a.py")])

"""``--fsdp``: losses of one process, checkpoints in shards and as one file, exact resume, what is refused."""

import hashlib
import importlib
import json
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import leanvit
from common.run import one_file
from common.run.build import build_average, build_optimizer, build_run
from common.run.checkpoint import CheckpointError, CheckpointManager, TrainingState, load_safely, save_atomic
from common.run.checkpoint.sharded import load_sharded, read_rest
from common.run.engine import Optimization
from common.run.errors import UsageError
from common.run.launch import World, launch, shutdown
from common.run.settings import OptimizerSettings, RunSettings
from common.run.wrapping import divided, gathered, shard
from common.tests.forks import Ended, free_port, run_forked, torchrun_variables
from common.tests.jobs import digest, tiny_model, tiny_transformer, training

ALONE = World(0, 1, 0, torch.device("cpu"), None)


def in_two(function: Callable[[], Any], **options: Any) -> list[Ended]:
    return run_forked(function, torchrun_variables(2), timeout_s=150, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The trainers

RATIO, CLIP = ["--keeping-ratio", "0.7"], ["--clip-grad", "0.5"]
PROGRAMS: Mapping[str, list[str]] = {
    "scala.main_scala": ["--full_warm_epoch", "0", "--granularity", "0.25", "--unscale-lr", "--no-model-ema"],
    "sit.main": ["--teacher-path", "WEIGHTS", "--model-ema", "--print-freq", "0", "--no-scale-lr", *RATIO, *CLIP],
    "dvt.main": ["--grids", "1", "2", "--no-aug"],
}
SHARED = [
    "--device",
    "cpu",
    "--model",
    "timm:test_vit",
    "--weights",
    "WEIGHTS",
    "--epochs",
    "1",
    "--warmup-epochs",
    "0",
]
SHARED += ["--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--aa=", "--lr", "1e-3"]
SHARED += ["--workers", "0", "--model-ema-decay", "0.5"]
IMAGES = ["--input-size", "16", "--patch-size", "8", "--no-repeated-aug", "--reprob", "0", "--color-jitter", "0"]


def place(folder: Path, program: str) -> Path:
    return folder / "train" / program if program == "dvt.main" else folder / program


def train(program: str, folder: Path, *words: str) -> None:
    given = [str(folder.parent / "own.pth") if word == "WEIGHTS" else word for word in PROGRAMS[program] + SHARED]
    data, out = str(folder.parent / "data"), ["--output_dir", str(place(folder, program))]
    if program == "dvt.main":
        given += [data, "--img-size", "16", "--output", str(folder), "--experiment", program, "--cooldown-epochs", "0"]
    else:
        given += [*IMAGES, "--data-path", data, *out] + ["--cooldown-epochs", "0"] * (program == "sit.main")
    importlib.import_module(program).main([*given, *words])


def epochs(folder: Path, program: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (place(folder, program) / "log.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] in ("epoch", "width")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/ with a run of every trainer, of one process without and of two with --fsdp."""
    root = tmp_path_factory.mktemp("fsdp")
    rng = np.random.default_rng(0)
    for index in range(24):
        file = root / "data" / ("train" if index < 16 else "val") / f"n{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 120, (20, 20, 3)) + 120 * (index % 2)).astype(np.uint8)).save(file)
    torch.manual_seed(0)
    own = timm.create_model("test_vit", img_size=16, patch_size=8, num_classes=2)
    torch.save(own.state_dict(), root / "own.pth")
    for program in PROGRAMS:
        train(program, root / "one", "--batch-size", "8")
    ports = [str(free_port()) for _ in PROGRAMS]

    def programs() -> None:
        for port, program in zip(ports, PROGRAMS, strict=True):
            os.environ["MASTER_PORT"] = port
            train(program, root / "two", "--batch-size", "4", "--fsdp")
            shutdown()

    for ended in in_two(programs):
        assert ended.status == 0, ended.output
    return root


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_processes_have_the_losses_of_one(program: str, trained: Path) -> None:
    one, two = (epochs(trained / folder, program) for folder in ("one", "two"))
    assert len(one) == len(two) >= 1
    for alone, together in zip(one, two, strict=True):
        losses = {name: value for name, value in alone.items() if "loss" in name}
        assert losses
        for name, value in losses.items():
            assert together[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert not [path.name for path in place(trained / "two", program).glob("*.pth*")]


def test_one_file_serves_every_program(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scala, sit, dvt = (importlib.import_module(program) for program in PROGRAMS)
    folders = [place(trained / "two", program) for program in PROGRAMS]
    data = ["--data-path", str(trained / "data"), "--device", "cpu", "--workers", "0"]
    for folder, name in zip(folders, ("checkpoint.dcp", "best_checkpoint.dcp", "last.dcp"), strict=True):
        one_file.main([str(folder / name), str(tmp_path / f"{folder.name}.pth")])
    assert "scala.main_scala.pth: " in capfd.readouterr().err
    files = [str(tmp_path / f"{program}.pth") for program in PROGRAMS]
    content = torch.load(files[0], weights_only=True)
    alone = torch.load(place(trained / "one", "scala.main_scala") / "checkpoint.pth", weights_only=True)
    assert list(content) == list(alone)
    for name, value in alone["model"].items():
        torch.testing.assert_close(content["model"][name], value, rtol=1e-3, atol=1e-4)
    widths = [row for row in epochs(trained / "two", "scala.main_scala") if row["event"] == "width"]
    rows = scala.main(["--eval", "--resume", files[0], "--eval_ratio", "all", *data])["widths"]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in widths], rel=1e-6)
    network = ["--model", "timm:test_vit", "--input-size", "16", "--patch-size", "8"]
    tested = sit.main(["--eval", "--finetune", files[1], *network, *data])
    assert tested["image_loss"] == pytest.approx(epochs(trained / "two", "sit.main")[0]["test_image_loss"], rel=1e-6)
    student = tmp_path / "student.safetensors"
    importlib.import_module("sit.export").main([*network, "--weights", files[1], "--output", str(student)])
    weights = torch.load(files[1], weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in leanvit.load(student).state_dict().items())
    words = [str(trained / "data"), "--model", "timm:test_vit", "--grids", "1", "2", "--img-size", "16", "-j", "0"]
    answer = dvt.main([*words, "--device", "cpu", "--eval_checkpoint", files[2]])
    assert answer["loss"] == pytest.approx(epochs(trained / "two", "dvt.main")[0]["test_loss"], rel=1e-6)
    for program, flags in ((scala, ["--resume"]), (sit, ["--finetune"])):
        with pytest.raises(
            CheckpointError, match=r"in shards.* python -m common\.run\.one_file .*checkpoint\.dcp FILE"
        ):
            program.main(["--eval", *flags, str(folders[0] / "checkpoint.dcp"), *network, *data])


def test_a_network_that_uses_all_its_weights_at_once_is_refused(trained: Path) -> None:
    words = ["--fsdp", "--model", "mobilenet_v2_scala", "--device", "cpu", "--data-path", str(trained / "data")]
    words += ["--input-size", "32", "--batch-size", "4", "--granularity", "0.25", "--no-repeated-aug"]
    with pytest.raises(UsageError, match="mobilenet_v2_scala uses the weights of all its blocks at once"):
        importlib.import_module("scala.main_scala").main(words)


def test_what_two_processes_wrote_is_resumed_by_one(trained: Path) -> None:
    """A finished run has the same widths, one that goes on the losses of the run of one process."""
    before = epochs(trained / "two", "scala.main_scala")
    try:
        train("scala.main_scala", trained / "two", "--batch-size", "8", "--fsdp", "--resume", "auto")
    finally:
        shutdown()
    after = epochs(trained / "two", "scala.main_scala")
    assert [row["loss"] for row in before[1:]] == pytest.approx([row["loss"] for row in after[1:]], rel=1e-6)
    one, two = (place(trained / folder, "dvt.main") for folder in ("one", "two"))
    train("dvt.main", one.parents[1], "-b", "8", "--epochs", "2", "--resume", str(one / "last.pth.tar"))
    try:
        train("dvt.main", two.parents[1], "-b", "8", "--epochs", "2", "--resume", str(two / "last.dcp"), "--fsdp")
    finally:
        shutdown()
    (_, alone), (_, again) = (epochs(trained / folder, "dvt.main") for folder in ("one", "two"))
    for name in ("train_loss", "test_loss"):
        assert again[name] == pytest.approx(alone[name], rel=1e-4), name


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume


def overflow(world: World) -> float:
    """The loss scale, 4 before, after a step that changes nothing: rank 0 alone has an infinite gradient."""
    model: Any = tiny_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    shard(model, world, optimizer)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.6 * sum(parameter.numel() for parameter in model.parameters())
    others: list[bool] = []
    model.blocks["1"][0].register_forward_hook(lambda *_: others.append(divided(model.blocks["0"])))
    optimization = Optimization(optimizer, torch.amp.GradScaler("cpu", init_scale=4.0), 1.0, model)
    optimization.backward(model(torch.ones(2, 3, 6, 6)).sum())
    assert others == [True], "one block runs while another one is gathered"
    with gathered(model):
        before = digest(model.state_dict())
    found = next(value for value in model.parameters() if value.to_local().numel())
    if world.is_main:
        found.grad.to_local().view(-1)[0] = torch.inf
    optimization.step()
    assert digest(model.state_dict()) == before
    return optimization.scaler.get_scale()


def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    def go(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: training(tmp_path / name, launch("cpu"), fsdp=True, save_every_steps=4, **options)

    def whole() -> tuple[float, str]:
        world = launch("cpu")
        return overflow(world), training(tmp_path / "whole", world, fsdp=True, save_every_steps=4)

    first = in_two(whole)
    assert [ended.status for ended in first] == [0, 0], first[0].output
    scale, expected = first[0].result
    assert first[1].result == (scale, expected) == (2.0, expected)
    broken = in_two(go("broken", kill_in_save=4))
    assert broken[0].status == -signal.SIGKILL, broken[0].output
    assert not (tmp_path / "broken" / "last.dcp").exists(), "it ended before it could be killed"
    resumed = in_two(go("broken"))
    assert resumed[0].result == expected, resumed[0].output
    assert "resumed from" in resumed[0].output
    assert not list((tmp_path / "broken").glob(".*.tmp")) + list((tmp_path / "broken").glob(".*.old"))
    try:  # by another number of processes: nothing is left to train, and the state is the same
        assert training(tmp_path / "whole", ALONE, fsdp=True) == expected
    finally:
        shutdown()
    one_file.main([str(tmp_path / "whole" / "last.dcp"), str(tmp_path / "one.pth")])
    one = torch.load(tmp_path / "one.pth", weights_only=True)
    assert digest(one["model"], one["model_ema"], one["optimizer"], one["extra"]["duals"]["value"]) == expected
    assert one["progress"] == read_rest(tmp_path / "whole" / "last.dcp")["progress"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def alone():
    """One process with a group of its own, left behind by nobody."""
    yield ALONE
    shutdown()


def start(model: nn.Module, **options: Any) -> Any:
    optimizer = OptimizerSettings(lr=0.1, **options)
    average = build_average(model, optimizer)
    return build_run(
        model, ALONE, RunSettings(fsdp=True), optimizer=build_optimizer(model, optimizer), schedule=None, epochs=1,
        average=average,
    )  # fmt: skip


def test_what_cannot_be_divided_is_refused(alone: World) -> None:
    with pytest.raises(UsageError, match="Sequential has no module called blocks"):
        start(tiny_model())
    with pytest.raises(UsageError, match="leave --model-ema-force-cpu out"):
        start(tiny_transformer(), model_ema=True, model_ema_force_cpu=True)
    for opt, name in (("novograd", "NvNovoGrad"), ("mars", "Mars")):
        trainer = start(tiny_transformer(), opt=opt)
        with pytest.raises(UsageError, match=f"{name} cannot work on weights that --fsdp divides"):
            trainer.fit(lambda images: {"loss": trainer.network(images).sum()}, [torch.ones(2, 3, 6, 6)])  # noqa: B023
    with pytest.raises(UsageError, match="--compile cannot follow"):
        RunSettings(fsdp=True, compile=True)
    with pytest.raises(UsageError, match="--fsdp is for training"):
        RunSettings(fsdp=True, eval=True)


def test_shards_that_are_damaged_or_hostile_are_named(alone: World, tmp_path: Path) -> None:
    trainer = start(tiny_transformer())
    manager = CheckpointManager(tmp_path, metric=None, sharded=True)
    half = tmp_path / ".last.dcp.0123.tmp"  # of a process that was killed
    half.mkdir()
    (tmp_path / ".last.dcp.note").touch()
    manager.lock()
    assert not half.exists()
    manager.save(trainer.state)
    folder = tmp_path / "last.dcp"
    ordinary = CheckpointManager(tmp_path, metric=None)
    with pytest.raises(CheckpointError, match=r"last\.dcp is of a run with --fsdp, which cannot go on as this one"):
        ordinary.resume(TrainingState(tiny_model()))
    ordinary.save(TrainingState(tiny_model()))
    with pytest.raises(CheckpointError, match="expected a folder that a run with --fsdp wrote"):
        manager.resume(trainer.state, tmp_path / "last.pth")
    folder.rename(tmp_path / "kept.dcp")
    with pytest.raises(CheckpointError, match=r"last\.pth is of a run without --fsdp"):
        manager.resume(trainer.state)
    (tmp_path / "kept.dcp").rename(folder)
    shards = folder / "__0_0.distcp"
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing or damaged"):
        manager.resume(trainer.state)
    with pytest.raises(CheckpointError, match=r"no such folder"):
        one_file.main([str(tmp_path / "nothing.dcp"), str(tmp_path / "one.pth")])
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    assert manager.resume(trainer.state)
    with pytest.raises(UsageError, match=r"state\.pth is read or written as something else"):
        one_file.main([str(folder), str(folder / "state.pth")])
    listed, saved = (folder / ".metadata").read_bytes(), load_safely(folder / "state.pth")
    (folder / ".metadata").write_bytes(pickle.dumps(os.system))
    with pytest.raises(CheckpointError, match=r"\.metadata is missing or damaged"):
        load_sharded(folder, None)

    def write(about: Any, said: str) -> None:
        (folder / ".metadata").write_bytes(pickle.dumps(about))
        found = hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest()  # whoever writes it can write this, too
        save_atomic({**saved, "files": {**saved["files"], ".metadata": found}}, folder / "state.pth")
        with pytest.raises(CheckpointError, match=said):
            load_sharded(folder, None)

    write(os.system, r"it names posix\.system, which no list of tensors does")
    about = pickle.loads(listed)
    next(iter(about.storage_data.values())).relative_path = "/etc/passwd"
    write(about, r"it reads /etc/passwd, which is no file of it")
    about = pickle.loads(listed)
    next(iter(about.state_dict_metadata.values())).chunks.clear()
    write(about, r"the parts of .* are not the whole")
    about = pickle.loads(listed)
    next(iter(about.storage_data.values())).length = 3
    write(about, r"last\.dcp: cannot be read")
    save_atomic({**saved, "files": 3}, folder / "state.pth")
    with pytest.raises(CheckpointError, match=r"state\.pth: expected the rest of a checkpoint"):
        load_sharded(folder, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_one_shard_on_cuda(amp: str, alone: World, tmp_path: Path) -> None:
    """Trained, saved and resumed: the losses of a run without --fsdp."""
    world = World(0, 1, 0, torch.device("cuda", 0), None)
    losses: dict[bool, list[float]] = {}
    for fsdp in (False, True):
        torch.manual_seed(0)
        model = tiny_transformer().eval().cuda()
        optimizer = OptimizerSettings(lr=0.01, model_ema=True, clip_grad=1.0)
        trainer = build_run(
            model, world, RunSettings(fsdp=fsdp, amp=amp, output_dir=str(tmp_path / str(fsdp))), optimizer=optimizer,
            schedule=None, epochs=2, train_mode=False, show_progress=False,
        )  # fmt: skip
        assert divided(model) == fsdp
        images = torch.randn(4, 8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        seen: list[float] = []

        def step(batch: Any, model: nn.Module = model, seen: list[float] = seen) -> dict[str, torch.Tensor]:
            loss = model(batch).float().square().mean()
            seen.append(loss.item())
            return {"loss": loss}

        trainer.fit(step, list(images))
        losses[fsdp] = seen
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    content = load_sharded(tmp_path / "True" / "last.dcp", None)
    assert content["epoch"] == 1

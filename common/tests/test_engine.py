import json
import logging
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common.data.loaders import eval_loader, train_loader
from common.run.build import build_average
from common.run.checkpoint import CheckpointManager, TrainingState, load_safely, save_atomic
from common.run.engine import (
    MOST_PENDING,
    Optimization,
    PendingTerms,
    StepInfo,
    TermReader,
    Trainer,
    count_images,
    evaluate,
    to_device,
)
from common.run.errors import DataError, NonFiniteLoss
from common.run.launch import World, launch
from common.run.metrics import Means, Record
from common.run.precision import amp_dtype, autocast, make_scaler
from common.run.program import run
from common.run.settings import OptimizerSettings
from common.run.wrapping import prepare_network
from common.tests.forks import run_forked, torchrun_variables
from common.tests.jobs import Images, tiny_model, training

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, None)
STEPS = 15  # three epochs of five
CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The record without what depends on the clock or on how often the run was started."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in found if row["event"] != "start"]


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, list[dict[str, Any]]]]:
    """Fingerprint and record of a run that nobody killed, by kind of schedule."""
    known: dict[str, tuple[str, list[dict[str, Any]]]] = {}

    def get(schedule_every: str = "epoch") -> tuple[str, list[dict[str, Any]]]:
        if schedule_every not in known:
            folder = tmp_path_factory.mktemp("whole")
            (ended,) = run_forked(lambda: training(folder, ALONE, schedule_every=schedule_every))
            assert ended.status == 0, ended.output
            known[schedule_every] = ended.result, rows(folder)
        return known[schedule_every]

    return get


def kill_and_resume(folder: Path, *, schedule_every: str = "epoch", kills: list[dict[str, int]], **options: Any) -> str:
    for kill in kills:
        (ended,) = run_forked(
            lambda kill=kill: training(folder, ALONE, schedule_every=schedule_every, **kill, **options)
        )
        assert ended.status == -signal.SIGKILL, ended.output
    (ended,) = run_forked(lambda: training(folder, ALONE, schedule_every=schedule_every, **options))
    assert ended.status == 0, ended.output
    return ended.result


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_and_resumed_is_bit_identical(tmp_path: Path, whole: Any, step: int) -> None:
    digest, record = whole()
    every = (None, 1, 2)[step % 3]  # saves after epochs only, after every step, after every second
    assert kill_and_resume(tmp_path, kills=[{"kill_after_step": step}], save_every_steps=every) == digest
    assert rows(tmp_path) == record


@pytest.mark.parametrize(
    "kills",
    [
        [{"kill_in_evaluation": 0}],
        [{"kill_in_evaluation": 2}],
        *([{"kill_in_save": number}] for number in range(1, 7)),
        [{"kill_after_step": 2}, {"kill_after_step": 4}, {"kill_in_save": 2}, {"kill_in_evaluation": 1}],
    ],
    ids=str,
)
def test_killed_while_evaluating_or_saving(tmp_path: Path, whole: Any, kills: list[dict[str, int]]) -> None:
    digest, record = whole()
    every = 2 if len(kills) > 1 else None
    assert kill_and_resume(tmp_path, kills=kills, save_every_steps=every) == digest
    assert rows(tmp_path) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "last.pth", "log.jsonl"]


def test_a_finished_run_says_that_nothing_is_left(tmp_path: Path) -> None:
    run_forked(lambda: training(tmp_path, ALONE))
    before = rows(tmp_path)
    (ended,) = run_forked(lambda: training(tmp_path, ALONE))
    assert ended.status == 0, ended.output
    assert "nothing is left to train" in ended.output
    assert rows(tmp_path) == before


def test_killed_with_a_schedule_per_step_and_loading_processes(tmp_path: Path, whole: Any) -> None:
    digest, record = whole("step")
    kills = [{"kill_after_step": 8}]
    assert kill_and_resume(tmp_path, schedule_every="step", kills=kills, save_every_steps=3, workers=1) == digest
    assert rows(tmp_path) == record
    assert digest != whole("epoch")[0]


def test_a_process_killed_from_outside_at_any_moment(tmp_path: Path, whole: Any) -> None:
    moments = iter([0.13, 0.07, 0.02])
    deadline = [math.inf]

    def some_time_after_the_first_checkpoint() -> bool:
        if deadline[0] == math.inf and (tmp_path / "last.pth").exists():
            deadline[0] = time.monotonic() + next(moments)
        return time.monotonic() > deadline[0]

    for _ in range(3):
        (ended,) = run_forked(
            lambda: training(tmp_path, ALONE, save_every_steps=1, pause_s=0.05),
            kill_when=some_time_after_the_first_checkpoint,
        )
        assert ended.status == -signal.SIGKILL, ended.output
        deadline[0] = math.inf
    assert 1 <= load_safely(tmp_path / "last.pth")["progress"]["step"] < STEPS
    (ended,) = run_forked(lambda: training(tmp_path, ALONE))
    assert (ended.result, rows(tmp_path)) == whole()


@pytest.mark.slow
def test_the_program_itself_killed_and_resumed(tmp_path: Path, whole: Any) -> None:
    command = [sys.executable, "-m", "common.tests.jobs", "train", "--device", "cpu", "--output-dir", str(tmp_path)]
    root = Path(__file__).parents[2]
    killed = subprocess.run([*command, "--save-every-steps", "2", "--kill-after-step", "7"], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["digest", whole()[0]]
    assert "resumed from" in done.stderr


def test_two_processes_killed_and_resumed(tmp_path: Path) -> None:
    def job(folder: Path, **options: Any) -> Callable[[], str]:
        return lambda: run(lambda: training(folder, launch("cpu", start_timeout_s=30), **options))

    reference = run_forked(job(tmp_path / "a"), torchrun_variables(2))
    assert [ended.status for ended in reference] == [0, 0], reference
    assert reference[0].result == reference[1].result  # batch norm's running averages included
    killed = run_forked(job(tmp_path / "b", kill_after_step=8, save_every_steps=3), torchrun_variables(2))
    assert all(ended.status != 0 for ended in killed)
    resumed = run_forked(job(tmp_path / "b"), torchrun_variables(2))
    assert resumed[0].result == reference[0].result
    assert rows(tmp_path / "b") == rows(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------------------
# The step


def train(step: Any, state: TrainingState, loader: Any, *, world: World, epochs: int, **options: Any) -> dict:
    """``Trainer(...).fit(...)`` in one call."""
    hooks = {name: options.pop(name) for name in ("evaluate_fn", "epoch_start", "after_step") if name in options}
    return Trainer(state, world, epochs, **options).fit(step, loader, **hooks)


def small_run(
    step_of: Callable[[nn.Module], Any], *, epochs: int = 1, lr: float = 0.1, **options: Any
) -> tuple[nn.Module, dict[str, float]]:
    """One run of a small linear model with a paper's step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=lr), ema=options.pop("ema", None))
    options.setdefault("loader", train_loader(Images(augment=False), batch_size=8))
    row = train(
        step_of(model), state, options.pop("loader"), world=ALONE, epochs=epochs, show_progress=False, **options
    )
    return model, row


def cross_entropy_step(model: nn.Module) -> Callable[[Any], dict[str, Tensor]]:
    return lambda batch: {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def test_a_run_is_resumed_with_the_data_that_it_began_with(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    manager = CheckpointManager(tmp_path, metric=None)

    class Stopped(Exception):
        pass

    def resumed(*, classes: tuple[str, ...] = Images.classes, images: int = 41, batch: int = 8, stop: int = 0) -> None:
        data = Images(augment=False)
        data.classes, data.labels = classes, data.labels[:images]
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
        state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        manager.resume(state)

        def step(pixels: Any) -> dict[str, Tensor]:
            if state.progress.step == stop:
                raise Stopped
            return cross_entropy_step(model)(pixels)

        loader = train_loader(data, batch_size=batch)
        options = {"manager": manager, "save_every_steps": 2, "show_progress": False}
        train(step, state, loader, world=ALONE, epochs=state.progress.epoch + 1, **options)

    with pytest.raises(Stopped):
        resumed(stop=3)
    last = manager.last.read_bytes()
    for changed in ({"images": 40}, {"batch": 4}):
        with pytest.raises(
            DataError, match=r"from within an epoch, whose order .* \((images 41 -> 40|batch size 8 -> 4)"
        ):
            resumed(**changed)
    resumed()
    resumed(images=40, batch=4)
    assert "the data changed since the checkpoint: images 41 -> 40" in caplog.text
    with pytest.raises(DataError, match=r"class 1 named 'b', which these data name 'd' \(4 classes before, 4 now\)"):
        resumed(classes=("a", "d", "e", "f"))
    manager.last.write_bytes(last)
    content = {key: value for key, value in load_safely(manager.last).items() if key != "data"}
    save_atomic(content, manager.last)
    resumed(images=40)  # of an earlier version, whose checkpoints do not say


def two_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    images, targets = batch
    return F.cross_entropy(model(images), targets), 0.5 * F.cross_entropy(model(images.flip(3)), targets)


def test_several_backward_passes_equal_their_sum() -> None:
    """Scala's step: the gradients of all passes add up, then one optimizer step."""

    def at_once(model: nn.Module) -> Callable[[Any], dict[str, Tensor]]:
        def step(batch: Any) -> dict[str, Tensor]:
            one, two = two_losses(model, batch)
            return {"loss": one + two, "one": one, "two": two}

        return step

    def apart(model: nn.Module) -> Callable[[Any, Optimization], dict[str, Tensor]]:
        def step(batch: Any, optimization: Optimization) -> dict[str, Tensor]:
            one, two = two_losses(model, batch)
            optimization.backward(one)
            optimization.backward(two)
            return {"loss": (one + two).detach(), "one": one.detach(), "two": two.detach()}

        return step

    first, first_row = small_run(at_once, epochs=2, clip_grad=0.5)
    second, second_row = small_run(apart, epochs=2, clip_grad=0.5, own_backward=True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert first_row["train_loss"] == pytest.approx(first_row["train_one"] + first_row["train_two"])
    assert second_row["train_loss"] == pytest.approx(first_row["train_loss"])


def gradients_of_two_passes(postpone: bool) -> list[Tensor]:
    world = launch("cpu", start_timeout_s=30)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    network = prepare_network(model, world)
    optimization = Optimization(torch.optim.SGD(model.parameters(), lr=1.0), network=network)
    images = torch.randn(4, 3) + world.rank
    if postpone:
        with optimization.no_sync():
            optimization.backward(network(images).square().mean())
    else:
        optimization.backward(network(images).square().mean())
    optimization.backward(network(2 * images).abs().mean())
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_gradients_may_be_exchanged_at_the_last_pass_only() -> None:
    each = run_forked(lambda: run(lambda: gradients_of_two_passes(False)), torchrun_variables(2))
    last = run_forked(lambda: run(lambda: gradients_of_two_passes(True)), torchrun_variables(2))
    assert all(ended.status == 0 for ended in (*each, *last)), (each, last)
    for ended in (*last, each[1]):
        for a, b in zip(ended.result, each[0].result, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_order_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped gradients, then the optimizer, then the schedule, then the paper's update, then the average."""
    seen: list[str] = []
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ema = ModelEmaV3(model, decay=0.5)
    start = model.weight.detach().clone()

    def step(batch: list[Tensor]) -> dict[str, Tensor]:
        assert model.weight.grad is None
        return {"loss": 100 * model(batch[0]).sum()}

    def after_step(info: StepInfo) -> dict[str, float]:
        assert model.weight.grad is not None
        assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-4)  # clipped
        torch.testing.assert_close(model.weight, start - model.weight.grad)  # stepped at the rate before
        assert info == StepInfo(epoch=0, batch=0, step=1, learning_rates=(0.5,))
        seen.append("after")
        with torch.no_grad():
            model.weight.zero_()
        return {"budget": 7.0}

    row = train(
        step, TrainingState(model, optimizer, scheduler, ema=ema), [[torch.ones(1, 2), torch.zeros(1)]], world=ALONE,
        epochs=1, clip_grad=1.0, schedule_every="step", after_step=after_step, show_progress=False,
        epoch_start=lambda epoch: seen.append(f"e{epoch}"),
    )  # fmt: skip
    assert seen == ["e0", "after"]
    assert row["train_budget"] == 7.0
    torch.testing.assert_close(ema.module.weight, start / 2)  # pyright: ignore[reportArgumentType]


def test_rates_by_hand_and_by_epoch() -> None:
    """SiT sets its two rates at the start of an epoch; timm's schedulers move after it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    groups = [{"params": [model[1].weight], "name": "rtsm"}, {"params": [model[1].bias], "name": "backbone"}]
    optimizer = torch.optim.SGD(groups, lr=0.1)

    def epoch_start(epoch: int) -> None:
        for group, factor in zip(optimizer.param_groups, (5, 1), strict=True):
            group["lr"] = factor * 0.1 / (epoch + 1)

    loader = train_loader(Images(augment=False), batch_size=8)
    state = TrainingState(model, optimizer)
    row = train(
        cross_entropy_step(model), state, loader, world=ALONE, epochs=2, epoch_start=epoch_start, show_progress=False
    )
    assert (row["train_lr"], row["train_lr_1"]) == (0.25, 0.05)
    assert state.progress.epoch == 2
    assert train(cross_entropy_step(model), state, loader, world=ALONE, epochs=2) == {}


def test_the_number_of_epochs_with_the_cooldown_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    _, row = small_run(cross_entropy_step, epochs=3, cooldown_epochs=2)
    assert row["epoch"] == 2
    assert "3 epochs in all: 1 and 2 of cooldown" in caplog.text


def test_last_row_has_means_over_all_pictures(tmp_path: Path) -> None:
    values = iter([1.0, 2.0, 6.0])
    loader = [[torch.ones(size, 3, 6, 6), torch.zeros(size, dtype=torch.long)] for size in (4, 4, 2)]

    def step_of(model: nn.Module) -> Any:
        return lambda batch: {"loss": 0 * model(batch[0]).sum() + next(values)}

    record = Record(tmp_path / "log.jsonl")
    _, row = small_run(step_of, loader=loader, record=record, log_every_steps=2)
    assert row["train_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 6) / 10)
    assert row["train_images"] == 10
    events = [json.loads(line) for line in record.path.read_text().splitlines()]  # pyright: ignore[reportOptionalMemberAccess]
    assert [event["event"] for event in events] == ["start", "step", "epoch"]
    assert events[1]["train_loss"] == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


@pytest.mark.parametrize("own_backward", [False, True])
def test_non_finite_loss_stops_before_the_weights_change(tmp_path: Path, own_backward: bool) -> None:
    manager = CheckpointManager(tmp_path, metric=None)
    kept: dict[str, Tensor] = {}
    calls = [0]

    def step_of(model: nn.Module) -> Any:
        def step(batch: Any, *_: Any) -> dict[str, Tensor]:
            calls[0] += 1
            loss = F.cross_entropy(model(batch[0]), batch[1])
            if calls[0] == 7:
                kept.update({key: value.clone() for key, value in model.state_dict().items()})
                kept["model"] = model  # pyright: ignore[reportArgumentType]
                return {"loss": loss * math.inf, "token": torch.tensor(0.25), "logits": loss * math.nan}
            if own_backward:
                _[0].backward(loss)
            return {"loss": loss}

        return step

    with pytest.raises(NonFiniteLoss) as caught:
        small_run(step_of, epochs=3, manager=manager, save_every_steps=1, own_backward=own_backward)
    text = str(caught.value)
    assert re.search(r"epoch 1, step 7: loss = inf, token = 0\.25, logits = nan", text)
    model: Any = kept.pop("model")
    assert all(torch.equal(model.state_dict()[key], kept[key]) for key in kept)
    saved = load_safely(manager.last)
    assert saved["progress"]["step"] == 6
    assert all(torch.equal(saved["model"][key], kept[key]) for key in kept)


class Late:
    """A CUDA event that is never ready by itself."""

    waited = 0

    def query(self) -> bool:
        return self.waited > 0

    def synchronize(self) -> None:
        self.waited += 1


def test_late_rows_are_looked_at_before_a_checkpoint() -> None:
    """On CUDA rows arrive late: too many of them, or a checkpoint, are waited for."""
    reader = TermReader(Means())
    events = [Late() for _ in range(MOST_PENDING)]
    for step, event in enumerate(events):
        row: Any = event
        reader.pending.append(PendingTerms(2, step, ("loss",), torch.tensor([1.0]), 2, row))
    reader.add(2, 20, {"loss": torch.tensor(4.0)}, 2)
    assert [event.waited for event in events] == [1] + [0] * (MOST_PENDING - 1)
    reader.flush()
    assert all(event.waited == 1 for event in events)
    assert reader.means.reduce() == {"loss": (MOST_PENDING + 4) / (MOST_PENDING + 1)}
    bad: Any = Late()
    reader.pending.append(PendingTerms(2, 40, ("loss", "token"), torch.tensor([math.nan, 0.5]), 2, bad))
    with pytest.raises(NonFiniteLoss, match=r"epoch 2, step 40: loss = nan, token = 0\.5"):
        reader.flush()


def test_a_step_must_name_its_loss() -> None:
    with pytest.raises(KeyError, match="'loss'"):
        small_run(lambda model: lambda batch: {"total": model(batch[0]).sum()})


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that cannot work


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--save-every-steps"):
        small_run(cross_entropy_step, save_every_steps=1)
    with pytest.raises(ValueError, match="can start there"):
        small_run(cross_entropy_step, save_every_steps=1, loader=[], manager=CheckpointManager(tmp_path))
    with pytest.raises(ValueError, match="no batch"):
        small_run(cross_entropy_step, loader=[])
    with pytest.raises(ValueError, match="--clip-grad must be positive"):
        small_run(cross_entropy_step, clip_grad=0.0)
    with pytest.raises(ValueError, match="--amp fp16 needs a CUDA device"):
        small_run(cross_entropy_step, amp="fp16")
    with pytest.raises(ValueError, match="--amp must be one of none, fp16, bf16"):
        amp_dtype("fp8", CPU)


def test_mixed_precision_on_the_cpu() -> None:
    dtypes: list[torch.dtype] = []

    def step_of(model: nn.Module) -> Any:
        def step(batch: Any) -> dict[str, Tensor]:
            logits = model(batch[0])
            dtypes.append(logits.dtype)
            return {"loss": F.cross_entropy(logits, batch[1])}

        return step

    model, row = small_run(step_of, amp="bf16")
    assert set(dtypes) == {torch.bfloat16}
    assert next(model.parameters()).dtype == torch.float32
    assert math.isfinite(row["train_loss"])
    assert not make_scaler("bf16", CPU).is_enabled()
    with autocast("none", CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_batches_of_any_structure() -> None:
    batch = {"images": [torch.ones(3, 2), (torch.ones(1), "name")]}
    assert count_images(batch) == 3
    moved = to_device(batch, torch.device("meta"))
    assert moved["images"][0].is_meta
    assert moved["images"][1][0].is_meta
    assert moved["images"][1][1] == "name"


@pytest.mark.slow
def test_compiled_training_is_the_same_state(tmp_path: Path) -> None:
    """torch.compile changes no name in the checkpoint; eager's backend stands for the slow compiler."""
    model = tiny_model()
    network = torch.compile(model, backend="eager")
    state = TrainingState(network, torch.optim.SGD(model.parameters(), lr=0.1))  # pyright: ignore[reportArgumentType]
    manager = CheckpointManager(tmp_path, metric=None)
    step = cross_entropy_step(network)  # pyright: ignore[reportArgumentType]
    loader = train_loader(Images(augment=False), batch_size=8)
    train(step, state, loader, world=ALONE, epochs=1, network=network, manager=manager, show_progress=False)  # pyright: ignore[reportArgumentType]
    assert load_safely(manager.last)["model"].keys() == model.state_dict().keys()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def numbers(pictures: int, size: int) -> dict[str, float]:
    world = launch("cpu", start_timeout_s=30)
    torch.manual_seed(1)
    network = prepare_network(tiny_model(), world)
    dataset = torch.utils.data.Subset(Images(augment=False), range(pictures))
    return evaluate(network, eval_loader(dataset, batch_size=size), device=CPU, show_progress=False)


@pytest.mark.parametrize(("pictures", "size"), [(41, 8), (1, 8)])
def test_two_processes_count_every_picture_once(pictures: int, size: int) -> None:
    (alone,) = run_forked(lambda: numbers(pictures, size))
    both = run_forked(lambda: run(lambda: numbers(pictures, size)), torchrun_variables(2))
    assert [ended.status for ended in (alone, *both)] == [0, 0, 0], (alone, both)
    assert alone.result["images"] == pictures
    for ended in both:
        assert ended.result["loss"] == pytest.approx(alone.result["loss"], rel=1e-6)
        for key in ("top1_percent", "top5_percent", "images", "skipped"):
            assert ended.result[key] == alone.result[key]


def exchanged() -> bool:
    """Whether a forward pass gives this rank the buffers of rank 0."""
    world = launch("cpu", start_timeout_s=30)
    model = nn.BatchNorm1d(2)
    network = prepare_network(model, world, broadcast_buffers=False)
    buffer = model.get_buffer("running_mean").fill_(world.rank)
    network(torch.zeros(4, 2))
    return float(buffer[0]) == 0


def test_buffers_stay_where_no_exchange_is_wanted() -> None:
    ranks = run_forked(lambda: run(exchanged), torchrun_variables(2))
    assert [ended.status for ended in ranks] == [0, 0], ranks
    assert not ranks[1].result


def average_at_first() -> list[float]:
    """Of a network that each rank initialises by a seed of its own; its weight is not contiguous."""
    world = launch("cpu", start_timeout_s=30)
    torch.manual_seed(world.rank)
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(torch.randn(2, 3).t())
    average = build_average(model, OptimizerSettings(lr=1, model_ema=True))
    assert average is not None
    return average.module.get_parameter("weight").flatten().tolist()


def test_the_average_begins_alike_on_all_ranks() -> None:
    ranks = run_forked(lambda: run(average_at_first), torchrun_variables(2))
    assert [ended.status for ended in ranks] == [0, 0], ranks
    assert ranks[0].result == ranks[1].result


class Fixed(nn.Module):
    """Gives stored logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def indexed_loader(labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1)
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]


def test_accuracy_and_loss_by_hand() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(23, 7), torch.randint(0, 7, (23,))
    model = Fixed(logits).train()
    result = evaluate(model, indexed_loader(labels, 5), device=CPU, show_progress=False)
    order = logits.argsort(dim=1, descending=True)
    assert result["top1_percent"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    expected = 100 * sum(label in row[:5] for label, row in zip(labels.tolist(), order.tolist(), strict=True)) / 23
    assert result["top5_percent"] == pytest.approx(expected)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    means = [
        F.cross_entropy(part, wanted).item() for part, wanted in zip(logits.split(5), labels.split(5), strict=True)
    ]
    assert result["batch_loss"] == pytest.approx(sum(means) / 5, rel=1e-6)
    assert (result["images"], result["skipped"]) == (23, 0)
    assert model.training
    for size in (1, 23):
        again = evaluate(model, indexed_loader(labels, size), device=CPU, show_progress=False)
        assert again["top1_percent"] == result["top1_percent"]


def test_fewer_than_five_classes() -> None:
    logits, labels = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0, 0])
    result = evaluate(Fixed(logits), indexed_loader(labels, 2), device=CPU, show_progress=False)
    assert (result["top1_percent"], result["top5_percent"]) == (pytest.approx(200 / 3), 100.0)


def test_evaluation_names_what_is_wrong() -> None:
    labels = torch.tensor([1, 9])
    model = Fixed(torch.randn(2, 7))
    with pytest.raises(ValueError, match="label 9, the model only 7 classes"):
        evaluate(model, indexed_loader(labels, 2), device=CPU, show_progress=False)
    with pytest.raises(TypeError, match=r"class logits \(B, C\), the model gave \[2, 7, 1\]"):
        evaluate(Fixed(torch.randn(2, 7, 1)), indexed_loader(labels, 2), device=CPU, show_progress=False)
    with pytest.raises(ValueError, match="no image"):
        evaluate(model, [], device=CPU)


def test_skipped_pictures_are_counted() -> None:
    class Skipping(list[tuple[Tensor, Tensor]]):
        skipped = 3

    loader = Skipping(indexed_loader(torch.tensor([0, 1]), 2))
    result = evaluate(Fixed(torch.eye(2)), loader, device=CPU, show_progress=False)
    assert (result["images"], result["skipped"], result["top1_percent"]) == (2, 3, 100.0)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@CUDA_ONLY
@pytest.mark.parametrize("amp", ["none", "fp16", "bf16"])
def test_training_and_evaluation_on_cuda(tmp_path: Path, amp: str) -> None:
    world = World(0, 1, 0, torch.device("cuda", 0), None)
    torch.manual_seed(0)
    model = tiny_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = TrainingState(
        model, optimizer, scaler=make_scaler(amp, world.device), ema=ModelEmaV3(model), device=world.device
    )
    manager = CheckpointManager(tmp_path)
    validation = eval_loader(Images(augment=False), batch_size=16)
    row = train(
        cross_entropy_step(model), state, train_loader(Images(augment=True), batch_size=8), world=world, epochs=20,
        amp=amp, clip_grad=1.0, manager=manager, save_every_steps=3, show_progress=False,
        evaluate_fn=lambda: evaluate(model, validation, device=world.device, amp=amp, show_progress=False),
    )  # fmt: skip
    assert row["test_top1_percent"] > 60
    again = TrainingState(
        tiny_model().cuda(), torch.optim.AdamW(model.parameters()), scaler=make_scaler(amp, world.device),
        ema=ModelEmaV3(model), device=world.device,
    )  # fmt: skip
    again.optimizer = torch.optim.AdamW(again.model.parameters())
    manager.resume(again)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), model.parameters(), strict=True))
    assert again.resumed_random is not None
    assert torch.equal(again.resumed_random["cuda"], torch.cuda.get_rng_state(world.device))


@pytest.mark.gpu
@CUDA_ONLY
def test_non_finite_loss_on_cuda_writes_no_checkpoint(tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cuda", 0), None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).cuda()
    calls = [0]

    def step(batch: Any) -> dict[str, Tensor]:
        calls[0] += 1
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return {"loss": loss * (math.nan if calls[0] == 4 else 1)}

    manager = CheckpointManager(tmp_path, metric=None)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), device=world.device)
    with pytest.raises(NonFiniteLoss, match="epoch 0, step 4"):
        train(
            step, state, train_loader(Images(augment=False), batch_size=8), world=world, epochs=1, manager=manager,
            save_every_steps=3, show_progress=False,
        )  # fmt: skip
    assert load_safely(manager.last)["progress"]["step"] == 3

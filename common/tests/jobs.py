"""Small jobs that the tests of launch, engine and checkpoints run in processes of their own.

python -m common.tests.jobs {train,evaluate,fail,place} [flags]
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.loaders import eval_loader, train_loader
from common.run.build import build_average, build_optimizer, build_run, build_schedule
from common.run.cli import add_runtime_args, make_parser
from common.run.engine import StepInfo, evaluate
from common.run.launch import World, launch, reduce_sums, seed_everything
from common.run.program import run
from common.run.settings import OptimizerSettings, RunSettings, ScheduleSettings

EPOCHS = 3


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """41 pictures of 4 classes, augmented with random numbers of all three generators."""

    classes = ("a", "b", "c", "d")

    def __init__(self, augment: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.randint(0, 4, (41,), generator=generator).tolist()
        self.images = torch.randn(41, 3, 6, 6, generator=generator)
        for image, label in zip(self.images, self.labels, strict=True):
            image[0, label] += 2
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augment:
            image = image + 0.1 * torch.randn(image.shape) + random.uniform(0, 0.1) + 0.1 * np.random.rand()
        return image, self.labels[index]


def tiny_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(96, 4)
    )


def tiny_transformer() -> nn.Module:
    """With blocks, dropout, running averages, and dimensions that two processes cannot share evenly."""
    blocks = nn.ModuleDict(
        {str(index): nn.Sequential(nn.Linear(9, 9), nn.GELU(), nn.Dropout(0.3)) for index in range(2)}
    )
    layers = {"stem": nn.Conv2d(3, 9, 6), "norm": nn.BatchNorm2d(9), "flat": nn.Flatten()}
    return BlockNetwork(nn.ModuleDict(layers), blocks, nn.Linear(9, 4))


class BlockNetwork(nn.Module):
    def __init__(self, layers: nn.ModuleDict, blocks: nn.ModuleDict, head: nn.Module) -> None:
        super().__init__()
        self.layers, self.blocks, self.head = layers, blocks, head

    def forward(self, x: Tensor) -> Tensor:
        for part in (*self.layers.values(), *self.blocks.values(), self.head):
            x = part(x)
        return x


class Duals:
    """State of a paper's own, updated after every step."""

    def __init__(self) -> None:
        self.value = torch.zeros(2)

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value = state["value"].clone()


def digest(*parts: object) -> str:
    """Fingerprint of nested state, bit for bit; of what is divided among the ranks, the whole."""
    sha = hashlib.sha256()

    def feed(part: Any) -> None:
        if hasattr(part, "full_tensor"):
            part = part.full_tensor()
        if isinstance(part, Tensor):
            sha.update(part.detach().contiguous().numpy().tobytes())
        elif isinstance(part, dict):
            for key, value in part.items():
                sha.update(str(key).encode())
                feed(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                feed(value)
        else:
            sha.update(repr(part).encode())

    feed(parts)
    return sha.hexdigest()


def training(
    folder: Path,
    world: World,
    *,
    kill_after_step: int | None = None,
    kill_in_evaluation: int | None = None,
    kill_in_save: int | None = None,
    save_every_steps: int | None = None,
    schedule_every: str = "epoch",
    workers: int = 0,
    pause_s: float = 0.0,
    compiled: bool = False,
    fsdp: bool = False,
) -> str:
    """Train the tiny model for three epochs of five steps, resuming from ``folder`` if it holds a state.

    Returns:
        Fingerprint of weights, average, optimiser and duals.
    """
    seed_everything(0, world.rank)
    torch.manual_seed(0)  # the same weights on every rank
    model = (tiny_transformer() if fsdp else tiny_model()).to(world.device)
    seed_everything(0, world.rank)
    settings = OptimizerSettings(lr=1e-2, clip_grad=1.0, model_ema=True, model_ema_decay=0.9)
    optimizer = build_optimizer(model, settings)
    schedule, _ = build_schedule(optimizer, ScheduleSettings(EPOCHS, warmup_epochs=1, cooldown_epochs=0))
    if schedule_every == "step":
        optimizer = build_optimizer(model, settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema, duals = build_average(model, settings), Duals()
    assert ema is not None
    if kill_in_save is not None:
        arm_replace(kill_in_save) if fsdp else arm_save(kill_in_save)
    trainer = build_run(
        model, world, RunSettings(compile=compiled, fsdp=fsdp, output_dir=str(folder), resume="auto",
                                  save_every_steps=save_every_steps),
        optimizer=optimizer, schedule=schedule, epochs=EPOCHS, average=ema, clip_grad=1.0, arguments={"seed": 0},
        extra={"duals": duals}, schedule_every=schedule_every, show_progress=False,
    )  # fmt: skip
    state, network = trainer.state, trainer.network
    validation = eval_loader(Images(augment=False), batch_size=8)

    def step(batch: list[Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        ratio = np.random.beta(0.8, 0.8)  # what timm's mixup draws
        logits = network(ratio * images + (1 - ratio) * images.flip(0))
        one = F.cross_entropy(logits, targets)
        two = F.cross_entropy(logits, targets.flip(0))
        return {"loss": ratio * one + (1 - ratio) * two, "one": one, "two": two}

    def after_step(info: StepInfo) -> dict[str, float]:
        update = random.random() * torch.rand(2)
        duals.value += reduce_sums(update if world.is_main else torch.zeros(2))  # rank 0 decides
        if info.step == kill_after_step:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause_s)
        return {"dual": duals.value[0].item()}

    def evaluation() -> dict[str, float]:
        random.random()  # an evaluation may draw numbers too
        if state.progress.epoch == kill_in_evaluation:
            os.kill(os.getpid(), signal.SIGKILL)
        average = evaluate(ema.module, validation, device=world.device, show_progress=False)
        result = evaluate(model, validation, device=world.device, show_progress=False)
        return {**result, "ema_loss": average["loss"]}

    loader = train_loader(Images(augment=True), batch_size=8 // world.size, workers=workers)
    trainer.fit(step, loader, evaluate_fn=evaluation, after_step=after_step)
    return digest(model.state_dict(), ema.module.state_dict(), optimizer.state_dict(), duals.value)


def arm_save(number: int) -> None:
    """Die in the middle of the ``number``-th checkpoint: half of its bytes are written, under the temporary name."""
    original, calls = torch.save, iter(range(1, 1000))

    def save(content: object, file: object) -> None:
        original(content, file)  # pyright: ignore[reportArgumentType]
        if next(calls) == number:
            file.truncate(file.tell() // 2)  # pyright: ignore[reportAttributeAccessIssue]
            file.flush()  # pyright: ignore[reportAttributeAccessIssue]
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save  # this process only


def arm_replace(number: int) -> None:
    """Die while the ``number``-th folder takes the place of an older one, which has lost its name already."""
    original, calls = Path.rename, iter(range(1, 1000))

    def rename(self: Path, target: Path) -> Path:
        moved = original(self, target)
        if target.name.endswith(".old") and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.rename = rename  # this process only


def job_train(args: argparse.Namespace, world: World) -> None:
    result = training(
        Path(args.output_dir),
        world,
        save_every_steps=args.save_every_steps,
        kill_after_step=args.kill_after_step,
        pause_s=args.pause,
        compiled=args.compile,
    )
    if world.is_main:
        print(f"digest {result}", flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("job", choices=("train",))
    parser.add_argument("--kill-after-step", type=int)
    parser.add_argument("--pause", type=float, default=0.0)
    add_runtime_args(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = launch(args.device, local_rank=args.local_rank, start_timeout_s=60)
    job_train(args, world)


if __name__ == "__main__":
    sys.exit(run(main))

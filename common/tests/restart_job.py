"""A small training that ``test_restarts`` gives to torchrun; it imports no timm, so that many processes start quickly.

Three epochs of five steps, resumed from the last state in the folder.
"""

import argparse
import hashlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.run.checkpoint import CheckpointManager, TrainingState
from common.run.engine import StepInfo, Trainer
from common.run.launch import World, launch, seed_everything
from common.run.program import run
from common.run.wrapping import prepare_network

AGENT = -1  # takes the one that started the process with VICTIM in its environment


class Batches:
    """Forty vectors of four classes in an order of each epoch; every rank gets its share of a batch of eight."""

    def __init__(self, world: World) -> None:
        generator = torch.Generator().manual_seed(5)
        self.vectors = torch.randn(40, 12, generator=generator)
        self.labels = torch.randint(0, 4, (40,), generator=generator)
        self.world, self.epoch, self.done = world, 0, 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).view(5, 8)
        for batch in order[self.done :]:
            self.done += 1
            own = batch[self.world.rank :: self.world.size]
            yield self.vectors[own] + 0.1 * torch.randn(len(own), 12) + random.random(), self.labels[own]

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


def train(folder: Path, save_every_steps: int | None, kill: tuple[int, int] | None) -> None:
    """Train, and print the weights' fingerprint.

    Args:
        folder: of the states.
        save_every_steps: also save within epochs.
        kill: the rank that dies in the first attempt, or ``AGENT``, and after which step.
    """
    world = launch("cpu", start_timeout_s=60)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    print(f"attempt {attempt}: rank {world.rank} of {world.size}", flush=True)
    seed_everything(0, 0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))
    seed_everything(0, world.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = TrainingState(model, optimizer, schedule)
    manager = CheckpointManager(folder, metric=None)
    manager.lock()
    manager.resume(state)
    network = prepare_network(model, world)

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(network(batch[0]), batch[1])}

    def after_step(info: StepInfo) -> None:
        if attempt or not kill or info.step != kill[1]:
            return
        if kill[0] == world.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if kill[0] == AGENT and "VICTIM" in os.environ:
            os.kill(os.getppid(), signal.SIGKILL)  # which takes this process along
            signal.pause()

    trainer = Trainer(
        state, world, epochs=3, network=network, schedule_every="step", manager=manager,
        save_every_steps=save_every_steps, show_progress=False,
    )  # fmt: skip
    trainer.fit(step, Batches(world), after_step=after_step)
    if world.is_main:
        content = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        print(f"digest {hashlib.sha256(content).hexdigest()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save-every-steps", type=int)
    parser.add_argument("--kill", type=int, nargs=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.folder, args.save_every_steps, args.kill)


if __name__ == "__main__":
    run(main)

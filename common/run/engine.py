"""The loop of epochs around a paper's training step, and evaluation.

A paper writes ``step(batch) -> {"loss": ..., further terms}``; autocast, scaling, backward, clipping, optimizer step,
schedule, averaging, logging and checkpoints happen here, in this order::

    zero gradients -> step under autocast -> stop if the loss is not finite -> backward -> unscale, clip
        -> optimizer step -> schedule -> after_step (a paper's own update) -> average of the weights

A step with several backward passes sets ``own_backward=True`` and calls ``optimization.backward(loss)`` itself, as
often as it likes; the gradients add up and the optimizer steps once, under one loss scale.

A run that is killed at any step and resumed continues bit for bit on the CPU: the state is written whole, holds every
generator, and the hooks below are called exactly once each in the life of a run.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import length_hint
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from common.run.checkpoint import CheckpointManager, TrainingState
from common.run.errors import DataError, NonFiniteLoss, NotNumbers, UsageError
from common.run.launch import World, broadcast_buffers, reduce_sums
from common.run.metrics import Means, ProgressLine, Record, values_text
from common.run.precision import autocast, make_scaler, without_autocast
from common.run.program import get_logger
from common.run.wrapping import divided, gathered, no_sync, without_exchange

logger = get_logger(__name__)

MOST_PENDING = 16  # rows of loss terms that may be on their way from the GPU before one is waited for

UNDIVIDED = re.compile(r"DTensor|placement|sharded|input\.numel\(\) == 0")
"""What torch says of an operation that divided weights cannot take, or an empty part of them."""

Terms = Mapping[str, Tensor]
Batch = Any


Step = Callable[[Batch], Terms]
"""Loss terms of a batch, scalar tensors by name; ``loss`` is the one that is back-propagated."""
OwnBackwardStep = Callable[[Batch, "Optimization"], Terms]
"""Back-propagates by itself through ``optimization.backward``; ``loss`` among its terms is the total."""


@dataclass(frozen=True)
class StepInfo:
    """Where a run is, after an optimizer step. ``epoch`` and ``batch`` count from 0, ``step`` from 1."""

    epoch: int
    batch: int
    step: int
    learning_rates: tuple[float, ...]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch, in lists, tuples and dicts too, on ``device``."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def count_images(batch: Batch) -> int:
    """Images in a batch: the length of its first tensor."""
    return next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)).shape[0]


@dataclass
class Optimization:
    """The optimizer with its loss scale, clipping and gradient exchange, for steps that back-propagate by themselves.

    Args:
        optimizer: its parameters are the ones clipped.
        scaler: from :func:`make_scaler`; by default of full precision.
        clip_grad: largest L2 norm of all gradients together, taken after unscaling; None leaves them.
        network: what the step calls; needed by :meth:`no_sync` only.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    clip_grad: float | None = None
    network: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"--clip-grad must be positive, or left out, got {self.clip_grad}")

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, times the loss scale, to those that are there."""
        with without_autocast(loss):
            self.scaler.scale(loss).backward()

    def no_sync(self) -> AbstractContextManager[None]:
        """Forward and backward passes in here exchange no gradients between ranks; the next one outside does for all.

        Put all but the last pass of a step in it: the gradients are the same for a fraction of the traffic.
        """
        return no_sync(self.network)

    def step(self) -> None:
        """Unscale, clip, step, and adapt the loss scale; an overflow under fp16 skips the step.

        Raises:
            UsageError: an optimizer that cannot work on weights that are divided among the ranks.
        """
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        try:
            self.scaler.step(self.optimizer)
        except (AssertionError, RuntimeError) as error:
            if self.network is not None and divided(self.network) and (not str(error) or UNDIVIDED.search(str(error))):
                name = type(self.optimizer).__name__
                raise UsageError(
                    f"{name} cannot work on weights that --fsdp divides ({error or 'an assertion of its own'}): take "
                    "another --opt, such as adamw, lamb or sgd"
                ) from error
            raise
        self.scaler.update()


# ---------------------------------------------------------------------------------------------------------------------
# Loss terms


@dataclass
class PendingTerms:
    """The terms of one step on their way to the host; ``event`` is None where they are there."""

    epoch: int
    step: int
    names: tuple[str, ...]
    values: Tensor
    images: int
    event: torch.cuda.Event | None


class TermReader:
    """Reads every step's loss terms without stopping the GPU, and stops the run when a loss is not finite.

    On the CPU a row is looked at before the optimizer steps. On CUDA its copy to the host is awaited by nobody: rows
    are looked at when they have arrived, all of them in :meth:`flush`, which precedes every checkpoint.
    """

    def __init__(self, means: Means) -> None:
        self.means = means
        self.latest: dict[str, float] = {}
        self.extra: dict[str, float] = {}
        self.pending: deque[PendingTerms] = deque()

    def add(self, epoch: int, step: int, terms: Terms, images: int) -> None:
        """Take the terms of one step.

        Raises:
            NonFiniteLoss: of this step on the CPU, of an earlier one on CUDA.
        """
        if "loss" not in terms:
            raise KeyError(f"the training step must return its total under 'loss', got {sorted(terms)}")
        names = tuple(terms)
        values = torch.stack([torch.as_tensor(terms[name]).detach().float().reshape(()) for name in names])
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append(PendingTerms(epoch, step, names, values, images, event))
        self._read(wait=False)

    def add_extra(self, values: Mapping[str, float], images: int) -> None:
        """Numbers of a paper's own update, logged next to the terms."""
        self.extra = {name: float(value) for name, value in values.items()}
        self.means.add(self.extra, images)

    def shown(self) -> dict[str, float]:
        """The latest known values."""
        return {**self.latest, **self.extra}

    def flush(self) -> None:
        """Wait for all rows and look at them; a checkpoint may be written only after this."""
        self._read(wait=True)

    def _read(self, *, wait: bool) -> None:
        while self.pending:
            row = self.pending[0]
            if row.event is not None and (wait or len(self.pending) > MOST_PENDING):
                row.event.synchronize()
            elif row.event is not None and not row.event.query():
                return
            self._look(self.pending.popleft())

    def _look(self, row: PendingTerms) -> None:
        values = dict(zip(row.names, row.values.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            terms = ", ".join(f"{name} = {value:.6g}" for name, value in values.items())
            raise NonFiniteLoss(
                f"the loss is not finite at epoch {row.epoch}, step {row.step}: {terms}. The last checkpoint is from "
                "before; a lower --lr, --clip-grad 1, or --amp bf16 or none usually helps"
            )
        self.latest = values
        self.means.add(values, row.images)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Trainer:
    """A training run: what is trained, for how long, and what is kept of it.

    Args:
        state: model, optimizer and the rest, new or resumed; ``scheduler`` may be timm's or torch's.
        world: this process's place.
        epochs: in total, those done before and ``cooldown_epochs`` included.
        network: what the step calls (see ``common.run.wrapping``); the state's model by default.
        amp, clip_grad: values of ``--amp`` and ``--clip-grad``.
        own_backward: the step takes (batch, optimization) and back-propagates by itself.
        train_mode: what ``network.train()`` is given.
        schedule_every: when the scheduler advances. A rate set by hand belongs in ``epoch_start``.
        manager: writes checkpoints; None keeps none.
        record: gets a row per epoch, and per ``log_every_steps`` steps.
        save_every_steps: also write a checkpoint within epochs, every so many optimizer steps.
        show_progress: print the progress line.

    Raises:
        ValueError: values that do not go together.
    """

    state: TrainingState
    world: World
    epochs: int
    network: nn.Module | None = None
    amp: str = "none"
    clip_grad: float | None = None
    own_backward: bool = False
    train_mode: bool = True
    schedule_every: Literal["epoch", "step"] = "epoch"
    cooldown_epochs: int = 0
    manager: CheckpointManager | None = None
    record: Record | None = None
    save_every_steps: int | None = None
    log_every_steps: int | None = None
    show_progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.state.optimizer, torch.optim.Optimizer):
            raise TypeError("training needs an optimizer in the state")
        if self.save_every_steps is not None and (self.save_every_steps < 1 or self.manager is None):
            raise UsageError("--save-every-steps must be at least 1 and needs --output-dir")
        if self.state.scaler is None:
            self.state.scaler = make_scaler(self.amp, self.world.device)
        assert isinstance(self.state.scaler, torch.amp.GradScaler)
        self.network = self.network if self.network is not None else self.state.model
        self.optimization = Optimization(self.state.optimizer, self.state.scaler, self.clip_grad, self.network)

    def fit(
        self,
        step: Step | OwnBackwardStep,
        loader: Iterable[Batch],
        *,
        evaluate_fn: Callable[[], Mapping[str, float]] | None = None,
        epoch_start: Callable[[int], None] | None = None,
        after_step: Callable[[StepInfo], Mapping[str, float] | None] | None = None,
    ) -> dict[str, float]:
        """Run the epochs that the state has not done yet.

        Args:
            step: see the module's docstring. It gets batches already on the device.
            loader: batches; ``set_epoch``, ``state_dict`` and ``load_state_dict`` are used where it has them, and
                needed for ``save_every_steps``.
            evaluate_fn: called after every epoch; its result decides which state is best.
            epoch_start: called with the epoch before its first step, once in the life of a run.
            after_step: called after every optimizer step, gradients still there; numbers it returns are logged.

        Returns:
            The last epoch's row: means of the terms as ``train_*``, the evaluation as ``test_*``; {} if nothing was
            left.

        Raises:
            NonFiniteLoss: before any checkpoint that the loss could have spoilt.
            DataError: see :meth:`check_data`.
        """
        if self.save_every_steps is not None and not hasattr(loader, "load_state_dict"):
            raise ValueError(
                "saving within an epoch needs a loader that can start there, such as common.data.loaders.train_loader"
            )
        self.step, self.after_step = step, after_step
        self.loader: Any = loader
        self.check_data()
        progress, network = self.state.progress, self.network
        assert network is not None
        if self.record is not None:
            self.record.rewind(progress.epoch, progress.step)
            place = {"epoch": progress.epoch, "step": progress.step}
            self.record.write("start", place | {"arguments": dict(self.state.arguments)})
        if self.cooldown_epochs:
            logger.info(
                "%d epochs in all: %d and %d of cooldown at the lowest rate (--cooldown-epochs 0 for none)",
                self.epochs, self.epochs - self.cooldown_epochs, self.cooldown_epochs,
            )  # fmt: skip
        if progress.epoch >= self.epochs:
            logger.info("all %d epochs are done: nothing is left to train (more with a larger --epochs)", self.epochs)
        row: dict[str, float] = {}
        try:
            while progress.epoch < self.epochs:
                network.train(self.train_mode)
                means = self.run_epoch(epoch_start)
                if evaluate_fn is not None and self.manager is not None:
                    self.manager.save(self.state)  # a run killed while it evaluates need not train the epoch again
                row = self.finish_epoch(means, evaluate_fn)
            if self.manager is not None and self.manager.sharded:
                logger.info("%s is in shards; python -m common.run.one_file %s FILE makes one file of it",
                            *2 * (self.manager.best if self.manager.best.exists() else self.manager.last,))  # fmt: skip
        finally:
            if self.manager is not None:
                self.manager.unlock()
        return row

    def check_data(self) -> None:
        """Compare the loader's images with those that a resumed run was trained on.

        Raises:
            DataError: the classes have other names; within an epoch, the number of images or the batch changed.
        """
        before, now = self.state.data, self.loader.about() if hasattr(self.loader, "about") else {}
        changed = [key for key, value in before.items() if key in now and now[key] != value]
        if "classes" in changed:
            lists = [str(about["classes"]).split("\n") for about in (before, now)]
            number, (old, new) = next(
                (number, pair) for number, pair in enumerate(zip_longest(*lists)) if pair[0] != pair[1]
            )
            raise DataError(
                f"the checkpoint was trained with class {number} named {old!r}, which these data name {new!r} "
                f"({len(lists[0])} classes before, {len(lists[1])} now): resume with the same data, or start from its "
                "weights with the program's flag for weights"
            )
        words = ", ".join(f"{key.replace('_', ' ')} {before[key]} -> {now[key]}" for key in changed)
        if changed and self.state.progress.batch and not self.state.progress.trained:
            raise DataError(
                f"the checkpoint is from within an epoch, whose order of images these data cannot continue ({words}): "
                "resume with the same data and --batch-size, or from a checkpoint written after an epoch"
            )
        if "images" in changed:
            logger.warning("the data changed since the checkpoint: %s", words)
        self.state.data = now

    def run_epoch(self, epoch_start: Callable[[int], None] | None) -> Means:
        """The batches of the current epoch that are left; none if only its evaluation is outstanding."""
        progress = self.state.progress
        reader = TermReader(Means(progress.sums))
        if progress.trained:
            self.state.restore_random()
            return reader.means
        if progress.batch == 0:
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(progress.epoch)
            self.state.restore_random()
            if epoch_start is not None:
                epoch_start(progress.epoch)
        elif not hasattr(self.loader, "load_state_dict"):
            raise ValueError("the checkpoint is from within an epoch, where this loader cannot start")
        else:
            self.loader.load_state_dict(progress.position)
        batches = iter(self.loader)
        self.state.restore_random()  # where the epoch goes on, opening the loader may have drawn numbers
        title = f"epoch {progress.epoch + 1}/{self.epochs}"
        started = time.monotonic()
        with ProgressLine(
            title, length_hint(self.loader) or None, done=progress.batch, show=self.show_progress
        ) as line:
            for batch in batches:
                self._run_step(to_device(batch, self.world.device), reader)
                line.update(count_images(batch), {**reader.shown(), "lr": self.rates()[0]})
                progress.batch += 1
                self._maybe_log(reader)
                if self.save_every_steps is not None and progress.step % self.save_every_steps == 0:
                    started = self._note(reader, started)
                    assert self.manager is not None
                    self.manager.save(self.state)
        if progress.batch == 0:
            raise ValueError("the training loader gave no batch; lower --batch-size or check the dataset")
        progress.trained = True
        self._note(reader, started)
        return reader.means

    def _note(self, reader: TermReader, started: float) -> float:
        """Bring ``progress`` up to date before a checkpoint; returns the time from which seconds count anew."""
        reader.flush()
        now = time.monotonic()
        progress = self.state.progress
        progress.seconds += now - started
        progress.sums = dict(reader.means.sums)
        progress.position = dict(self.loader.state_dict()) if hasattr(self.loader, "state_dict") else None
        return now

    def rates(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self.optimization.optimizer.param_groups)

    def _run_step(self, batch: Batch, reader: TermReader) -> None:
        state, progress = self.state, self.state.progress
        self.optimization.zero_grad()
        with autocast(self.amp, self.world.device):
            step: Any = self.step
            terms = step(batch, self.optimization) if self.own_backward else step(batch)
        reader.add(progress.epoch, progress.step + 1, terms, count_images(batch))
        if not self.own_backward:
            self.optimization.backward(terms["loss"])
        self.optimization.step()
        progress.step += 1
        if state.scheduler is not None and self.schedule_every == "step":
            self._advance_schedule(progress.step, None)
        if self.after_step is not None:
            info = StepInfo(progress.epoch, progress.batch, progress.step, self.rates())
            extra = self.after_step(info)
            reader.add_extra(extra or {}, count_images(batch))
        ema: Any = state.ema
        if ema is not None:
            ema.update(state.model, step=progress.step if getattr(ema, "use_warmup", False) else None)

    def _advance_schedule(self, count: int, metric: float | None) -> None:
        """timm's schedulers are told where they are, torch's count by themselves."""
        scheduler: Any = self.state.scheduler
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()
        elif self.schedule_every == "step":
            scheduler.step_update(count, metric)
        else:
            scheduler.step(count, metric)

    def _maybe_log(self, reader: TermReader) -> None:
        progress = self.state.progress
        if self.record is None or self.log_every_steps is None or progress.step % self.log_every_steps:
            return
        reader.flush()
        values = {f"train_{name}": value for name, value in reader.shown().items()}
        self.record.write(
            "step", {"epoch": progress.epoch, "step": progress.step, "train_lr": self.rates()[0], **values}
        )

    def finish_epoch(self, means: Means, evaluate_fn: Callable[[], Mapping[str, float]] | None) -> dict[str, float]:
        """Evaluate, advance the schedule, record, and write the checkpoint with which the next epoch starts."""
        state, progress = self.state, self.state.progress
        images = reduce_sums({"images": means.sums["count/loss"]})["images"]
        row: dict[str, float] = {"epoch": progress.epoch, "step": progress.step}
        rates = self.rates()
        row["train_lr"] = rates[0]
        row.update({f"train_lr_{index}": rate for index, rate in enumerate(rates) if rate != rates[0]})
        row.update({f"train_{name}": value for name, value in means.reduce().items()})
        row["train_images"], row["train_seconds"] = images, progress.seconds
        metrics = dict(evaluate_fn()) if evaluate_fn is not None else None
        row.update({f"test_{name}": value for name, value in (metrics or {}).items()})
        if state.scheduler is not None and self.schedule_every == "epoch":
            metric = self.manager.metric if self.manager is not None else None
            self._advance_schedule(progress.epoch + 1, (metrics or {}).get(metric) if metric else None)
        if self.record is not None:  # before the checkpoint: a run killed in between repeats both
            self.record.write("epoch", row)
        progress.epoch, progress.batch, progress.trained = progress.epoch + 1, 0, False
        progress.sums, progress.position, progress.seconds = {}, None, 0.0
        if self.manager is not None:
            self.manager.save(state, metrics)
        shown = {
            name: value
            for name, value in row.items()
            if isinstance(value, (int, float)) and name not in ("epoch", "step") and "seconds" not in name
        }
        logger.info("epoch %d/%d done  %s", progress.epoch, self.epochs, values_text(shown, 5))
        return row


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: str = "none",
    title: str = "test",
    show_progress: bool = True,
) -> dict[str, float]:
    """Accuracy over the images of all ranks, each counted once, whatever the number of ranks and the batch size.

    Args:
        model: gives class logits (B, C) of images (B, 3, height, width); put in evaluation mode, and back afterwards.
            Without the shell of DistributedDataParallel, whose ranks would have to take the same number of batches;
            under FSDP every rank holds all weights meanwhile, for the same reason. Its buffers become those of rank 0,
            which are the ones in a checkpoint.
        loader: (images, targets) of this rank's share; an attribute ``skipped`` counts undecodable images.
        device: of the model.
        amp: value of ``--amp``; logits are compared in float32.
        title: of the progress line.

    Returns:
        ``loss`` (cross-entropy, mean over images), ``batch_loss`` (mean over batches of their means, as DeiT's programs
        print it: the last batch may be smaller), ``top1_percent``, ``top5_percent`` (of as many as there are, with
        fewer than five classes), ``images``, ``skipped``; the same on every rank.

    Raises:
        DataError: no image at all, a label the model has no class for, or logits that are not numbers.
    """
    name = "the model"
    found = evaluate_all({name: model}, loader, device=device, amp=amp, title=title, show_progress=show_progress)
    return found[name]


@torch.no_grad()  # inference mode would leave a model's cached tensors unusable for training
def evaluate_all(
    models: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: str = "none",
    title: str = "test",
    show_progress: bool = True,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """:func:`evaluate` for several models, whose images are loaded once; the names are those of errors, too.

    Args:
        failed: takes the names of models whose logits are not numbers, and what is to be said of them; they are left
            out of the result. None raises it.
    """
    models = {name: without_exchange(model) for name, model in models.items()}
    was_training = {name: model.training for name, model in models.items()}
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}
    images_seen = batches_seen = 0
    with ExitStack() as stack:
        for name, model in models.items():
            broadcast_buffers(model)
            stack.callback(model.train, was_training[name])
            model.eval()
            stack.enter_context(gathered(model))
        line = stack.enter_context(ProgressLine(title, length_hint(loader) or None, show=show_progress))
        for images, targets in loader:
            images, labels = (part.to(device, non_blocking=True) for part in (images, targets))
            for name, model in models.items():
                with autocast(amp, device):
                    logits = model(images)
                if not isinstance(logits, Tensor) or logits.ndim != 2:
                    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                    raise TypeError(f"evaluation needs class logits (B, C), {name} gave {found}")
                logits = logits.float()
                check_labels(targets, logits.shape[1])
                sums[name] += _batch_sums(logits, labels)
            images_seen, batches_seen = images_seen + len(targets), batches_seen + bool(len(targets))
            line.update(len(targets))
    seen = {"images": images_seen, "batches": batches_seen, "skipped": getattr(loader, "skipped", 0)}
    rows: dict[str, dict[str, float]] = {}
    for name, found in sums.items():
        try:
            rows[name] = _reduced(name, dict(zip(SUMS, found.tolist(), strict=True)) | seen)
        except NotNumbers as error:  # on all ranks alike
            if failed is None:
                raise
            failed[name] = str(error)
    return rows


SUMS = ("loss", "top1", "top5", "batch_loss")
"""Of :func:`_batch_sums`."""


def _reduced(name: str, sums: Mapping[str, float]) -> dict[str, float]:
    """What :func:`evaluate` returns, of the sums of this rank."""
    total = reduce_sums(sums)
    if total["images"] == 0:
        raise DataError(f"no image to evaluate ({total['skipped']:.0f} skipped as undecodable); check the dataset")
    if math.isnan(total["loss"]):
        raise NotNumbers(f"{name} gives logits that are not numbers: damaged weights, or an overflow under --amp")
    return {
        "loss": total["loss"] / total["images"],
        "batch_loss": total["batch_loss"] / total["batches"],
        "top1_percent": 100 * total["top1"] / total["images"],
        "top5_percent": 100 * total["top5"] / total["images"],
        "images": int(total["images"]),
        "skipped": int(total["skipped"]),
    }


def check_labels(targets: Tensor, classes: int) -> None:
    """On the CPU, where the loader leaves them: on the GPU a wrong label ends in an unreadable assertion."""
    if not targets.is_cuda and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DataError(
            f"the dataset has label {int(targets.max())}, the model only {classes} classes; check --num-classes and "
            "that the dataset is the one the model was trained for"
        )


def _batch_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in sum, labels that are first, and among the first five, mean cross-entropy; (4,) in float64."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, <=5)
    hits = ranked == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum").double()
    return torch.stack([loss, hits[:, 0].sum().double(), hits.sum().double(), loss / max(len(logits), 1)])

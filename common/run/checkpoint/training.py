"""The state of a training run: everything that exact resume needs, and the files that hold the last and the best."""

from __future__ import annotations

import math
import os
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from common.run.checkpoint.fetching import locate
from common.run.checkpoint.loading import load_strict
from common.run.checkpoint.reading import load_safely, naming, select_state, some
from common.run.checkpoint.writing import plain, save_atomic
from common.run.errors import CheckpointError
from common.run.files import heal_folder, lock_folder, make_folder, sharded_name, stale
from common.run.launch import barrier, gather_objects, get_world_size, main_process_first
from common.run.program import get_logger, get_rank, is_main
from common.run.wrapping import unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = get_logger(__name__)


class Stateful(Protocol):
    """What can be kept in a checkpoint: optimizers, schedulers, scalers, and a paper's own state."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def random_states(device: torch.device) -> dict[str, Any]:
    """This process's generators: Python's, NumPy's, torch's and, on CUDA, its device's."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_states` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        if states["cuda"] is None:
            logger.warning("the checkpoint was written on the CPU: CUDA's random numbers continue differently")
        else:
            torch.cuda.set_rng_state(states["cuda"], device)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: the one running or, with ``batch`` 0, the next; counts from 0.
        batch: batches of it done.
        step: optimizer steps since the beginning.
        trained: all its batches are done, its evaluation is not.
        best: best value so far of the metric that decides which state to keep.
        sums: of the epoch's loss terms, from which its means are made; each rank has its own.
        seconds: spent on the epoch's batches.
        position: the loader's own state.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    trained: bool = False
    best: float | None = None
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    position: dict[str, Any] | None = None


@dataclass
class TrainingState:
    """Everything a run needs to continue exactly; the engine advances ``progress``.

    Args:
        model: the bare module, not wrapped.
        optimizer, scheduler, scaler, ema: None where the run has none; ``ema`` holds its average in ``.module``.
        extra: a paper's own state by name, for example dual variables; the same on every rank.
        arguments: the run's flags, ``vars(args)``, for the record.
        device: this process's, whose generator is part of the state.
        data: what the training's loader says of its images, to be compared when the run is resumed.
        mesh: of the ranks that the weights are divided among, see ``common.run.wrapping.shard``; None where they are
            not.
    """

    model: nn.Module
    optimizer: Stateful | None = None
    scheduler: Stateful | None = None
    scaler: Stateful | None = None
    ema: nn.Module | None = None
    extra: Mapping[str, Stateful] = field(default_factory=dict[str, Stateful])
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = field(default_factory=Progress)
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    resumed_random: Mapping[str, Any] | None = None
    """Generators to put back when training starts: what runs in between may draw numbers of its own. And their file."""
    mesh: DeviceMesh | None = None

    def __post_init__(self) -> None:
        self.model = unwrap(self.model)

    def _parts(self) -> dict[str, Stateful]:
        """By the key in the file; the names are those of DeiT's files."""
        named = {"optimizer": self.optimizer, "lr_scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in named.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """What goes into the file. With several ranks, call it on all: each contributes its generators."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self._average().state_dict() if self.ema is not None else None,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "extra": {name: part.state_dict() for name, part in self.extra.items()},
            "epoch": self.progress.epoch - 1,  # the last finished one, as DeiT's files have it
            "progress": asdict(self.progress),
            "ranks": gather_objects({**random_states(self.device), "sums": dict(self.progress.sums)}),
            "args": dict(self.arguments),
            "data": dict(self.data),
        }

    def _average(self) -> nn.Module:
        module = getattr(self.ema, "module", None)
        if not isinstance(module, nn.Module):
            raise TypeError(f"ema must hold its average in .module, as timm's ModelEmaV3 does; got {type(self.ema)}")
        return module

    def load_state_dict(self, content: Mapping[str, Any], *, source: str = "checkpoint") -> None:
        """Continue from a file of ours exactly, or from one of the official trainers at its next epoch.

        Raises:
            CheckpointError: naming what the file lacks or what does not fit.
        """
        with naming(source, "cannot resume from it: its content is damaged, or another program's"):
            self._load(content, source)

    def _load(self, content: Mapping[str, Any], source: str) -> None:
        if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
            found = some([str(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(f"{source}: cannot resume from it: expected the key 'model', found {found}")
        lacking = [name for name in self._parts() if name != "scaler" and name not in content]
        ours = "progress" in content
        if lacking and (ours or "optimizer" in lacking):
            raise CheckpointError(
                f"{source}: cannot resume from it: it lacks {', '.join(lacking)}; to start from its weights only, "
                "name it with the program's flag for weights (--finetune, --initial-checkpoint; see --help)"
            )
        load_strict(self.model, select_state(content, ("model",), source=source), source=source)
        if self.ema is not None:
            average = content.get("model_ema")
            if average is None:
                logger.warning("%s holds no average of the weights: it starts again from the weights", source)
            load_strict(self._average(), average or self.model.state_dict(), source=f"{source} (model_ema)")
        for name, part in self._parts().items():
            if not content.get(name):
                if name == "lr_scheduler" or (name == "scaler" and part.state_dict()):
                    logger.warning("%s holds no %s: it starts afresh", source, name)
                continue
            with naming(source, f"its {name} does not fit this run"):
                part.load_state_dict(content[name])
        for name, part in self.extra.items():
            if name not in content.get("extra", {}):
                raise CheckpointError(f"{source}: it lacks extra state {name!r}; was it written by another program?")
            part.load_state_dict(content["extra"][name])
        if ours:
            self.progress = Progress(**content["progress"])
            self.data = dict(content.get("data") or {})
            self._take_rank(content["ranks"], source)
            self._compare_arguments(content.get("args") or {})
        else:
            self.progress = Progress(epoch=int(content.get("epoch", -1)) + 1)
            logger.warning("%s is not of this program: continuing at epoch %d, not bit for bit", source,
                           self.progress.epoch)  # fmt: skip

    def _take_rank(self, ranks: Sequence[Mapping[str, Any]], source: str) -> None:
        """What belongs to this rank alone: its generators, and its part of the epoch's means."""
        size = get_world_size()
        if len(ranks) == size:
            self.resumed_random = {**ranks[get_rank()], "source": source}
            self.progress.sums = dict(ranks[get_rank()]["sums"])
            return
        if self.progress.batch:
            raise CheckpointError(
                f"{source} is from within an epoch of {len(ranks)} processes, whose order of images {size} cannot "
                f"continue; resume with {len(ranks)}, or from a checkpoint written after an epoch"
            )
        logger.warning(
            "%s was written by %d processes and is resumed by %d: the continuation is not bit for bit the same",
            source, len(ranks), size,
        )  # fmt: skip

    def _compare_arguments(self, before: Mapping[str, Any]) -> None:
        now = plain(dict(self.arguments))
        changed = [f"{key} {before[key]!r} -> {now[key]!r}" for key in now if key in before and before[key] != now[key]]
        if changed:
            logger.info("arguments that changed since the checkpoint: %s", "; ".join(changed))

    def restore_random(self) -> None:
        """Put the generators of a resumed run back, once; does nothing in a new run."""
        if self.resumed_random is not None:
            with naming(self.resumed_random["source"], "its random generators are damaged"):
                restore_random_states(self.resumed_random, self.device)
            self.resumed_random = None


def read_state(source: str | os.PathLike[str], state: TrainingState) -> Any:
    """Content of a checkpoint for ``state``: a file or URL, or the folder of a run with ``--fsdp`` where this is one.

    Raises:
        CheckpointError: nothing of that kind, or damaged.
    """
    with main_process_first():
        path = locate(source)
    if state.mesh is None:
        return load_safely(path)
    from common.run.checkpoint.sharded import load_sharded  # only where it is asked for

    return load_sharded(path, state.mesh)


class CheckpointManager:
    """Keeps the last and the best state of a run in a folder, each written whole or not at all.

    Each is a file, or of a run with ``--fsdp`` a folder of its own.

    Args:
        folder: created if needed.
        metric: key of the evaluation's result by which a state is best; None keeps the last only.
        higher_is_better: False for a loss.
        last, best: file names.
        sharded: the states are divided among the ranks; see ``common.run.checkpoint.sharded``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        metric: str | None = "top1_percent",
        higher_is_better: bool = True,
        last: str = "last.pth",
        best: str = "best.pth",
        sharded: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.sharded = sharded
        files = self.folder / last, self.folder / best
        folders = sharded_name(files[0]), sharded_name(files[1])
        (self.last, self.best), (self.other, _) = (folders, files) if sharded else (files, folders)
        self._unlock: Callable[[], object] = lambda: None
        if is_main():
            make_folder(self.folder)

    def lock(self) -> None:
        """Keep the folder for this run until :meth:`unlock` or the end of the process, and clear up after killed ones.

        Raises:
            UsageError: another run has it.
        """
        if is_main():
            self._unlock = weakref.finalize(self, lock_folder(self.folder))
            for path in (self.last, self.best):
                if self.sharded:
                    heal_folder(path)
                for half in stale(path):
                    half.unlink(missing_ok=True)
        if self.sharded:
            barrier()  # the others look for the folder next

    def unlock(self) -> None:
        """Let other runs have the folder; nothing without a lock."""
        self._unlock()

    def improves(self, value: float, best: float | None) -> bool:
        """Strictly better; a value that is no number never is."""
        if not math.isfinite(value):
            return False
        return best is None or (value > best if self.higher_is_better else value < best)

    def save(self, state: TrainingState, metrics: Mapping[str, float] | None = None) -> bool:
        """Write the state; with ``metrics`` of an evaluation also as the best, if it is. Call it on every rank.

        Returns:
            Whether this is the best state so far.
        """
        improved = False
        if metrics is not None and self.metric is not None:
            if self.metric not in metrics:
                raise KeyError(f"the evaluation gave no {self.metric!r} to keep the best by, only {sorted(metrics)}")
            value = float(metrics[self.metric])
            improved = self.improves(value, state.progress.best)
            if improved:
                state.progress.best = value
        content = state.state_dict()
        if self.sharded:
            from common.run.checkpoint.sharded import save_sharded  # only where it is asked for

            save_sharded(content, *([self.best] if improved else []), self.last)
        elif is_main():
            if improved:  # first, so that a run killed in between repeats it
                save_atomic(content, self.best)
            save_atomic(content, self.last)
        return improved

    def resume(self, state: TrainingState, source: str | os.PathLike[str] = "auto") -> bool:
        """Load ``source`` into ``state``: a path, a URL, or ``auto`` for this folder's last state, if there is one.

        Returns:
            False where ``auto`` found nothing, and the run starts new.

        Raises:
            CheckpointError: it cannot be resumed from; or ``auto`` found the state of a run with ``--fsdp``, or of one
                without, and this is the other.
        """
        if os.fspath(source) == "auto":
            if not self.last.exists() and self.other.exists():
                raise CheckpointError(
                    f"{self.other} is of a run {'without' if self.sharded else 'with'} --fsdp, which cannot go on as "
                    "this one: resume it as it began, or name another folder"
                )
            if not self.last.exists():
                return False
            source = self.last
        state.load_state_dict(read_state(source, state), source=str(source))
        logger.info("resumed from %s at epoch %d, step %d", source, state.progress.epoch, state.progress.step)
        return True

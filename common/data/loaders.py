"""Samplers and loaders whose images do not depend on how they are loaded.

The randomness of a training image is a function of (seed, epoch, index, repeat) alone, so augmentation is the same
for any number of workers, and a run stopped in the middle of an epoch goes on with exactly the batches that were left.
Evaluation hands out every image exactly once over all ranks. Datasets by name are in ``common.data.datasets``,
transforms in ``common.data.transforms``; this module passes their public names on.

    loader = train_loader(dataset, batch_size=64, workers=4, seed=0)
    loader.set_epoch(epoch)                 # once per epoch; a resumed position within this epoch stays
    for images, targets in loader: ...      # (B, 3, height, width), (B,)
    loader.state_dict()                     # position after the batch last received, whatever was prefetched
    loader.skipped                          # images that could not be decoded since the iteration began
"""

import random
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from traceback import clear_frames
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)

from common.data.datasets import BadImageError as BadImageError
from common.data.datasets import DataError as DataError
from common.data.datasets import build_dataset as build_dataset
from common.data.datasets import default_num_classes as default_num_classes
from common.data.datasets import load_image as load_image
from common.data.datasets import num_classes as num_classes
from common.data.memory import BatchTransform, MemoryImages, batch_transform
from common.data.transforms import eval_transform as eval_transform
from common.data.transforms import train_transform as train_transform
from common.run.errors import OutputError
from common.run.launch import get_world_size
from common.run.program import get_rank


class Key(NamedTuple):
    """What the samplers ask a ``SeededDataset`` for. It carries the epoch: persistent workers never see a new one."""

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's method, which nobody calls here
    repeat: int = 0


@contextmanager
def seeded(*numbers: int) -> Generator[None]:
    """Seed Python's, NumPy's and torch's CPU generators by ``numbers``; the main process gets its own state back."""
    restore = get_worker_info() is None
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if restore else None
    for_python, for_numpy, *for_torch = np.random.SeedSequence(numbers).generate_state(4).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch[0] << 32 | for_torch[1])  # torch.manual_seed would reseed CUDA too
    try:
        yield
    finally:
        if states:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class SeededDataset(Dataset[Any]):
    """``dataset`` under keys: what a key returns is a function of ``seed`` and the key, in any process."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.classes: Sequence[str] | None = getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, key: Key | int) -> Any:
        epoch, index, repeat = key if isinstance(key, tuple) else Key(0, key)
        with seeded(self.seed, epoch, index, repeat):
            return self.dataset[index]


class SeededStream(IterableDataset[Any]):
    """A stream (``wds/``, ``tfds/``, ``hfids/``) whose randomness depends on seed, epoch, rank, worker and position.

    A stream has no index to seed by: the number of ranks and workers must stay for a run to be repeated or resumed.

    Args:
        rank, world_size: share of an evaluation stream to yield, every ``world_size``-th sample of each worker, so that
            no image is counted twice. None leaves sharding to timm's reader, which gives each rank as many good
            images, repeating some: right for training, where those left out are then not counted.
    """

    def __init__(self, stream: Any, seed: int, *, share: tuple[int, int] | None, rank: int, workers: int = 0) -> None:
        self.stream = stream
        self.seed = seed
        self.share = share
        self.rank = rank
        self.epoch = 0
        self.classes: Sequence[str] | None = getattr(stream, "classes", None)
        reader = getattr(stream, "reader", None)
        if share and reader is not None:  # every rank reads the whole stream and keeps its share
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        if hasattr(stream, "set_loader_cfg"):
            stream.set_loader_cfg(num_workers=workers)

    def __len__(self) -> int:
        length = len(self.stream)
        return -(-length // self.share[1]) if self.share else length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        source = (self.rank, worker.id if worker else 0)
        with seeded(self.seed, self.epoch, *source):
            samples = iter(self.stream)
        position, end = 0, object()
        while True:
            with seeded(self.seed, self.epoch, *source, position):
                sample = next(samples, end)
            if sample is end:
                return
            if sample is not None if self.share is None else position % self.share[1] == self.share[0]:
                yield sample
            position += 1


class Position:
    """Where a loader is: epoch, the batch to start it at, and the batches of it that have been handed out."""

    def __init__(self) -> None:
        self.epoch = 0
        self.start_batch = 0
        self.batches_done = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``; a position loaded for this very epoch stays."""
        if epoch != self.epoch:
            self.epoch, self.start_batch, self.batches_done = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "start_batch": self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self.start_batch = self.batches_done = state["start_batch"]


class ResumableBatchSampler(Position, Sampler[list[Key]]):
    """Batches of ``Key`` from a sampler of indices, or of (index, repeat); an epoch can begin at ``start_batch``.

    ``batches_done`` counts what the consumer has received, not what was prefetched; ``Loader`` keeps it.
    """

    def __init__(self, sampler: Sampler[Any] | Sequence[int], batch_size: int, drop_last: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__()
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever this one starts."""
        count = len(self.sampler)  # pyright: ignore[reportArgumentType]
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)  # pyright: ignore[reportAttributeAccessIssue]
        remaining = islice(iter(self.sampler), self.start_batch * self.batch_size, None)
        while batch := list(islice(remaining, self.batch_size)):
            if self.drop_last and len(batch) < self.batch_size:
                return
            yield [Key(self.epoch, *(item if isinstance(item, tuple) else (item,))) for item in batch]


class RepeatedSampler(RepeatAugSampler):
    """timm's repeated augmentation, yielding (index, repeat) so that the repeats of an image differ on all ranks.

    As published, a dataset of fewer than 256 images yields nothing; timm's would yield each once.
    """

    def __init__(self, dataset: Any, *args: Any, **options: Any) -> None:
        super().__init__(dataset, *args, **options)
        if len(dataset) < 256:
            self.num_selected_samples = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for position, index in enumerate(super().__iter__()):
            yield index, (self.rank + position * self.num_replicas) % int(self.num_repeats)


def about_data(dataset: Any, batch_size: int | None = None) -> dict[str, Any]:
    """What must stay where a run is resumed: the classes' names, one a line, where they are known; without
    ``batch_size`` nothing else, with it this and the number of ``images``.
    """
    about: dict[str, Any] = {} if batch_size is None else {"images": len(dataset), "batch_size": batch_size}
    classes: Sequence[Any] | None = getattr(dataset, "classes", None)
    return about | ({"classes": "\n".join(map(str, classes))} if classes else {})


class FileLoader(DataLoader[Any]):
    """A ``DataLoader`` of (images, targets) that knows its position, counts skipped images and draws no global random
    number.

    Attributes:
        skipped: images that could not be decoded since the last iteration began, on this rank; add it over the ranks.
        position: see ``Position``; ``set_epoch``, ``state_dict`` and ``load_state_dict`` are passed on to it.
    """

    def __init__(
        self, dataset: SeededDataset | SeededStream, *, pin_memory: bool | None, workers: int, **options: Any
    ) -> None:
        streams = isinstance(dataset, SeededStream)
        super().__init__(
            dataset,
            num_workers=workers,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            persistent_workers=workers > 0 and not streams,  # a stream's workers learn the epoch when they start
            generator=torch.Generator(),
            **options,
        )
        self.skipped = 0
        self.position = self.batch_sampler if isinstance(self.batch_sampler, ResumableBatchSampler) else Position()

    def set_epoch(self, epoch: int) -> None:
        self.position.set_epoch(epoch)
        if isinstance(self.dataset, SeededStream):
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position.load_state_dict(state)
        self.set_epoch(state["epoch"])

    def about(self) -> dict[str, Any]:
        """See :func:`about_data`."""
        position = self.position
        return about_data(self.dataset, position.batch_size if isinstance(position, ResumableBatchSampler) else None)

    def __iter__(self) -> Any:  # an iterator; torch's annotation names a private class
        assert isinstance(self.generator, torch.Generator)
        assert isinstance(self.dataset, (SeededDataset, SeededStream))
        (seed,) = np.random.SeedSequence((self.dataset.seed, self.position.epoch)).generate_state(1).tolist()
        self.generator.manual_seed(seed)  # of the workers, which only streams go by
        self.skipped, self.position.batches_done = 0, self.position.start_batch
        batches = super().__iter__()
        if isinstance(self.dataset, SeededStream):  # without indices, the way to a position is through what precedes it
            batches = islice(batches, self.position.start_batch, None)
        try:
            for images, targets, skipped in batches:
                self.skipped += skipped
                self.position.batches_done += 1
                if images is not None:
                    yield images, targets
        except Exception as error:
            clear_frames(error.__traceback__)  # they hold the workers in a cycle; collected as one, each would take 5 s
            if not isinstance(error, (DataError, OutputError)):
                raise
            # a worker's arrives with its traceback as text, of which the user needs the end
            message = re.split(rf"^[\w.]*{type(error).__name__}: ", str(error), flags=re.MULTILINE)[-1]
            raise type(error)(message.strip()) from None
        self.position.start_batch = 0


class MemoryLoader:
    """As ``FileLoader``, of images in memory, augmented a batch at a time in this process."""

    skipped = 0

    def __init__(
        self, dataset: MemoryImages, transform: BatchTransform, position: ResumableBatchSampler, *, seed: int
    ) -> None:
        self.dataset, self.transform, self.position, self.seed = dataset, transform, position, seed

    def __len__(self) -> int:
        return len(self.position)

    def set_epoch(self, epoch: int) -> None:
        self.position.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position.load_state_dict(state)

    def about(self) -> dict[str, Any]:
        """See :func:`about_data`."""
        return about_data(self.dataset, self.position.batch_size)

    def _draw(self, repeat: int) -> Tensor:
        """What the transform draws for each image of the data set in this epoch."""
        sequence = np.random.SeedSequence((self.seed, self.position.epoch, repeat))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
        return self.transform.draw(len(self.dataset), generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position.batches_done = self.position.start_batch
        drawn: dict[int, Tensor] = {}
        for keys in self.position:
            index, repeats = torch.tensor([(key.index, key.repeat) for key in keys]).unbind(1)
            if self.transform.random:
                drawn |= {repeat: self._draw(repeat) for repeat in set(repeats.tolist()) - drawn.keys()}
                chosen = torch.stack([drawn[key.repeat][key.index] for key in keys])
            else:
                chosen = None
            self.position.batches_done += 1
            yield self.transform(self.dataset.pixels[index], chosen), self.dataset.labels[index]
        self.position.start_batch = 0


Loader = FileLoader | MemoryLoader


def collate_evaluation(samples: list[Any]) -> tuple[Any, Any, int]:
    """A batch without its undecodable images, and their number; (None, None, n) where no other is left."""
    good = [sample for sample in samples if sample is not None]
    images, targets = default_collate(good) if good else (None, None)
    return images, targets, len(samples) - len(good)


def collate_training(samples: list[Any]) -> tuple[Any, Any, int]:
    """A batch with good images of its own repeated in place of undecodable ones, and the number of these.

    The size stays, because mixup needs an even one and ranks must take the same number of steps.
    """
    good = [sample for sample in samples if sample is not None]
    if not good:
        raise DataError(f"none of the {len(samples)} images of a batch can be decoded")
    skipped = len(samples) - len(good)
    images, targets = default_collate(good + [good[i % len(good)] for i in range(skipped)])
    return images, targets, skipped


def train_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    repeated_aug: bool = False,
    pin_memory: bool | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Loader:
    """Shuffled batches of exactly ``batch_size``, each rank its share; what does not fill a batch is dropped.

    Args:
        batch_size: images per batch of this rank.
        workers: loading processes; 0 loads in this one. Any number gives the same batches.
        seed: of order and augmentation, the same on all ranks.
        repeated_aug: three augmented versions of each image, spread over the ranks, of a third of the images.
        pin_memory: None pins where there is a CUDA device.
        rank, world_size: None takes those of the process group, or one process.

    Raises:
        DataError: if no batch can be filled.
    """
    rank, world_size = _place(rank, world_size)
    loading: dict[str, Any] = {"pin_memory": pin_memory, "workers": workers, "collate_fn": collate_training}
    if isinstance(dataset, IterableDataset):
        if repeated_aug:
            raise DataError("a stream cannot repeat images: give --no-repeated-aug, or a dataset with an index")
        stream = SeededStream(dataset, seed, share=None, rank=rank, workers=workers)
        return FileLoader(stream, batch_size=batch_size, drop_last=True, **loading)
    count = len(dataset)  # pyright: ignore[reportArgumentType]
    if repeated_aug:
        if count < 256:
            raise DataError(
                f"repeated augmentation takes images by 256 and there are {count} to train on: give --no-repeated-aug"
            )
        sampler: Sampler[Any] = RepeatedSampler(dataset, num_replicas=world_size, rank=rank)
    else:
        sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=seed)
    batches = ResumableBatchSampler(sampler, batch_size, drop_last=True)
    if len(batches) == 0:
        raise DataError(
            f"the training split has {count} images, too few for one batch of {batch_size} on each of {world_size} "
            "process(es): give a smaller --batch-size"
        )
    return _open_indexed(dataset, batches, seed, loading)


def eval_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    pin_memory: bool | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Loader:
    """Every image exactly once over all ranks, in order and without padding; a rank may get none.

    Rank r takes images r, r + world_size, ... Reduce sums, not means, over the ranks. ``seed`` matters only where the
    transform is random.
    """
    rank, world_size = _place(rank, world_size)
    loading: dict[str, Any] = {"pin_memory": pin_memory, "workers": workers, "collate_fn": collate_evaluation}
    if isinstance(dataset, IterableDataset):
        stream = SeededStream(dataset, seed, share=(rank, world_size), rank=0, workers=workers)
        return FileLoader(stream, batch_size=batch_size, **loading)
    share = range(rank, len(dataset), world_size)  # pyright: ignore[reportArgumentType]
    return _open_indexed(dataset, ResumableBatchSampler(share, batch_size, drop_last=False), seed, loading)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    return get_rank() if rank is None else rank, get_world_size() if world_size is None else world_size


def _open_indexed(dataset: Dataset[Any], batches: ResumableBatchSampler, seed: int, loading: dict[str, Any]) -> Loader:
    if type(dataset) is MemoryImages:  # the digits are trained on image by image, as they were before
        height, width = dataset.pixels.shape[1:]
        batched = batch_transform(dataset.transform, (height, width))
        if batched is not None:
            return MemoryLoader(dataset, batched, batches, seed=seed)
    return FileLoader(SeededDataset(dataset, seed), batch_sampler=batches, **loading)

"""Samplers and loaders: every picture once, the same pictures however they are loaded, nothing lost in silence."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from common.data.loaders import (
    BadImageError,
    DataError,
    Loader,
    RepeatedSampler,
    build_dataset,
    eval_loader,
    eval_transform,
    train_loader,
    train_transform,
)

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Numbers(Dataset[Any]):
    """Index as target, and as image a number drawn from all three generators that augmentation may use."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index in self.bad:
            return None
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), index


class Stream(IterableDataset[Any]):
    """Numbers 0 to count - 1 spread over the workers, with noise."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(start, self.count, step):
            yield torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), number


def batches_of(loader: Loader, epoch: int = 0) -> Batches:
    loader.set_epoch(epoch)
    return [(images.clone(), targets.clone()) for images, targets in loader]


def targets_of(loader: Loader, epoch: int = 0) -> list[int]:
    return [int(target) for _, targets in batches_of(loader, epoch) for target in targets]


def assert_equal(got: Batches, wanted: Batches) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def write_folders(root: Path, bad: tuple[str, ...] = ()) -> Path:
    for split in ("train", "val"):
        for number, name in enumerate(("ape", "bee")):
            for picture in range(4):
                path = root / split / name / f"{picture}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (34, 34), (60 * picture, 100 * number, 7)).save(path)
    for path in bad:
        (root / path).write_bytes(b"not a picture")
    return root


# -------------------------------------------------- the same pictures, however loaded


def test_augmentation_does_not_depend_on_workers() -> None:
    digits = build_dataset("digits", None, "train", train_transform(32))
    alone, shared = (
        train_loader(digits, batch_size=256, workers=workers, seed=1, repeated_aug=True) for workers in (0, 2)
    )
    assert_equal(batches_of(alone, 0), batches_of(shared, 0))
    assert_equal(batches_of(alone, 3), batches_of(shared, 3))  # persistent workers follow the epoch


def test_order_and_augmentation_follow_seed_and_epoch() -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        return batches_of(train_loader(Numbers(40), batch_size=40, seed=seed), epoch)[0][0]

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0).sort(0)[0], first(1, 0).sort(0)[0])
    assert not torch.equal(first(0, 0).sort(0)[0], first(0, 1).sort(0)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_global_generators_alone(workers: int) -> None:
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for loader in (train_loader(Numbers(32), batch_size=8, workers=workers), eval_loader(Numbers(5), batch_size=2)):
        batches_of(loader)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeated_aug", [False, True])
def test_epoch_stopped_midway_goes_on_exactly(workers: int, repeated_aug: bool) -> None:
    def build() -> Loader:
        return train_loader(Numbers(300), batch_size=32, workers=workers, seed=2, repeated_aug=repeated_aug)

    whole, after = batches_of(build(), 4), batches_of(build(), 5)
    stopped = build()
    stopped.set_epoch(4)
    begun = [(images.clone(), targets.clone()) for images, targets in islice(stopped, 3)]
    state = stopped.state_dict()  # with workers, later batches are prefetched by now
    assert state == {"epoch": 4, "start_batch": 3}
    resumed = build()
    resumed.load_state_dict(state)
    assert_equal(begun + batches_of(resumed, 4), whole)
    assert len(resumed) == len(whole)
    assert_equal(batches_of(resumed, 5), after)


def test_position_after_a_whole_epoch() -> None:
    loader = train_loader(Numbers(20), batch_size=5)
    batches_of(loader, 1)
    assert loader.state_dict() == {"epoch": 1, "start_batch": 4}
    resumed = train_loader(Numbers(20), batch_size=5)
    resumed.load_state_dict(loader.state_dict())
    assert batches_of(resumed, 1) == []
    assert len(batches_of(resumed, 2)) == len(batches_of(loader, 1)) == 4  # and an epoch can be iterated again


# -------------------------------------------------- shares of the ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 29])
def test_evaluation_counts_every_picture_once(world_size: int, count: int) -> None:
    shares = [
        targets_of(eval_loader(Numbers(count), batch_size=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_shares_are_disjoint_and_full(world_size: int) -> None:
    loaders = [train_loader(Numbers(96), batch_size=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [targets_of(loader) for loader in loaders]
    assert sorted(chain(*shares)) == list(range(96))
    assert len({len(loader) for loader in loaders}) == 1
    assert shares[0] != sorted(shares[0])


def test_repeated_augmentation_order_is_the_published_one() -> None:
    """First indices of rank 1 of 4, 1000 pictures, epoch 3: from the published sampler, by way of the specification."""
    loader = train_loader(Numbers(1000), batch_size=192, repeated_aug=True, rank=1, world_size=4)
    got = targets_of(loader, 3)
    assert got[:8] == [986, 114, 894, 140, 885, 402, 837, 674]
    assert got[-6:] == [215, 357, 161, 865, 737, 896]
    assert len(got) == 192


def test_repeats_of_a_picture_differ_on_all_ranks() -> None:
    for world_size in (1, 2, 4):
        images: dict[int, list[torch.Tensor]] = {}
        for rank in range(world_size):
            loader = train_loader(Numbers(512), batch_size=8, repeated_aug=True, rank=rank, world_size=world_size)
            for batch, targets in batches_of(loader):
                for image, target in zip(batch, targets, strict=True):
                    images.setdefault(int(target), []).append(image)
        assert Counter(map(len, images.values())).most_common(1)[0][0] == 3
        for versions in images.values():
            assert len({tuple(version.tolist()) for version in versions}) == len(versions)


def test_too_few_pictures_name_the_flag() -> None:
    with pytest.raises(DataError, match="by 256 and there are 255 to train on: give --no-repeated-aug"):
        train_loader(Numbers(255), batch_size=8, repeated_aug=True)
    assert list(RepeatedSampler(Numbers(255), num_replicas=1, rank=0)) == []  # as the published sampler
    with pytest.raises(DataError, match=r"has 7 images, too few for one batch of 5 on each of 2 .*--batch-size"):
        train_loader(Numbers(7), batch_size=5, rank=0, world_size=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        eval_loader(Numbers(7), batch_size=0)


# -------------------------------------------------- bad pictures


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_picture_stops_the_run_by_name(tmp_path: Path, workers: int) -> None:
    root = write_folders(tmp_path, bad=("val/bee/2.png",))
    loader = eval_loader(build_dataset("imagenet", root, "val", eval_transform(32)), batch_size=3, workers=workers)
    with pytest.raises(
        BadImageError, match=r"^cannot decode image \S*val/bee/2.png \(not in a format.*--skip-bad-images$"
    ):
        batches_of(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_skipped_pictures_are_counted_exactly(tmp_path: Path, workers: int, world_size: int) -> None:
    root = write_folders(tmp_path, bad=("val/ape/0.png", "val/ape/1.png", "val/bee/3.png"))
    dataset = build_dataset("imagenet", root, "val", eval_transform(32), on_bad_image="skip")
    seen = skipped = 0
    for rank in range(world_size):
        loader = eval_loader(dataset, batch_size=2, workers=workers, rank=rank, world_size=world_size)
        for _ in range(2):  # the count begins anew with each pass
            count = len(targets_of(loader))
        seen, skipped = seen + count, skipped + loader.skipped
    assert (seen, skipped) == (5, 3)


def test_training_batches_keep_their_size() -> None:
    loader = train_loader(Numbers(32, bad=(3, 4, 17)), batch_size=8)
    sizes = [len(targets) for _, targets in batches_of(loader)]
    assert (sizes, loader.skipped) == ([8, 8, 8, 8], 3)
    with pytest.raises(DataError, match="none of the 8 images of a batch can be decoded"):
        batches_of(train_loader(Numbers(8, bad=tuple(range(8))), batch_size=8))


# -------------------------------------------------- streams


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_evaluation_counts_every_picture_once(world_size: int, workers: int) -> None:
    shares = [
        targets_of(eval_loader(Stream(23), batch_size=4, workers=workers, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(chain(*shares)) == list(range(23))


class TornStream(Stream):
    """Every fifth picture left out, which the stream says by None."""

    def __iter__(self) -> Iterator[Any]:
        for sample in super().__iter__():
            yield None if sample[1] % 5 == 0 else sample


def test_pictures_left_out_of_a_stream() -> None:
    loaders = [eval_loader(TornStream(23), batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert sum(len(targets_of(loader)) for loader in loaders) == 18
    assert sum(loader.skipped for loader in loaders) == 5
    assert [len(targets) for _, targets in batches_of(train_loader(TornStream(23), batch_size=4))] == [4] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumes_with_the_same_workers(workers: int) -> None:
    def build() -> Loader:
        return train_loader(Stream(40), batch_size=4, workers=workers, seed=3)

    torch.manual_seed(7)
    state = torch.get_rng_state()
    whole = batches_of(build(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(whole[0][0], batches_of(build(), 3)[0][0])
    resumed = build()
    resumed.load_state_dict({"epoch": 2, "start_batch": 3})
    assert_equal(batches_of(resumed, 2), whole[3:])


def test_streams_refuse_repeated_augmentation() -> None:
    with pytest.raises(DataError, match="a stream cannot repeat images: give --no-repeated-aug"):
        train_loader(Stream(1000), batch_size=4, repeated_aug=True)

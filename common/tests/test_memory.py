"""Fashion-MNIST in memory: its parts, its files, and batches that are what the loader of single images gives."""

import gzip
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from common.data.loaders import (
    FileLoader,
    MemoryLoader,
    ResumableBatchSampler,
    SeededDataset,
    build_dataset,
    eval_loader,
    train_loader,
)
from common.data.memory import FASHION, BatchTransform, batch_transform
from common.data.transforms import eval_transform, train_transform
from common.run.errors import DataError

PLAIN = train_transform(32, auto_augment=None, color_jitter=None, erase_probability=0)


def test_the_part_that_ships_inside_is_stratified_and_small() -> None:
    assert FASHION.stat().st_size < 6e6
    for name, split, per_class in (
        ("fashion", "train", 1200), ("fashion", "val", 200), ("fashion_tune", "train", 1000),
        ("fashion_tune", "val", 200),
    ):  # fmt: skip
        images = build_dataset(name, None, split, None)
        assert np.bincount(images.targets).tolist() == [per_class] * 10
        assert images.pixels.shape[1:] == (32, 32)
        assert images.pixels.dtype == torch.uint8
        assert not images.pixels[:, :2].any()


def test_tuning_never_sees_a_test_image() -> None:
    whole = build_dataset("fashion", None, "train", None).pixels.flatten(1)
    parts = [build_dataset("fashion_tune", None, split, None).pixels.flatten(1) for split in ("train", "val")]
    assert sorted(map(tuple, torch.cat(parts)[:, ::37].tolist())) == sorted(map(tuple, whole[:, ::37].tolist()))


def test_evaluation_batches_equal_those_of_single_images_bit_for_bit() -> None:
    dataset = build_dataset("fashion", None, "val", eval_transform(32))
    fast = eval_loader(dataset, batch_size=300)
    assert isinstance(fast, MemoryLoader)
    slow = FileLoader(
        SeededDataset(dataset, 0), batch_sampler=ResumableBatchSampler(range(2000), 300, drop_last=False),
        pin_memory=False, workers=0, collate_fn=eval_loader.__globals__["collate_evaluation"],
    )  # fmt: skip
    for (images, labels), (wanted, targets) in zip(fast, slow, strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(labels, targets)


def test_crop_and_flip_are_those_of_torchvision() -> None:
    dataset = build_dataset("fashion", None, "val", PLAIN)
    batched = batch_transform(PLAIN, (32, 32))
    assert batched == BatchTransform(32, 4, 0.5, batched.mean, batched.std)
    index = torch.arange(50)
    drawn = batched.draw(50, torch.Generator().manual_seed(0))
    found = batched(dataset.pixels[index], drawn)
    normalise = PLAIN.transforms[-1]
    for image, (row, column, flipped), result in zip(dataset.pixels[index], drawn.tolist(), found, strict=True):
        padded = torch.nn.functional.pad(image, (4,) * 4)[row : row + 32, column : column + 32]
        padded = padded.flip(1) if flipped else padded
        assert torch.equal(normalise(padded[None].expand(3, -1, -1) / 255), result)
    assert drawn[:, :2].unique().tolist() == list(range(9))
    assert 0.2 < drawn[:, 2].float().mean() < 0.8


@pytest.mark.parametrize("repeated", [False, True])
def test_an_epoch_goes_on_where_it_stopped_and_depends_on_seed_and_epoch(repeated: bool) -> None:
    dataset = build_dataset("fashion", None, "train", PLAIN)

    def batches(seed: int, epoch: int, state: dict[str, int] | None = None) -> list[torch.Tensor]:
        loader = train_loader(dataset, batch_size=1000, seed=seed, repeated_aug=repeated)
        assert isinstance(loader, MemoryLoader)
        loader.set_epoch(epoch)
        if state:
            loader.load_state_dict(state)
        return [images for images, _ in loader]

    whole = batches(0, 3)
    assert all(map(torch.equal, whole[2:], batches(0, 3, {"epoch": 3, "start_batch": 2})))
    assert len(whole) - 2 == len(batches(0, 3, {"epoch": 3, "start_batch": 2}))
    assert not torch.equal(whole[0], batches(0, 4)[0])
    assert not torch.equal(whole[0], batches(1, 3)[0])


def test_two_ranks_augment_an_image_as_one_process_does() -> None:
    dataset = build_dataset("fashion", None, "train", PLAIN)
    found = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        loader = train_loader(dataset, batch_size=500, seed=0, rank=rank, world_size=world)
        sums = [image.double().sum().item() for images, _ in loader for image in images]
        found[rank, world] = sorted(sums)
    assert sorted(found[0, 2] + found[1, 2]) == found[0, 1]


def test_steps_that_act_on_single_images_take_the_loader_of_single_images() -> None:
    for transform in (
        train_transform(32), train_transform(32, auto_augment=None, color_jitter=0.3, erase_probability=0),
        train_transform(32, auto_augment=None, color_jitter=None), eval_transform(28), eval_transform(64),
        train_transform(64, auto_augment=None, color_jitter=None, erase_probability=0),
    ):  # fmt: skip
        assert batch_transform(transform, (32, 32)) is None
    loader = train_loader(build_dataset("fashion", None, "train", train_transform(32)), batch_size=16)
    assert isinstance(loader, FileLoader)
    assert next(iter(loader))[0].shape == (16, 3, 32, 32)


def test_the_whole_set_is_read_from_its_files(tmp_path) -> None:
    part = np.load(FASHION)
    for split, word in (("train", "train"), ("val", "t10k")):
        images, labels = part[f"{split}_images"][:30], part[f"{split}_labels"][:30]
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (tmp_path / f"{word}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        head = b"\0\0\x08\x01" + len(labels).to_bytes(4, "big")
        (tmp_path / f"{word}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    found = build_dataset("fashion_full", tmp_path, "val", None)
    assert torch.equal(found.pixels[:, 2:-2, 2:-2], torch.from_numpy(part["val_images"][:30]))
    moved = tmp_path / "other" / "FashionMNIST" / "raw"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns("other"))
    assert len(build_dataset("fashion_full", tmp_path / "other", "train", None)) == 30

    whole = (tmp_path / "t10k-labels-idx1-ubyte").read_bytes()
    endless = b"\0\0\x08\x01" + bytes.fromhex("ffffffff")
    for broken in (whole[:-1], b"\x1f" + whole[1:], whole[:20], endless):
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(broken)
        with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
            build_dataset("fashion_full", tmp_path, "val", None)
    for shape in ("ffffffff ffffffff 00000000", "40000000 40000000 00000010"):  # the second is 2**64, which wraps
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes.fromhex(shape)))
        with pytest.raises(DataError, match=r"idx3-ubyte\.gz is no IDX file"):
            build_dataset("fashion_full", tmp_path, "val", None)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(200_000_000)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"idx3-ubyte\.gz is no IDX file"):
        build_dataset("fashion_full", tmp_path, "val", None)
    assert tracemalloc.get_traced_memory()[1] < 130_000_000
    tracemalloc.stop()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot read .*t10k-images-idx3-ubyte\.gz"):
        build_dataset("fashion_full", tmp_path, "val", None)


def test_what_is_missing_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("common.data.memory.DEBIAN", tmp_path / "none")
    with pytest.raises(DataError, match=r"fashion_full needs --data-path.*dataset-fashion-mnist"):
        build_dataset("fashion_full", None, "val", None)
    with pytest.raises(DataError, match="splits train and val"):
        build_dataset("fashion", None, "test", None)

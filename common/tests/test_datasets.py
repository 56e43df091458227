"""Datasets by name: what they yield, and that whatever is missing or damaged is named."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common import loading
from common.data import datasets
from common.data.loaders import (
    BadImageError,
    DataError,
    build_dataset,
    default_num_classes,
    eval_loader,
    eval_transform,
    num_classes,
    train_transform,
)
from common.data.paths import INSIDE, check_data_path, reads_folder
from common.run.errors import OutputError


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_folders(root: Path, splits: tuple[str, ...] = ("train", "val"), count: int = 2) -> Path:
    for split in splits:
        for number, name in enumerate(("ape", "bee", "cat")):
            for picture in range(count):
                write_picture(root / split / name / f"{picture}.png", seed=10 * number + picture)
    return root


# -------------------------------------------------- digits


def test_digits_split_is_fixed_stratified_and_complete() -> None:
    train, val = (build_dataset("digits", None, split, None) for split in ("train", "val"))
    digest = hashlib.sha256(json.dumps([train.indices, val.indices]).encode()).hexdigest()
    assert digest == "af1eaa3003be1ed37f76d8b15415e0140bf0d6b175e548a1d254f44c09fd437c"
    assert sorted(train.indices + val.indices) == list(range(1797))
    assert (len(train), len(val)) == (1437, 360)
    shares = [np.bincount(dataset.targets) / len(dataset) for dataset in (train, val)]
    assert np.abs(shares[0] - shares[1]).max() < 0.003
    assert min(np.bincount(val.targets)) >= 34


def test_digits_pictures_are_the_upsampled_originals() -> None:
    from sklearn.datasets import load_digits

    dataset = build_dataset("digits", None, "validation", None)
    picture, target = dataset[5]
    original, labels = load_digits(return_X_y=True)
    assert (picture.size, picture.mode, target) == ((32, 32), "RGB", labels[dataset.indices[5]])
    assert num_classes(dataset) == default_num_classes("digits") == 10
    blocks = np.asarray(picture.convert("L"), dtype=float).reshape(8, 4, 8, 4).mean((1, 3))  # back to 8x8
    assert np.corrcoef(blocks.ravel(), original[dataset.indices[5]])[0, 1] > 0.95
    red, green, blue = picture.split()
    assert red.tobytes() == green.tobytes() == blue.tobytes()


# -------------------------------------------------- folders


@pytest.mark.parametrize("val", ["val", "img_val", "validation"])
def test_folders_number_classes_by_sorted_name(tmp_path: Path, val: str) -> None:
    dataset = build_dataset("imagenet", write_folders(tmp_path, ("train", val)), "val", eval_transform(24))
    assert list(dataset.classes) == ["ape", "bee", "cat"]
    assert [target for _, target in (dataset[i] for i in range(len(dataset)))] == [0, 0, 1, 1, 2, 2]
    assert dataset[0][0].shape == (3, 24, 24)


def test_evaluation_needs_no_train_folder(tmp_path: Path) -> None:
    assert len(build_dataset("imagenet", write_folders(tmp_path, ("img_val",)), "val", None)) == 6


def test_undivided_folder_serves_evaluation_only(tmp_path: Path) -> None:
    root = write_folders(tmp_path, ("pictures",)) / "pictures"
    assert len(build_dataset("folder", root, "val", None)) == 6
    with pytest.raises(DataError, match=r"pictures has no train split: looked for train/, training/.*holds ape/, bee/"):
        build_dataset("folder", root, "train", None)
    with pytest.raises(DataError, match=r"no val split: looked for val/, img_val/"):
        build_dataset("imagenet", root, "val", None)


def test_wrong_path_is_named_with_what_exists(tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(DataError, match=r"imagnet/val2 does not exist; the nearest that does, .* holds imagenet/"):
        build_dataset("imagenet", tmp_path / "imagnet" / "val2", "val", None)
    with pytest.raises(DataError, match=r"'imagenet' needs a data directory: give DIR"):
        build_dataset("imagenet", None, "val", None)


def test_missing_split_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    write_folders(tmp_path, ("train",))
    (tmp_path / "valid_maps.txt").touch()
    with pytest.raises(DataError, match=r"no val split: looked for val/, img_val/.*holds train/, valid_maps.txt"):
        build_dataset("imagenet", tmp_path, "val", None)
    with pytest.raises(DataError, match="no val split"):  # not the folder of splits taken for one of classes
        build_dataset("folder", tmp_path, "val", None)


def test_empty_classes_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for name in ("dog", "eel"):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir()
    with pytest.raises(DataError, match=r"val.*dog, eel"):
        build_dataset("imagenet", tmp_path, "val", None)


def test_folder_without_classes_is_named(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"class folder in .*val.*is empty"):
        build_dataset("imagenet", tmp_path, "val", None)
    write_picture(tmp_path / "val" / "alone.png")
    with pytest.raises(DataError, match=r"class folder.*holds alone.png"):
        build_dataset("imagenet", tmp_path, "val", None)


def test_class_missing_from_one_split_is_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    write_picture(tmp_path / "train" / "bat" / "0.png")
    with pytest.raises(DataError, match=r"missing \['bat'\] \(1 in all\)"):  # bee and cat would get other numbers
        build_dataset("imagenet", tmp_path, "val", None)


# -------------------------------------------------- bad pictures


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "broken"])
def test_undecodable_picture_is_named_or_skipped(tmp_path: Path, damage: str) -> None:
    write_folders(tmp_path)
    bad = tmp_path / "val" / "bee" / "1.png"
    content = bad.read_bytes()
    middle = len(content) // 2
    damaged = {
        "text": b"<html>404</html>",
        "empty": b"",
        "truncated": content[:middle],
        "broken": content[:middle] + bytes(50) + content[middle + 50 :],
    }
    bad.write_bytes(damaged[damage])
    with pytest.raises(BadImageError, match=r"cannot decode image .*val/bee/1.png .*--skip-bad-images"):
        build_dataset("imagenet", tmp_path, "val", None)[3]
    dataset = build_dataset("imagenet", tmp_path, "val", None, on_bad_image="skip")
    assert [dataset[i] is None for i in range(len(dataset))] == [False, False, False, True, False, False]
    assert num_classes(dataset) == 3


def test_unreadable_file_is_never_skipped(tmp_path: Path) -> None:
    dataset = build_dataset("imagenet", write_folders(tmp_path), "val", None, on_bad_image="skip")
    (tmp_path / "val" / "bee" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*bee/1.png: No such file"):
        dataset[3]


def test_grey_and_palette_pictures_become_rgb(tmp_path: Path) -> None:
    write_folders(tmp_path, ("val",), count=1)
    for mode, name in (("L", "ape"), ("P", "bee"), ("CMYK", "cat")):
        Image.new(mode, (9, 9)).save(tmp_path / "val" / name / "0.png", format="TIFF" if mode == "CMYK" else "PNG")
    dataset = build_dataset("imagenet", tmp_path, "val", None)
    assert [dataset[i][0].mode for i in range(3)] == ["RGB"] * 3


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="on_bad_image must be 'raise' or 'skip', got 'ignore'"):
        build_dataset("digits", None, "val", None, on_bad_image="ignore")


# -------------------------------------------------- tar files


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, path.relative_to(folder))


@pytest.mark.parametrize("layout", ["one tar per split", "one tar per class"])
@pytest.mark.parametrize("name", ["imagenet", "folder", "tar"])
def test_tar_files_equal_folders(tmp_path: Path, layout: str, name: str) -> None:
    folders = write_folders(tmp_path / "folders")
    tars = tmp_path / "tars"
    for split in ("train", "val"):
        (tars / split).mkdir(parents=True)
        if layout == "one tar per split":
            pack(folders / split, tars / f"{split}.tar")
            (tars / split).rmdir()
        else:
            for label in ("ape", "bee", "cat"):
                pack(folders / split / label, tars / split / f"{label}.tar")
    wanted = build_dataset("imagenet", folders, "val", None)
    got = build_dataset(name, tars, "val", None)
    assert list(got.classes) == wanted.classes
    pictures = [Counter((p.tobytes(), t) for p, t in (d[i] for i in range(6))) for d in (got, wanted)]
    assert pictures[0] == pictures[1]


def test_bad_picture_in_a_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for member in ("ape/0.png", "bee/1.png"):
            info = tarfile.TarInfo(member)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"bad"))
    with pytest.raises(BadImageError, match=r"val.tar: bee/1.png"):
        build_dataset("tar", tmp_path, "val", None)[1]
    assert build_dataset("tar", tmp_path, "val", None, on_bad_image="skip")[1] is None


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100])
def test_damaged_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "val.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot use .*val.tar as tar files of images"):
        build_dataset("imagenet", tmp_path, "val", None)


# -------------------------------------------------- named sets

CATEGORIES = [
    {"kingdom": "Animalia", "supercategory": "Aves", "name": "n0"},
    {"kingdom": "Animalia", "supercategory": "Aves", "name": "n1"},
    {"kingdom": "Plantae", "supercategory": "Plantae", "name": "n2"},
    {"kingdom": "Plantae", "supercategory": "Plantae", "name": "n3"},
]


def write_inat(root: Path, year: int = 2018) -> Path:
    images = ["Plantae/2/t0.jpg", "Aves/0/t1.jpg", "Aves/1/t2.jpg", "Plantae/3/t3.jpg"]
    val = ["Aves/1/v0.jpg", "Plantae/2/v1.jpg"]
    (root / "categories.json").write_text(json.dumps(CATEGORIES))
    for split, files, annotated in (("train", images, (2, 0, 1, 3)), ("val", val, (1, 2))):
        listed = {
            "annotations": [{"category_id": number} for number in annotated],
            "images": [{"file_name": f"train_val{year}/{file}"} for file in files],
        }
        (root / f"{split}{year}.json").write_text(json.dumps(listed))
        for file in files:
            write_picture(root / f"train_val{year}" / file.split("/", 1)[1])
    return root


@pytest.mark.parametrize(
    ("category", "train", "val"), [("name", [0, 1, 2, 3], [2, 0]), ("kingdom", [0, 1, 1, 0], [1, 0])]
)
def test_inat_numbers_classes_by_first_train_annotation(
    tmp_path: Path, category: str, train: list[int], val: list[int]
) -> None:
    write_inat(tmp_path)
    for split, targets in (("train", train), ("val", val)):
        dataset = build_dataset("inat18", tmp_path, split, eval_transform(32), inat_category=category)
        assert [dataset[i][1] for i in range(len(dataset))] == targets
        assert num_classes(dataset) == len(set(train))
    assert dataset.samples[0][0] == str(tmp_path / "train_val2018" / "1" / "v0.jpg")


def test_inat_failures_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*categories.json"):
        build_dataset("inat18", tmp_path, "val", None)
    write_inat(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*train2019.json"):
        build_dataset("inat19", tmp_path, "val", None)
    with pytest.raises(DataError, match=r"--inat-category must be one of kingdom, .*, got 'species'"):
        build_dataset("inat18", tmp_path, "val", None, inat_category="species")
    (tmp_path / "val2018.json").write_text('{"images": [{"file_name": "a/b/3/v.jpg"}]}')
    (tmp_path / "train2018.json").write_text('{"annotations": [{"category_id": 0}]}')
    with pytest.raises(DataError, match=r"name 'n3' of a/b/3/v.jpg has no train annotation"):
        build_dataset("inat18", tmp_path, "val", None)
    for odd in (
        '{"annotations": [{"category": 0}]}',
        '{"annotations": 5}',
        '{"annotations": [{"category_id": 1e999}]}',
    ):
        (tmp_path / "train2018.json").write_text(odd)
        with pytest.raises(DataError, match=r"train2018.json or categories.json is no list of iNaturalist's"):
            build_dataset("inat18", tmp_path, "val", None)
    (tmp_path / "train2018.json").write_text("{")
    with pytest.raises(DataError, match=r"train2018.json is not valid JSON"):
        build_dataset("inat18", tmp_path, "val", None)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_where_it_belongs(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DataError, match=rf"{name} is not .*expected .*cifar-.*fetch it: python -c .*CIFAR100?\(.*; .* is empty"
    ):
        build_dataset(name, tmp_path, "train", None)


def test_cifar10_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # the real files are 160 MB
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    dataset = build_dataset("cifar10", tmp_path, "val", eval_transform(32))
    assert (len(dataset), num_classes(dataset), dataset[7][1]) == (10, 10, 7)
    picture = build_dataset("cifar10", tmp_path, "val", None)[7][0]
    assert np.array_equal(np.asarray(picture), pixels[7].reshape(3, 32, 32).transpose(1, 2, 0))


def test_timm_names(tmp_path: Path) -> None:
    write_folders(tmp_path)
    dataset = build_dataset("torch/image_folder", tmp_path, "val", eval_transform(32))
    assert (len(dataset), num_classes(dataset), dataset[5][1]) == (6, 3, 2)
    with pytest.raises(DataError, match=r"timm cannot open dataset 'wds/' \(root .*, split 'validation'\)"):
        build_dataset("wds/", tmp_path, "val", None)


def write_shards(root: Path, count: int, bad: tuple[int, ...], shards: int = 3) -> Path:
    """WebDataset shards of ``count`` pictures, those in ``bad`` undecodable; class = number."""
    names = [f"val-{shard}.tar" for shard in range(shards)]
    numbers = [list(range(shard, count, shards)) for shard in range(shards)]
    for name, inside in zip(names, numbers, strict=True):
        with tarfile.open(root / name, "w") as tar:
            for number in inside:
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
                picture = b"not a picture" if number in bad else buffer.getvalue()
                for suffix, content in (("png", picture), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    split = {"name": "validation", "filenames": names, "shard_lengths": [*map(len, numbers)], "num_samples": count}
    (root / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_webdataset_shards(tmp_path: Path, workers: int, world_size: int) -> None:
    pytest.importorskip("webdataset", reason="WebDataset shards need the package webdataset")
    from timm.data.readers import reader_wds

    timms = reader_wds.log_and_continue
    root = write_shards(tmp_path, 11, bad=(4, 9, 10))
    seen, skipped = [], 0
    for rank in range(world_size):
        dataset = build_dataset("wds/", root, "val", eval_transform(32), on_bad_image="skip")
        loader = eval_loader(dataset, batch_size=2, workers=workers, rank=rank, world_size=world_size)
        for _ in range(2):
            targets = [int(target) for _, batch in loader for target in batch]
        seen, skipped = seen + targets, skipped + loader.skipped
    assert (sorted(seen), skipped) == ([0, 1, 2, 3, 5, 6, 7, 8], 3)
    strict = eval_loader(build_dataset("wds/", root, "val", eval_transform(32)), batch_size=2, workers=workers)
    with pytest.raises(BadImageError, match=r"cannot decode image \S*val-[01].tar: (004|009|010) \(not in"):
        list(strict)
    assert reader_wds.log_and_continue is timms
    (root / "val-2.tar").write_bytes((root / "val-2.tar").read_bytes()[:700])
    torn = eval_loader(
        build_dataset("wds/", root, "val", eval_transform(32), on_bad_image="skip"), batch_size=2, workers=workers
    )
    with pytest.raises(DataError, match="cannot read a shard of"):
        list(torn)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"unknown dataset 'imagnet': give one of imagenet, inat18"):
        build_dataset("imagnet", None, "val", None)
    with pytest.raises(DataError, match="'folder' is known only once it is open: give --num-classes"):
        default_num_classes("folder")
    assert [default_num_classes(name) for name in ("IMNET", "CIFAR", "inat18", "inat19")] == [
        1000,
        100,
        8142,
        1010,
    ]


def test_a_wrong_path_is_said_without_opening_anything(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data directory .*nowhere does not exist; the nearest that does, .*is empty"):
        check_data_path("IMNET", tmp_path / "nowhere")
    with pytest.raises(DataError, match="'CIFAR' needs a data directory"):
        check_data_path("CIFAR", "")
    check_data_path("DIGITS", "")
    check_data_path("hfds/some/set", None)
    check_data_path("IMNET", tmp_path)
    check_data_path("fashion_full", "")  # may be installed
    with pytest.raises(DataError, match="nowhere does not exist"):
        check_data_path("fashion_full", tmp_path / "nowhere")
    assert reads_folder("digits_of_mine")


@pytest.mark.parametrize("name", INSIDE)
def test_what_ships_inside_is_asked_for_no_folder(name: str, tmp_path: Path) -> None:
    check_data_path(name, tmp_path / "nowhere")
    assert len(build_dataset(name, tmp_path / "nowhere", "val", None))


# -------------------------------------------------- images kept decoded


def test_kept_images_are_the_same_tensors_and_are_not_decoded_again(tmp_path: Path, monkeypatch) -> None:
    root, kept = write_folders(tmp_path / "data", ("val",)), tmp_path / "kept"
    transform = eval_transform(24)
    plain = torch.stack([image for image, _ in build_dataset("folder", root, "val", transform)])

    def opened(transform=transform, **options):
        return build_dataset("folder", root, "val", transform, keep_decoded=kept, **options)

    def batches(workers: int, **options) -> torch.Tensor:
        loader = eval_loader(opened(**options), batch_size=4, workers=workers)
        return torch.cat([images for images, _ in loader])

    for workers in (0, 2):  # two processes fill one file
        assert torch.equal(plain, batches(workers))
    (file,) = kept.iterdir()
    monkeypatch.setattr(datasets, "load_image", lambda path: pytest.fail(f"{path} is decoded again"))
    assert torch.equal(plain, batches(0))
    monkeypatch.undo()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a damaged record is made again, and so is one that is cut off
    file.write_bytes(content[:-5])
    assert torch.equal(plain, batches(0))
    assert file.read_bytes() != content[:-5]
    opened(eval_transform(20))
    write_picture(root / "val" / "ape" / "0.png", seed=77)
    assert not torch.equal(opened()[0][0], plain[0])
    assert len(list(kept.iterdir())) == 3  # another size, another image: another file


def test_images_that_cannot_be_kept_are_refused_or_passed_over(tmp_path: Path, monkeypatch) -> None:
    root, kept = write_folders(tmp_path / "data", ("val",)), tmp_path / "kept"
    (root / "val" / "ape" / "0.png").write_bytes(b"no image")
    dataset = build_dataset("folder", root, "val", eval_transform(24), keep_decoded=kept, on_bad_image="skip")
    assert [dataset[i] is None for i in (0, 0, 1)] == [True, True, False]
    with pytest.raises(DataError, match="--cache-decoded keeps image files"):
        build_dataset("digits", None, "val", eval_transform(32), keep_decoded=kept)
    with pytest.raises(DataError, match="--cache-decoded keeps image files"):
        build_dataset("folder", root, "val", train_transform(24), keep_decoded=kept)

    def full(*place: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="is the disk full"):
        dataset[2]
    with pytest.raises(OutputError, match=r"^cannot write [^\n]*is the disk full[^\n]*$"):  # as a worker has it, too
        list(eval_loader(dataset, batch_size=4, workers=1))
    (root / "val" / "ape" / "1.png").unlink()
    (root / "val" / "ape" / "1.png").symlink_to(root / "nowhere")
    with pytest.raises(DataError, match=r"cannot read image .*1\.png: No such file"):
        build_dataset("folder", root, "val", eval_transform(24), keep_decoded=kept)


def test_kept_images_are_of_these_files_and_no_others(tmp_path: Path, monkeypatch) -> None:
    def opened(root: str | Path) -> Any:
        return build_dataset("folder", root, "val", eval_transform(24), keep_decoded=tmp_path / "kept")

    def write(path: Path, seed: int) -> None:  # as an archive unpacks it: equal sizes, equal times
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))

    image, found = Path("data", "val", "ape", "0.bmp"), []
    for seed, folder in enumerate(("one", "two")):  # the same relative path, two data sets
        write(tmp_path / folder / image, seed)
        monkeypatch.chdir(tmp_path / folder)
        found.append(opened("data")[0][0])
    assert not torch.equal(*found)
    dataset = opened("data")
    dataset.file.unlink()
    dataset = opened("data")
    write(tmp_path / "two" / image, 2)  # replaced after the data set was opened: used, not kept
    assert not torch.equal(dataset[0][0], found[1])
    assert dataset.file.stat().st_size == 0
    dataset = opened("data")
    expected = dataset[0][0]
    copy = pickle.loads(pickle.dumps(dataset))  # as workers that are not forked get it: with a file of its own
    assert copy.descriptor != dataset.descriptor
    assert torch.equal(copy[0][0], expected)
    other = opened(tmp_path / "one" / "data")
    shutil.copy(dataset.file, other.file)  # a file of other images under this one's name
    assert torch.equal(other[0][0], found[0])


def test_rates_of_every_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = loading.main(["--number", "2", "--rounds", "1", "--output", str(tmp_path / "rates.json")])
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "rates.json").read_text())["images_per_second"] == found
    assert list(found["evaluation at 224"]) == ["ours", "timm", "torchvision", "kept"]
    assert "kept" not in found["crop and flip: uvc"]
    assert all(rate > 0 for rates in found.values() for rate in rates.values())
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found)
    assert "| evaluation at 224 | " in loading.markdown(tmp_path)
    assert loading.markdown(tmp_path / "none") == "*Nothing is recorded yet.*"

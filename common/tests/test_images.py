"""Images of users: 16 bits and floating point, other formats, links, pipes; the same in every program."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.datasets import INaturalist
from common.data.images import BadImageError, decode_image, load_image
from common.data.loaders import DataError, build_dataset, eval_loader, eval_transform
from common.hosts.trade import check_files, image_files
from common.run.checkpoint import CheckpointError, load_safely
from hourglass_swag import predict
from hourglass_swag.evaluation import transform_image
from scala.ucf101 import read_frames
from sit.visualize import open_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = RAMP.astype(np.uint16) * 257


def encoded(values: np.ndarray, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form, **options)
    return buffer.getvalue()


def portable(depth: int) -> bytes:
    """A PGM of 16 bits per value, of which ``depth`` are used."""
    values = np.round(RAMP * ((2**depth - 1) / 255)).astype(">u2")
    return f"P5 16 16 {2**depth - 1}\n".encode() + values.tobytes()


def tiff_of_12_bits() -> bytes:
    """Two values in three bytes, 16 times 0 to 4095, as Pillow reads but does not write it."""
    values = np.round(RAMP.astype(int) * 4095 / 255).astype(int).reshape(-1, 2)
    packed = bytearray()
    for first, second in values.tolist():
        packed += bytes((first >> 4, (first & 15) << 4 | second >> 8, second & 255))
    tags = ((256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, len(packed)))
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\3\0" + b"\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags
    )
    directory = len(tags).to_bytes(2, "little") + entries + bytes(4)
    return b"II*\0" + (8 + len(packed)).to_bytes(4, "little") + bytes(packed) + directory


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded(DEEP, "PNG"), id="png of 16 bits"),
        pytest.param(encoded(DEEP, "TIFF"), id="tiff of 16 bits"),
        pytest.param(encoded(DEEP.astype(">u2"), "TIFF"), id="tiff of 16 bits, big end first"),
        pytest.param(encoded(65535 - DEEP, "TIFF", tiffinfo={262: 0}), id="tiff of 16 bits, white is zero"),
        pytest.param(tiff_of_12_bits(), id="tiff of 12 bits"),
        pytest.param(encoded((RAMP / 255).astype(np.float32), "TIFF"), id="tiff of floats"),
        pytest.param(encoded(DEEP, "JPEG2000", irreversible=False), id="jpeg2000 of 16 bits"),
        pytest.param(portable(16), id="pgm of 16 bits"),
        pytest.param(portable(12), id="pgm of 12 bits"),
        pytest.param(encoded(RAMP, "GIF"), id="gif"),
        pytest.param(encoded(RAMP, "PNG"), id="png of 8 bits"),
    ],
)
def test_every_depth_keeps_its_grey_levels(content: bytes) -> None:
    image = decode_image(io.BytesIO(content), "ramp")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(RAMP[..., None], 3, 2))


def test_colours_of_16_bits_keep_their_levels() -> None:
    colours = np.stack([DEEP, DEEP[::-1], DEEP.T], 2)
    image = decode_image(io.BytesIO(b"P6 16 16 65535\n" + colours.astype(">u2").tobytes()), "colours")
    assert np.array_equal(np.asarray(image), colours // 257)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((RAMP.astype(np.float32)), r"grey values from 0 to 255 in mode F"),
        (np.full((8, 8), -0.5, np.float32), r"from -0.5 to -0.5 in mode F"),
        (np.full((8, 8), np.nan, np.float32), r"from nan to nan in mode F"),
        (np.full((8, 8), 100_000, np.int32), r"from 100000 to 100000 in mode I"),
        (np.full((8, 8), 200, np.int32), r"from 200 to 200 in mode I"),  # of 2 ** 32, or of 256?
    ],
)
def test_grey_levels_without_a_known_range_are_named(values: np.ndarray, named: str, tmp_path: Path) -> None:
    (tmp_path / "odd.tif").write_bytes(encoded(values, "TIFF"))
    with pytest.raises(BadImageError, match=rf"cannot decode image .*odd.tif .*{named}.* expected 8 bits.*replace it"):
        load_image(tmp_path / "odd.tif")


# -------------------------------------------------- every program


def deep_frames(folder: Path) -> np.ndarray:
    return read_frames(folder, 1, random=False)[0].permute(1, 2, 0).numpy()


def in_a_tar(folder: Path) -> Any:
    with tarfile.open(folder / "val.tar", "w") as tar:
        tar.add(folder / "deep.tiff", "a/deep.tiff")
    return build_dataset("tar", folder, "val", None)[0][0]


def in_a_folder(folder: Path, name: str = "folder") -> Any:
    (folder / "val" / "a").mkdir(parents=True)
    (folder / "val" / "a" / "deep.tiff").write_bytes((folder / "deep.tiff").read_bytes())
    return build_dataset(name, folder, "val", None)[0][0]


def of_inat(folder: Path) -> Any:
    (folder / "a" / "0").mkdir(parents=True)
    (folder / "a" / "0" / "deep.tiff").write_bytes((folder / "deep.tiff").read_bytes())
    (folder / "categories.json").write_text(json.dumps([{"name": "a"}]))
    image = {"file_name": "a/b/0/deep.tiff"}
    (folder / "val2018.json").write_text(json.dumps({"images": [image]}))
    (folder / "train2018.json").write_text(json.dumps({"annotations": [{"category_id": 0}]}))
    return INaturalist(folder, "val", None, year=2018, category="name")[0][0]


@pytest.mark.parametrize(
    "opened",
    [
        in_a_folder,
        lambda folder: in_a_folder(folder, "torch/image_folder"),
        in_a_tar,
        of_inat,
        deep_frames,
        lambda folder: open_image(folder / "deep.tiff"),
        lambda folder: load_image(check_files(image_files(folder)).files[0]),
    ],
    ids=["folder", "torch folder", "tar", "inat", "frames", "sit", "hosts"],
)
def test_every_reader_keeps_16_bits(opened: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "deep.tiff").write_bytes(encoded(DEEP, "TIFF"))
    assert np.array_equal(np.asarray(opened(tmp_path)), np.repeat(RAMP[..., None], 3, 2))


def test_classifiers_see_16_bits_as_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(predict, "classify", lambda model, image, *rest: seen.append(transform_image(image, 16)) or [])
    for name, values in (("deep.png", DEEP), ("plain.png", RAMP)):
        (tmp_path / name).write_bytes(encoded(values, "PNG"))
        predict.main([str(tmp_path / name), "-m", "vit_desk", "--no-pretrained", "--device", "cpu"])
    assert torch.equal(*seen)
    assert torch.equal(transform_image(Image.open(tmp_path / "deep.png"), 16), seen[1])


def test_webdataset_keeps_16_bits(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset shards need the package webdataset")
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        for key, content in (("0", encoded(DEEP, "PNG")), ("1", encoded(RAMP.astype(np.float32), "TIFF"))):
            for suffix, part in (("png", content), ("cls", b"3")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    split = {"name": "validation", "filenames": ["val-0.tar"], "shard_lengths": [2], "num_samples": 2}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    deep, bad = build_dataset("wds/", tmp_path, "val", None, on_bad_image="skip")
    assert np.array_equal(np.asarray(deep[0]), np.repeat(RAMP[..., None], 3, 2))
    assert bad is None
    with pytest.raises(BadImageError, match=r"val-0.tar: 1 .*grey values from 0 to 255"):
        list(build_dataset("wds/", tmp_path, "val", None))


# -------------------------------------------------- folders


@pytest.fixture
def impatient() -> Iterator[None]:
    """A test that waits for a pipe or goes round in circles fails instead."""
    before = signal.signal(signal.SIGALRM, lambda *unused: pytest.fail("blocked"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def class_folders(root: Path, count: int = 2) -> Path:
    for label in ("ape", "bee"):
        (root / label).mkdir(parents=True)
        for number in range(count):
            (root / label / f"{number}.png").write_bytes(encoded(RAMP + number, "PNG"))
    return root


def test_images_that_pillow_cannot_read_are_named_or_counted(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    (root / "ape" / "2.GIF").write_bytes(encoded(RAMP, "GIF"))
    (root / "bee" / "2.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "bee" / "notes.txt").write_text("no image")
    skipping = eval_loader(build_dataset("folder", root, "val", eval_transform(16), on_bad_image="skip"), batch_size=4)
    assert (sum(len(labels) for _, labels in skipping), skipping.skipped) == (5, 1)
    with pytest.raises(BadImageError, match=r"bee/2.heic \(not in a format that Pillow knows\)"):
        list(eval_loader(build_dataset("folder", root, "val", eval_transform(16)), batch_size=4))
    assert [file.name for file in image_files(root / "bee")] == ["0.png", "1.png", "2.heic"]


@pytest.mark.usefixtures("impatient")
def test_links_that_lead_round_add_no_image(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    for label in ("ape", "bee"):  # two in each: gone through naively, 2 ** 40 ways
        (root / label / "up").symlink_to(root)
        (root / label / "self").symlink_to(root / label)
    (root / "ape" / "more").mkdir()
    (root / "ape" / "more" / "9.png").write_bytes(encoded(RAMP, "PNG"))
    (root / "ape" / "again").symlink_to(root / "ape" / "more")
    dataset: Any = build_dataset("folder", root, "val", None)
    names = [os.path.relpath(path, root) for path, _ in dataset.samples]
    assert names == ["ape/0.png", "ape/1.png", "ape/again/9.png", "bee/0.png", "bee/1.png"]


def test_links_to_images_elsewhere_are_followed(tmp_path: Path) -> None:
    class_folders(tmp_path / "real")
    (tmp_path / "linked" / "bee").mkdir(parents=True)
    (tmp_path / "linked" / "ape").symlink_to(tmp_path / "real" / "ape")
    (tmp_path / "linked" / "bee" / "0.png").symlink_to(tmp_path / "real" / "bee" / "0.png")
    dataset: Any = build_dataset("folder", tmp_path / "linked", "val", None)
    assert dataset.targets == [0, 0, 1]


@pytest.mark.parametrize("target", ["loop", ".", "..", "gone"])
def test_class_folders_that_are_no_folders_are_named(tmp_path: Path, target: str) -> None:
    root = class_folders(tmp_path / "data")
    (root / "loop").symlink_to(target)
    with pytest.raises(DataError, match=r"data/loop is a link that leads nowhere or to a folder that it lies in"):
        build_dataset("folder", root, "val", None)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scan = class_folders(tmp_path), os.scandir
    (root / "bee" / "inside").mkdir()

    def refuse(place: Any) -> Any:  # the tests may run as root, who may read everything
        if str(place).endswith("inside"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read folder .*bee/inside: Permission denied"):
        build_dataset("folder", root, "val", None)


# -------------------------------------------------- pipes


@pytest.mark.usefixtures("impatient")
def test_pipes_never_block(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    os.mkfifo(root / "bee" / "2.png")
    skipping = eval_loader(build_dataset("folder", root, "val", eval_transform(16), on_bad_image="skip"), batch_size=4)
    assert (sum(len(labels) for _, labels in skipping), skipping.skipped) == (4, 1)
    with pytest.raises(BadImageError, match=r"bee/2.png \(NotAFile: .*not a regular file\)"):
        build_dataset("folder", root, "val", None)[4]
    with pytest.raises(BadImageError, match=r"bee/2.png .*not a regular file"):
        check_files(image_files(root / "bee"))
    with pytest.raises(BadImageError, match=r"bee/2.png .*not a regular file"):
        predict.main([str(root / "bee" / "2.png"), "-m", "vit_desk", "--no-pretrained", "--device", "cpu"])
    for suffix in ("gif", "mp4"):
        os.mkfifo(tmp_path / f"clip.{suffix}")
        with pytest.raises(BadImageError, match=rf"clip.{suffix} is neither a folder nor a file"):
            read_frames(tmp_path / f"clip.{suffix}", 2, random=False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe is a pipe or a device"):
        build_dataset("folder", tmp_path / "pipe", "val", None)
    with pytest.raises(CheckpointError, match=r"pipe: found a pipe or a device"):
        load_safely(tmp_path / "pipe")
    (tmp_path / "tars").mkdir()
    os.mkfifo(tmp_path / "tars" / "val.tar")
    for name in ("folder", "tar"):
        with pytest.raises(DataError, match=r"val.tar"):
            build_dataset(name, tmp_path / "tars", "val", None)
    os.mkfifo(tmp_path / "categories.json")
    with pytest.raises(DataError, match=r"cannot read .*categories.json"):
        INaturalist(tmp_path, "val", None, year=2018, category="name")

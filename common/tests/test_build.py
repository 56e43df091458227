"""Images and class counts from settings."""

import logging
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from common.data.build import build_loaders, build_mixup, check_trained_classes, count_classes, open_split
from common.run.errors import DataError, UsageError
from common.run.settings import AugmentationSettings, DataSettings

DIGITS = DataSettings("digits", "", input_size=32, batch_size=16, workers=0, pin_mem=False)


def test_loaders_of_both_splits_and_of_one() -> None:
    both = build_loaders(DIGITS, AugmentationSettings(hflip=0.0, repeated_aug=False), eval_batch_size=24)
    assert both.train is not None
    images, targets = next(iter(both.train))
    assert (images.shape, targets.shape, both.classes) == ((16, 3, 32, 32), (16,), 10)
    assert next(iter(both.held_out))[0].shape[0] == 24
    assert build_loaders(DIGITS).train is None


@pytest.mark.parametrize("data_set", ["IMNET", "tar", "torch/image_folder"])
def test_splits_of_other_classes_are_refused(tmp_path: Path, data_set: str) -> None:
    for split, names in (("train", "abc"), ("val", "abd")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
        if data_set == "tar":
            with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
                archive.add(tmp_path / split, "images")
            shutil.rmtree(tmp_path / split)
    settings = DataSettings(data_set, str(tmp_path), 8, 1, workers=0, pin_mem=False)
    with pytest.raises(DataError, match=r"\['c'\].*\['d'\].*class numbers would not agree"):
        build_loaders(settings, AugmentationSettings(repeated_aug=False))


def test_classes_that_a_checkpoint_was_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    images, digits = build_loaders(DIGITS).held_out, [str(digit) for digit in range(10)]
    for passes in ({}, [], {"data": None}, {"data": {"classes": "\n".join(digits)}}):
        check_trained_classes(passes, images, "a.pth")
    assert not caplog.records
    with pytest.raises(DataError, match=r"a\.pth: these are not the classes that it was trained on"):
        check_trained_classes({"data": {"classes": "\n".join(reversed(digits))}}, images, "a.pth")
    package = logging.getLogger("common")
    package.addHandler(caplog.handler)
    check_trained_classes({"data": {"classes": "\n".join("abcdefghij")}}, images, "a.pth")
    package.removeHandler(caplog.handler)
    assert "a.pth was trained on classes of other names (a, ...) than the images have (0, ...)" in caplog.text


def test_mixup_only_where_something_is_mixed() -> None:
    assert build_mixup(AugmentationSettings(mixup=0.0, cutmix=0.0), 10) is None
    mixup = build_mixup(AugmentationSettings(cutmix=0.0, smoothing=0.2), 7)
    assert mixup is not None
    assert (mixup.num_classes, mixup.label_smoothing, mixup.cutmix_alpha) == (7, 0.2, 0.0)


def test_classes_come_from_the_data_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    images = open_split(DataSettings("IMNET", str(tmp_path), 32, 1), "val", None)
    assert count_classes("IMNET", images) == 3
    assert "the data set has 3 classes, not imagenet's 1000" in caplog.text
    caplog.clear()
    assert count_classes("IMNET", images, 1000) == 1000
    assert "--num-classes 3 was probably meant" in caplog.text
    with pytest.raises(UsageError, match="has 3 classes and the network 2"):
        count_classes("IMNET", images, 2)
    caplog.clear()
    assert count_classes("digits", open_split(DIGITS, "val", None)) == 10
    assert not caplog.text

"""Transforms: the published recipes, and the posterise that Pillow no longer accepts."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, posterize
from torchvision import transforms
from torchvision.transforms import functional as F

from common.data.loaders import eval_transform, seeded, train_transform
from common.data.transforms import Pipeline, posterize_any
from common.run.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def posterisers(pipeline: transforms.Compose) -> list[AugmentOp]:
    (augment,) = (step for step in pipeline.transforms if type(step).__name__ in ("RandAugment", "AutoAugment"))
    operations = getattr(augment, "ops", None) or [op for policy in augment.policy for op in policy]
    return [operation for operation in operations if operation.name.startswith("Posterize")]


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-n3-m9-mstd0.5-inc1", "rand-m9", "v0", "v0r", "original"]
)
def test_every_magnitude_posterises(picture: Image.Image, policy: str) -> None:
    operations = posterisers(train_transform(64, auto_augment=policy))
    assert operations
    black = 0
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in np.linspace(-1, 12, 53):
            operation.magnitude = float(magnitude)
            (bits,) = operation.level_fn(max(0.0, min(operation.magnitude, 10.0)), operation.hparams)
            expected = np.asarray(picture) & (256 - (1 << (8 - bits)))  # only the uppermost bits, or none
            assert np.array_equal(np.asarray(operation(picture)), expected)
            black += bits == 0
    assert black > 0 or policy == "original"  # the case that Pillow 13 refuses does occur


def test_posterise_of_other_pipelines_is_left_alone(picture: Image.Image) -> None:
    from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform

    train_transform(64)
    assert NAME_TO_OP["PosterizeIncreasing"] is posterize
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 10})
    assert all(operation.aug_fn is not posterize_any for operation in theirs.ops)


def test_recipe_survives_many_pictures(picture: Image.Image) -> None:
    transform = train_transform(
        16, auto_augment="rand-n15-m10-mstd0.5-inc1", scale=(0.9, 1.0)
    )  # 0 bits in every other one
    assert all(torch.isfinite(transform(picture)).all() for _ in range(60))


def test_deit_recipe() -> None:
    steps = [type(step).__name__ for step in train_transform(224).transforms]
    assert steps == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    crop, flip, augment, *_, erase = train_transform(224).transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (0.75, 4 / 3))
    assert (flip.p, augment.num_layers, erase.probability, erase.per_pixel) == (0.5, 2, 0.25, True)


def test_small_pictures_are_padded_and_cropped() -> None:
    crop = train_transform(32).transforms[0]
    assert isinstance(crop, transforms.RandomCrop)
    assert (crop.size, crop.padding) == ((32, 32), 4)
    stretched = train_transform(32, scale=(0.05, 1.0)).transforms[0]  # asked for by UVC on CIFAR
    assert stretched.scale == (0.05, 1.0)


def test_plain_recipe_is_crop_flip_and_normalisation() -> None:
    plain = train_transform(64, auto_augment=None, color_jitter=None, erase_probability=0.0, interpolation="bilinear")
    assert [type(step).__name__ for step in plain.transforms[2:]] == ["MaybeToTensor", "Normalize"]


def test_three_augment_is_grey_solarised_or_blurred(picture: Image.Image) -> None:
    pipeline = train_transform(64, three_augment=True)
    kinds = [type(step).__name__ for step in pipeline.transforms]
    assert kinds[2:] == ["AutoAugment", "ColorJitter", "MaybeToTensor", "Normalize"]  # no erasing
    choose = pipeline.transforms[2]
    random.seed(0)
    results = [np.asarray(choose(picture), dtype=int) for _ in range(60)]
    grey = np.asarray(picture.convert("L").convert("RGB"))
    solarised = np.asarray(ImageOps.solarize(picture, 128))
    share_grey = np.mean([np.array_equal(result, grey) for result in results])
    share_solarised = np.mean([np.array_equal(result, solarised) for result in results])
    assert 0.2 < share_grey < 0.5
    assert 0.2 < share_solarised < 0.5
    jitter = pipeline.transforms[3]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
    assert jitter.hue is None


def test_simple_random_crop_of_three_augment(picture: Image.Image) -> None:
    resize, crop, *_ = train_transform(64, three_augment=True, simple_random_crop=True).transforms
    assert (resize.size, crop.padding, crop.padding_mode) == (64, 4, "reflect")
    with pytest.raises(ValueError, match="ThreeAugment"):
        train_transform(64, simple_random_crop=True)
    with pytest.raises(UsageError, match="timm makes no transform of --aa rend-m9"):
        train_transform(64, auto_augment="rend-m9")


@pytest.mark.parametrize(("size", "ratio", "resized"), [(224, 0.875, 256), (288, 0.875, 329), (512, 1.0, 512)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_resizes_and_crops(
    picture: Image.Image, size: int, ratio: float, resized: int, interpolation: str
) -> None:
    got = eval_transform(size, crop_ratio=ratio, interpolation=interpolation)(picture)
    width, height = int(resized * 90 / 70), resized
    pil = picture.resize((width, height), getattr(Image.Resampling, interpolation.upper()))
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(pil.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    wanted = (torch.from_numpy(pixels).permute(2, 0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_evaluation_leaves_small_pictures_as_they_are() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    torch.testing.assert_close(eval_transform(32)(small), F.normalize(F.to_tensor(small), list(MEAN), list(STD)))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_ratio must be in \(0, 1\], got 0"):
        eval_transform(224, crop_ratio=0)
    with pytest.raises(ValueError, match="'random' belongs to"):
        eval_transform(224, interpolation="random")


def test_seeded_transform_repeats(picture: Image.Image) -> None:
    transform = train_transform(48, interpolation="random")
    with seeded(1, 2, 3):
        first = transform(picture)
    with seeded(1, 2, 3):
        again = transform(picture)
    with seeded(1, 2, 4):
        other = transform(picture)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_pipeline_gives_the_bits_of_its_steps() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tail = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    for steps in (tail, [transforms.CenterCrop(6), *tail, transforms.RandomErasing(0.0)], tail[:1]):
        wanted = transforms.Compose(steps)(image)
        found = Pipeline(steps)(image)
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()
    assert torch.equal(Pipeline(tail)(pixels), transforms.Compose(tail)(pixels))
    grey = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    assert torch.equal(Pipeline(grey)(image.convert("L")), transforms.Compose(grey)(image.convert("L")))
    before = image.tobytes()
    Pipeline(tail)(image)
    assert image.tobytes() == before

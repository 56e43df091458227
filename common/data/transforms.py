"""Image -> tensor: DeiT's training recipe, 3-Augment and the evaluation resize, all built by timm and torchvision.

Mixup and CutMix act on batches: papers build ``timm.data.Mixup`` next to their step function.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from common.run.errors import UsageError

Transform = Callable[[Image.Image], torch.Tensor]


class Pipeline(transforms.Compose):
    """A ``Compose`` that makes a tensor of an RGB image and normalises it in one go: the same bits in half of the time.

    Takes what ``ToTensor`` takes.
    """

    def __call__(self, img: Any) -> Any:
        steps = iter(self.transforms)
        for step in steps:
            after = next(steps, None) if isinstance(step, transforms.ToTensor) else None
            rgb = img.dtype == np.uint8 if isinstance(img, np.ndarray) else getattr(img, "mode", "") == "RGB"
            if isinstance(after, transforms.Normalize) and rgb:
                img = _normalized(img if isinstance(img, np.ndarray) else np.array(img), after)
                continue
            img = step(img)
            if after is not None:
                img = after(img)
        return img


def _normalized(pixels: np.ndarray, how: transforms.Normalize) -> torch.Tensor:
    """(3, height, width) of bytes (height, width, 3): one copy, and no other."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    image = planes.to(torch.get_default_dtype(), memory_format=torch.contiguous_format)
    mean, std = (torch.as_tensor(numbers, dtype=image.dtype)[:, None, None] for numbers in (how.mean, how.std))
    return image.div_(255).sub_(mean).div_(std)


SMALL = 32  # up to this side in pixels, DeiT takes images as they are: padded crops, no resize


def train_transform(
    size: int,
    *,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = 0.3,
    interpolation: str = "bicubic",
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    hflip: float = 0.5,
    erase_probability: float = 0.25,
    erase_mode: str = "pixel",
    erase_count: int = 1,
    three_augment: bool = False,
    simple_random_crop: bool = False,
    crop_padding: int = 4,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Training transform of a (3, size, size) tensor; the defaults are DeiT's.

    Random resized crop, flip, RandAugment (or colour jitter where ``auto_augment`` is empty), normalisation, random
    erasing. At ``size`` <= 32 the crop becomes a random crop of the padded image, as in DeiT.

    Args:
        size: side of the result in pixels.
        auto_augment: timm policy, or None (also ``""`` and ``"none"``).
        color_jitter: strength of brightness, contrast and saturation; unused under RandAugment (timm's rule).
        interpolation: ``bicubic``, ``bilinear``, or ``random`` for one of the two per image.
        scale, ratio: area and aspect ratio of the crop; None for (0.08, 1) and (3/4, 4/3).
        three_augment: DeiT III's 3-Augment (one of greyscale, solarise, blur, then colour jitter, no erasing) in
            place of ``auto_augment`` and the erasing.
        simple_random_crop: with ``three_augment``, resize and crop after a reflected border of 4 pixels.
        crop_padding: pixels around an image of up to 32; 4 in DeiT.

    Source: DeiT, arXiv:2012.12877, Table 9; DeiT III, arXiv:2204.07118, section 3.
    """
    if simple_random_crop and not three_augment:
        raise ValueError("simple_random_crop belongs to 3-Augment: set three_augment too (--ThreeAugment)")
    policy = "3a" if three_augment else auto_augment
    try:
        pipeline = create_transform(
            size,
            is_training=True,
            color_jitter=color_jitter,  # pyright: ignore[reportArgumentType]  # timm tests it for None
            auto_augment=None if policy in (None, "", "none") else policy,
            interpolation=interpolation,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            re_prob=0.0 if three_augment else erase_probability,
            re_mode=erase_mode,
            re_count=erase_count,
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, ValueError) as error:
        raise UsageError(f"timm makes no transform of --aa {policy}, --color-jitter {color_jitter}: {error}") from error
    assert isinstance(pipeline, transforms.Compose)
    crop, *rest = pipeline.transforms
    if simple_random_crop:
        border = transforms.RandomCrop(size, padding=4, padding_mode="reflect")
        pipeline.transforms = [transforms.Resize(size, interpolation=_mode(interpolation)), border, *rest]
    elif size <= SMALL and scale is None and ratio is None:
        pipeline.transforms = [transforms.RandomCrop(size, padding=crop_padding), *rest]
    else:
        pipeline.transforms = [crop, *rest]
    return accept_zero_bits(Pipeline(pipeline.transforms))


def eval_transform(
    size: int,
    *,
    crop_ratio: float = 0.875,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Shorter side to int(size / crop_ratio) pixels, centre crop, normalisation: a (3, size, size) tensor.

    ``crop_ratio`` 0.875 is the 256-to-224 rule of DeiT and of those that follow it, 1.0 is SWAG's. At ``size`` <= 32
    it counts as 1, so that a 32x32 image passes untouched, as in DeiT.
    """
    if not 0 < crop_ratio <= 1:
        raise UsageError(f"crop_ratio must be in (0, 1], got {crop_ratio}")
    resized = size if size <= SMALL else int(size / crop_ratio)
    return Pipeline(
        [
            transforms.Resize(resized, interpolation=_mode(interpolation)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def _mode(interpolation: str) -> transforms.InterpolationMode:
    if interpolation == "random":
        raise ValueError("interpolation 'random' belongs to the random resized crop; choose bicubic or bilinear here")
    return transforms.InterpolationMode(interpolation)


def posterize_any(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """timm's posterise, extended to 0 bits, which give the black image that they always meant.

    ``rand-m9-mstd0.5-inc1`` draws its magnitude from a normal distribution around 9 and cuts it at 10, where 4 - 4 = 0
    bits are kept. Pillow masked all bits then, hence black, until version 13 made it a ValueError, which kills a
    training run after some thousand images. The published models were trained with the black image (one in about
    660), so 0 bits stay black here instead of becoming 1 bit.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)  # black
    return posterize(image, bits_to_keep, **unused)


def accept_zero_bits(pipeline: transforms.Compose) -> transforms.Compose:
    """Give the posterise operations of this pipeline, and of no other, the 0-bit case; see ``posterize_any``."""
    for operation in _augment_ops(pipeline.transforms):
        if operation.aug_fn is posterize:
            operation.aug_fn = cast(Any, posterize_any)  # timm's annotation is that of one function
    return pipeline


def _augment_ops(steps: Sequence[object]) -> Iterator[AugmentOp]:
    """timm's elementary operations inside RandAugment and AugMix (``ops``) and AutoAugment (``policy``)."""
    for step in steps:
        if isinstance(step, AugmentOp):
            yield step
        elif isinstance(step, (list, tuple)):
            yield from _augment_ops(step)
        else:
            yield from _augment_ops(getattr(step, "ops", None) or getattr(step, "policy", None) or ())

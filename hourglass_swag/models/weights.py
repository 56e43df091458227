"""Published SWAG checkpoints: where they are, how their two layouts relate, and how they fit another resolution.

The published files hold a flat state dict. torchvision hosts the same weights of the classifiers under other names.
The weights are licensed CC-BY-NC 4.0.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.run.checkpoint import CheckpointError, fetch, hub_folder, list_key_differences, load_safely, select_state
from common.run.program import get_logger

logger = get_logger(__name__)

POSITION_KEY = "encoder.pos_embedding"

# In this order: torchvision's name -> published name. Files of either generation of torchvision's MLP occur.
_TORCHVISION_NAMES = (
    (re.compile(r"^encoder\.layers\.encoder_layer_(\d+)\."), r"encoder.layers.layer_\1."),
    (re.compile(r"\.mlp\.0\."), ".mlp.linear_1."),
    (re.compile(r"\.mlp\.3\."), ".mlp.linear_2."),
    (re.compile(r"^heads\.(head|pre_logits)\."), r"head.layers.\1."),
)


def is_torchvision(state: Mapping[str, Any]) -> bool:
    """Whether a ViT state dict has torchvision's names."""
    return "heads.head.weight" in state or any(".encoder_layer_" in key for key in state)


def convert_torchvision(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a ViT state dict under the published names, the position embedding turned to (N, 1, C)."""
    if not is_torchvision(state):
        return dict(state)
    converted: dict[str, Any] = {}
    for key, value in state.items():
        for pattern, name in _TORCHVISION_NAMES:
            key = pattern.sub(name, key)
        converted[key] = value
    if POSITION_KEY in converted and converted[POSITION_KEY].dim() == 3:
        converted[POSITION_KEY] = converted[POSITION_KEY].transpose(0, 1).contiguous()
    return converted


# torchvision's name of a RegNet entry -> published name.
_TORCHVISION_REGNET_NAMES = (
    (re.compile(r"^stem\."), "stem.stem."),
    (re.compile(r"\.proj\.0\."), ".proj."),
    (re.compile(r"\.proj\.1\."), ".bn."),
    (re.compile(r"\.se\.fc1\."), ".se.excitation.0."),
    (re.compile(r"\.se\.fc2\."), ".se.excitation.2."),
    (re.compile(r"\.f\.c\.0\."), ".f.c."),
    (re.compile(r"\.f\.c\.1\."), ".f.final_bn."),
    (re.compile(r"^fc\."), "head.fc."),
)


def convert_torchvision_regnet(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a RegNet state dict under the published names."""
    if "stem.0.weight" not in state:
        return dict(state)
    converted: dict[str, Any] = {}
    for key, value in state.items():
        for pattern, name in _TORCHVISION_REGNET_NAMES:
            key = pattern.sub(name, key)
        converted[key] = value
    return converted


def resize_position_embedding(state: Mapping[str, Any], seq_length: int, width: int, *, class_tokens: int) -> Tensor:
    """The position embedding of a checkpoint, for another number of patches if need be.

    Bicubic with aligned corners, as the published loader and torchvision's do (timm's differs).

    Args:
        state: state dict of the published layout.
        seq_length: number of tokens N wanted, class tokens included.
        width: C.
        class_tokens: leading entries that are not patches and are not resized.

    Returns:
        (N, 1, C); the checkpoint's own tensor if the size is right.

    Raises:
        KeyError: if there is none in ``state``.
        ValueError: if it has another width, or its patches or those wanted are no square.
    """
    if POSITION_KEY not in state:
        raise KeyError(f"{POSITION_KEY} is missing: not a ViT checkpoint; it starts with the keys {list(state)[:5]}")
    embedding: Tensor = state[POSITION_KEY]
    if embedding.dim() != 3 or embedding.shape[1:] != (1, width):
        raise ValueError(f"{POSITION_KEY} must have shape (N, 1, {width}), got {tuple(embedding.shape)}")
    if embedding.shape[0] == seq_length:
        return embedding
    patches, wanted = embedding.shape[0] - class_tokens, seq_length - class_tokens
    side, target = math.isqrt(max(patches, 0)), math.isqrt(wanted)
    if side * side != patches or target * target != wanted:
        raise ValueError(
            f"{POSITION_KEY} of {patches} patches cannot become one of {wanted} patches: both must be squares"
            " (was it trained with the other kind of classifier, token or gap?)"
        )
    grid = embedding[class_tokens:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    dtype = embedding.dtype if embedding.dtype in (torch.float32, torch.float64) else torch.float32
    grid = F.interpolate(grid.to(dtype), size=(target, target), mode="bicubic", align_corners=True)
    grid = grid.to(embedding.dtype).permute(2, 3, 0, 1).reshape(wanted, 1, width)
    return torch.cat([embedding[:class_tokens], grid])


SWAG_FOLDER = "https://dl.fbaipublicfiles.com/SWAG/"
TORCHVISION_FOLDER = "https://download.pytorch.org/models/"

# Published file -> torchvision's conversion of it; the digits in its name begin its SHA-256.
TORCHVISION_FILES: dict[str, str] = {
    "vit_b16_in1k.torch": "vit_b_16_swag-9ac1b537.pth",
    "vit_l16_in1k.torch": "vit_l_16_swag-4f3808c9.pth",
    "vit_h14_in1k.torch": "vit_h_14_swag-80465313.pth",
    "regnety_16gf_in1k.torch": "regnet_y_16gf_swag-43afe44d.pth",
    "regnety_32gf_in1k.torch": "regnet_y_32gf_swag-04fdfa75.pth",
    "regnety_128gf_in1k.torch": "regnet_y_128gf_swag-c8ce3e52.pth",
}


def published_weights(file: str, *, progress: bool = True) -> Path:
    """A published checkpoint, from torch.hub's cache or fetched into it.

    torchvision's conversion is taken where it is in the cache and the original is not. The SHA-256 of the originals is
    not published: it is recorded when one is first used, and a file that changes afterwards is refused.

    Args:
        file: name of the original, such as ``vit_l16_in1k.torch``.
        progress: show a bar while downloading.

    Raises:
        CheckpointError: if it is nowhere and cannot be downloaded, or is damaged; the message says where to get it.
    """
    converted = TORCHVISION_FILES.get(file)
    if converted and (hub_folder() / converted).is_file() and not (hub_folder() / file).is_file():
        logger.info("using torchvision's %s, which holds the weights of %s", converted, file)
        return fetch(TORCHVISION_FOLDER + converted, progress=progress)
    try:
        return fetch(SWAG_FOLDER + file, progress=progress)
    except CheckpointError as error:
        same = f"; torchvision's {TORCHVISION_FOLDER + converted} holds the same weights" if converted else ""
        raise CheckpointError(
            f"{error}: --weights FILE (in Python weights=FILE){same}. --no-pretrained (pretrained=False) does without"
        ) from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint of the published or torchvision's layout, or of this project's trainer, into a model.

    The model's parameters become the file's tensors, in torch's default dtype, so the model may be on the meta device
    and need not be initialised.

    Raises:
        CheckpointError: if the file cannot be read, or listing every key that is missing, unexpected or misshapen.
    """
    state = select_state(load_safely(path), source=str(path))
    dtype = torch.get_default_dtype()
    try:
        state = adapt_state(model, state)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error.args[0]}") from error
    if differences := list_key_differences(model, state):
        lines = "\n".join(differences.lines())
        raise CheckpointError(f"{path} does not fit {type(model).__name__}:\n{lines}")
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(state, assign=True)


def adapt_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` as ``model`` itself would load it: names and resolution adapted; see the model's ``adapt_state``."""
    adapt = getattr(model, "adapt_state", None)
    return dict(state) if adapt is None else adapt(state)

"""The dense network at another image size, of every family, with the position embedding that its library would make."""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from common.hosts.host import Facts, Host
from common.hosts.huggingface import HuggingFaceHead, HuggingFaceTrunk, family_of
from common.hosts.network import find_host, lean, load
from common.hosts.timm_vit import TimmHost
from common.hosts.torchvision_vit import TorchvisionViT
from common.run.errors import UsageError


def resized(net: nn.Module, size: tuple[int, int]) -> Any:
    """A network that takes images of another size; it shares every parameter but the position embedding.

    Args:
        net: a host; it stays as it is.
        size: height and width in pixels.

    Raises:
        UsageError: if this network, or this size, has no way to that.
    """
    host = find_host(net)
    if size == host.facts.image_size:
        return net
    made = copy.deepcopy(net, {id(parameter): parameter for parameter in net.parameters()})
    try:
        if isinstance(host, TimmHost):
            made.set_input_size(img_size=size)  # pyright: ignore[reportCallIssue]
        elif isinstance(host, HuggingFaceTrunk | HuggingFaceHead):
            _resize_huggingface(made, host.facts, size)
        else:
            _resize_square(made, host, size)
        after = find_host(made).facts
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(f"{host.facts.name} cannot take images of {size[0]}x{size[1]} pixels: {error}") from error
    if not after.patches:
        raise UsageError(f"{host.facts.name} has no patch left in images of {size[0]}x{size[1]} pixels")
    return made


def _side(host: Facts, size: tuple[int, int]) -> int:
    if size[0] != size[1] or host.image_size[0] != host.image_size[1]:
        raise UsageError(f"its library resamples squares alone, from {host.image_size} to {size}")
    return size[0]


def _resize_square(net: Any, host: Host, size: tuple[int, int]) -> None:
    """torchvision's and SWAG's, which keep the side in an attribute and resample alike, with aligned corners."""
    side, old = _side(host.facts, size), net.encoder.pos_embedding
    if side % net.patch_size:
        raise UsageError(f"the side must be a multiple of the patch size, {net.patch_size}")
    key = "encoder.pos_embedding"
    with torch.no_grad():
        if isinstance(host, TorchvisionViT):
            new = interpolate_embeddings(side, net.patch_size, cast(Any, {key: old}))[key]
            net.seq_length = new.shape[1]
        else:
            resample = load("hourglass_swag.models.weights:resize_position_embedding")
            tokens = (side // net.patch_size) ** 2 + host.facts.prefix
            new = resample({key: old}, tokens, host.facts.width, class_tokens=host.facts.prefix)
            net.grid_size = side // net.patch_size
    net.image_size = side
    net.encoder.pos_embedding = nn.Parameter(new, requires_grad=old.requires_grad)


def _resize_huggingface(net: Any, facts: Facts, size: tuple[int, int]) -> None:
    """By the network's own ``interpolate_pos_encoding``; DINOv3 has nothing to resample."""
    trunk: Any = net if family_of(net) else next(child for child in net.children() if family_of(child))
    side, embeddings = _side(facts, size), trunk.embeddings
    if hasattr(embeddings, "position_embeddings"):
        old: Tensor = embeddings.position_embeddings
        new = _interpolate(embeddings, old, facts, side)
        embeddings.position_embeddings = nn.Parameter(new, requires_grad=old.requires_grad)
    elif hasattr(embeddings, "position_embedding"):
        old = embeddings.position_embedding.weight
        new = _interpolate(embeddings, old[None], facts, side)
        embeddings.position_embedding = nn.Embedding.from_pretrained(new[0], freeze=not old.requires_grad)
        embeddings.position_ids = torch.arange(new.shape[1], device=old.device)[None]
        embeddings.num_positions = new.shape[1]
    for place in (*embeddings.modules(), trunk.config):
        if hasattr(place, "image_size"):
            place.image_size = side if isinstance(place.image_size, int) else (side, side)


def _interpolate(embeddings: Any, old: Tensor, facts: Facts, side: int) -> Tensor:
    """(1, positions, C) at another side of the image."""
    assert facts.grid is not None
    rows = side * facts.grid[0] // facts.image_size[0]
    tokens = old.new_empty(1, old.shape[1] - facts.patches + rows * rows, old.shape[2])  # only its shape is asked
    with torch.no_grad():
        return embeddings.interpolate_pos_encoding(tokens, side, side).detach().clone()


class Smaller(nn.Module):
    """A network on images of another size than those that it is given, which it shrinks first.

    Args:
        net: a host.
        size: height and width that it is to see.

    Raises:
        UsageError: as ``resized``.
    """

    def __init__(self, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.net = size, resized(net, size)
        self.fast = lean(self.net, verify=False)

    @property
    def facts(self) -> Facts:
        """Of the network at this size."""
        return self.fast.plan.host.facts

    def shrink(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, *size)."""
        wide = images.to(torch.promote_types(images.dtype, torch.float32))  # torch resizes no half precision
        return F.interpolate(wide, self.size, mode="bicubic", antialias=True).to(images)

    def forward(self, images: Tensor) -> Any:
        return self.net(self.shrink(images))

    def features(self, images: Tensor) -> Tensor:
        """(B, C, rows, columns) on the grid of the smaller images."""
        return self.fast.features(self.shrink(images))

"""Hourglass ViT: a published Vision Transformer whose later layers run on clusters of tokens, without fine-tuning.

Paper: Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv:2210.01035. The
clustering has no parameters, so any checkpoint of the backbone fits.

Letters: B images, N tokens, P patches, C width; K clusters.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from hourglass_swag.models.ops.cluster import TokenClusteringBlock
from hourglass_swag.models.vision_transformer import VisionTransformer, sized

OFF = -1  # the clustering_location that switches clustering off


def get_aspect_ratio(height: int, width: int) -> tuple[int, int]:
    """Height and width in lowest terms."""
    divisor = math.gcd(height, width)
    return height // divisor, width // divisor


def reshape_as_aspect_ratio(tokens: Tensor, ratio: tuple[int, int]) -> Tensor:
    """Put tokens (B, P, C), row by row, back on a grid of the given height to width: (B, C, H, W), a view.

    Raises:
        ValueError: if P tokens do not fill such a grid.
    """
    patches, scale = tokens.shape[1], math.isqrt(tokens.shape[1] // (ratio[0] * ratio[1]))
    if scale * ratio[0] * scale * ratio[1] != patches:
        raise ValueError(f"{patches} tokens do not fill a grid of height : width = {ratio[0]} : {ratio[1]}")
    return tokens.transpose(1, 2).unflatten(2, (scale * ratio[0], scale * ratio[1]))


class HourglassViT(VisionTransformer):
    """Vision Transformer with one token clustering step before or after a layer.

    Args:
        options: arguments of ``VisionTransformer``.
        cluster_after_output: cluster after the layer instead of before it. Published rows cluster before.
        clustering_location: index of the layer; -1 switches clustering off.
        num_cluster: number of clusters, a square, or (height, width) of their grid.
        cluster_iters, cluster_temperture, cluster_window_size: see ``TokenClusteringBlock``.

    Raises:
        ValueError: if an argument is out of range. A location beyond the layers only warns: as in the published code
            it never triggers.
    """

    def __init__(
        self,
        *,
        cluster_after_output: bool = True,
        clustering_location: int = 0,
        num_cluster: int | tuple[int, int] | list[int] = 256,
        cluster_iters: int = 5,
        cluster_temperture: float = 1.0,
        cluster_window_size: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.cluster_after_output = cluster_after_output
        self.clustering_location = clustering_location
        self.token_clustering_layer = TokenClusteringBlock(
            num_cluster, cluster_iters, cluster_temperture, cluster_window_size
        )
        if clustering_location != OFF and not 0 <= clustering_location < self.num_layers:
            warnings.warn(
                f"clustering_location = {clustering_location} is not a layer (0 to {self.num_layers - 1}): nothing is "
                f"clustered and this is the dense model; {OFF} says so without this warning",
                stacklevel=2,
            )

    def cluster(self, x: Tensor) -> Tensor:
        """Replace the patches among tokens ``x`` (N, B, C) by clusters, the class token staying in front.

        With classifier "gap" there is none, and all tokens are clustered (the published code fails).
        """
        x = x.transpose(0, 1)  # (B, N, C)
        class_token, patches = x[:, : self.num_class_tokens], x[:, self.num_class_tokens :]
        features = reshape_as_aspect_ratio(patches, (1, 1))
        centroids, _ = self.token_clustering_layer(features, return_labels=False)
        return torch.cat([class_token, centroids], dim=1).transpose(0, 1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.encoder.embed(x)
        for i, layer in enumerate(self.encoder.layers):
            here = i == self.clustering_location
            if here and not self.cluster_after_output:
                x = self.cluster(x)
            x = layer(self.encoder.dropout(x))  # before every layer, as published; the dense encoder has it once
            if here and self.cluster_after_output:
                x = self.cluster(x)
        return self.encoder.normalize(x)


class _Checked(HourglassViT):
    """Hourglass ViT that refuses a location beyond its layers, but for -1, where its parent warns."""

    def __init__(self, *, num_layers: int, clustering_location: int = 0, **options: Any) -> None:
        if not OFF <= clustering_location < num_layers:
            raise ValueError(
                f"clustering_location (-l, --clustering_location) must be 0 to {num_layers - 1}, or {OFF} for "
                f"nowhere, got {clustering_location}"
            )
        super().__init__(num_layers=num_layers, clustering_location=clustering_location, **options)


HourglassViTL16 = sized("HourglassViTL16", _Checked, "l16")
HourglassViTH14 = sized("HourglassViTH14", _Checked, "h14")
HourglassViTDesk = sized("HourglassViTDesk", _Checked, "desk", 32)

"""Hourglass ViT: a published Vision Transformer whose later layers run on clusters of tokens, without fine-tuning.

Paper: Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv:2210.01035. The
clustering has no parameters, so any checkpoint of the backbone fits. The published rows on SWAG classify the clusters;
``features`` of a network made by ``lean`` reconstructs the patches.

Letters: B images, N tokens, P patches, C width; K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hosts import Effect, Facts, Method, PlanError, Tokens
from hourglass_swag.host import publish
from hourglass_swag.methods import EQUAL, GRID, REDUCES, check_layer
from hourglass_swag.models.ops.cluster import TokenClusteringBlock, average_tokens, cluster_free_of_scale
from hourglass_swag.models.ops.reconstruction import reconstruction_weights, weights_free_of_scale
from hourglass_swag.models.vision_transformer import VisionTransformer

OFF = -1  # the clustering_location that switches clustering off


@dataclass(frozen=True)
class Hourglass(Method):
    """Token clustering at one layer, token reconstruction at the end; nothing is trained.

    Args:
        layer: default: a quarter of the depth.
        clusters: number (then on a grid like that of the patches) or (rows, columns); default: half of the patches.
        iters, window: iterations, and side of the window of cells that a patch may join.
        temperature: tau of the clustering, or "auto": 5 / m with m the image's median squared distance to the nearest
            centroid, so that it does not depend on the scale of the features.
        k, reconstruction_temperature: clusters per patch (default: 3, or all there are) and tau of the reconstruction;
            "auto": 1 / m.
        norm: of the reconstruction's weights: "l1" sums to one, "l2" as in the published code.
        behind: cluster behind the layer instead of before it.

    Source: arXiv:2210.01035, token clustering and token reconstruction layers.
    """

    name = "hourglass"
    swag: ClassVar = {"temperature": 1.0, "reconstruction_temperature": 0.05, "norm": "l2"}
    layer: int | None = None
    clusters: int | tuple[int, int] | None = None
    iters: int = 5
    window: int = 5
    temperature: float | Literal["auto"] = "auto"
    k: int | None = None
    reconstruction_temperature: float | Literal["auto"] = "auto"
    norm: Literal["l1", "l2"] = "l1"
    behind: bool = False

    def resolve(self, facts: Facts) -> "Hourglass":
        if facts.grid is None:
            raise PlanError(f"hourglass needs a grid of patches, which {facts.name} has not")
        layer = check_layer("hourglass: layer", facts.depth // 4 if self.layer is None else self.layer, facts)
        clusters = self.clusters
        if not isinstance(clusters, tuple):
            share = 0.5 if clusters is None else clusters / facts.patches
            clusters = _grid_of(share, facts.grid, clusters)
        if any(not 1 <= side <= most for side, most in zip(clusters, facts.grid, strict=True)):
            raise PlanError(f"hourglass: clusters must be 1 to {facts.grid} (rows, columns), got {clusters}")
        number = clusters[0] * clusters[1]
        k = min(3, number) if self.k is None else self.k
        if k == 0 or k > number:
            raise PlanError(f"hourglass: k must be 1 to {number}, or negative for all, got {k}")
        for key in ("temperature", "reconstruction_temperature"):
            value = getattr(self, key)
            if value != "auto" and not 0 <= value < float("inf"):
                raise PlanError(f"hourglass: {key} must be 'auto' or a number of at least 0, got {value!r}")
        tau = 1.0 if self.temperature == "auto" else self.temperature
        block = TokenClusteringBlock(clusters, self.iters, tau, self.window)  # refuses what is out of range
        resolved = replace(self, layer=layer, clusters=clusters, k=k)
        return resolved if self.temperature == "auto" else resolved.with_cores({layer: block})

    def effects(self) -> Sequence[Effect]:
        assert self.layer is not None
        return [Effect(self.layer, "after" if self.behind else "before", needs=GRID | EQUAL, breaks=REDUCES)]

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        """Patches to clusters, behind the prefix."""
        assert isinstance(self.clusters, tuple)
        if tokens.grid is None:
            raise PlanError("hourglass: the patches are not on a grid any more")
        grid = (min(self.clusters[0], tokens.grid[0]), min(self.clusters[1], tokens.grid[1]))  # of a smaller image
        prefix, patches = tokens.x[:, : tokens.prefix], tokens.x[:, tokens.prefix :]
        features = patches.transpose(1, 2).unflatten(2, tokens.grid)
        rotation = tokens.rotation
        if self.temperature == "auto":
            clusters, weights = cluster_free_of_scale(features, grid, self.iters, self.window // 2)
        else:
            (clusters, _), weights = self.cores[layer](features, grid, return_labels=False), None
        if rotation is not None and weights is not None and self.iters:
            places = rotation.coordinates.to(weights.dtype).expand(weights.shape[0], -1, -1)
            rotation = rotation.at(average_tokens(places, weights))
        elif rotation is not None:  # clusters begin and stay around the cells of their grid
            places = rotation.coordinates.mT.unflatten(2, tokens.grid)
            rotation = rotation.at(F.adaptive_avg_pool2d(places, grid).flatten(2).mT)

        k = min(self.k or 3, grid[0] * grid[1])

        def undo(x: Tensor) -> Tensor:
            if self.reconstruction_temperature == "auto":
                weights = weights_free_of_scale(patches, clusters, k, self.norm)
            else:
                tau = float(self.reconstruction_temperature)
                weights = reconstruction_weights(patches, clusters, k, tau, self.norm)
            return torch.cat([x[:, : tokens.prefix], weights.to(x.dtype) @ x[:, tokens.prefix :]], dim=1)

        x = torch.cat([prefix, clusters], dim=1)
        return tokens.update(x=x, rotation=rotation, grid=None, undone_by=undo)

    after = before


def _grid_of(share: float, grid: tuple[int, int], wanted: int | None) -> tuple[int, int]:
    """Rows and columns of clusters like those of the patches, a share of their number."""
    clusters = tuple(max(round(side * max(share, 0) ** 0.5), 1) for side in grid)
    if wanted is not None and clusters[0] * clusters[1] != wanted:
        rows, columns = clusters
        steps = (-1, 0, 1)
        sizes = {(rows + i) * (columns + (i if grid[0] == grid[1] else j)) for i in steps for j in steps}
        near = sorted(sizes - {0}, key=lambda number: abs(number - wanted))
        raise PlanError(
            f"hourglass: {wanted} clusters (-n, --num_cluster) do not fill a grid like the patches' "
            f"{grid[0]}x{grid[1]}; give (rows, columns), or {near[0]} or {near[1]}"
        )
    return clusters


def published(
    net: VisionTransformer,
    *,
    cluster_after_output: bool = False,
    clustering_location: int = 0,
    num_cluster: int | tuple[int, int] | list[int] = 256,
    cluster_iters: int = 5,
    cluster_temperture: float = 1.0,
    cluster_window_size: int = 5,
) -> VisionTransformer:
    """The network of a published row, under the published names of the settings.

    Args:
        net: the backbone.
        cluster_after_output: cluster after the layer instead of before it; published rows cluster before.
        clustering_location: index of the layer; -1 switches clustering off.
        num_cluster: number of clusters, a square, or (height, width) of their grid.
        cluster_iters, cluster_temperture, cluster_window_size: see ``TokenClusteringBlock``.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not OFF <= clustering_location < net.num_layers:
        raise ValueError(
            f"clustering_location (-l, --clustering_location) must be 0 to {net.num_layers - 1}, or {OFF} for "
            f"nowhere, got {clustering_location}"
        )
    TokenClusteringBlock(num_cluster, cluster_iters, cluster_temperture, cluster_window_size)  # refuses, by its flags
    settings = {"iters": cluster_iters, "temperature": cluster_temperture, "window": cluster_window_size}
    number = num_cluster if isinstance(num_cluster, int) else (num_cluster[0], num_cluster[1])
    options: dict[str, Any] = {**Hourglass.swag, **settings}
    method = Hourglass(clusters=number, layer=clustering_location, behind=cluster_after_output, **options)
    return publish(net, *([] if clustering_location == OFF else [method]), dropout_everywhere=True)

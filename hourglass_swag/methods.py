"""Token methods as plug-ins of ``common.hosts``: settings, where they act, and calls of ``models/ops``.

A setting of None means a default that depends on the host. ``lean`` gives what each method's own paper means; the
published rows on SWAG differ in the ways that ``preset="swag"`` names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.hosts import Effect, Facts, Method, Parts, PlanError, Tokens
from common.hosts.runner import attend
from hourglass_swag.models.evit import (
    CPU_ROWS,
    attend_and_score,
    count_kept,
    has_kernel,
    mean_attention,
    score_class_row,
)
from hourglass_swag.models.ops.cluster import TokenClusteringBlock, allowed_clusters, average_tokens
from hourglass_swag.models.ops.reconstruction import reconstruction_weights
from hourglass_swag.models.ops.tokens import take_tokens
from hourglass_swag.models.ops.tome import parse_r
from hourglass_swag.models.ops.tome.tome.merge import bipartite_soft_matching, merge_limit, merge_wavg

GRID = frozenset({"grid"})
TEMPERATURE, RECONSTRUCTION = 5.0, 1.0
"""Of "auto": tau times the median squared distance to the nearest centroid, for clustering and for reconstruction."""


def _layer(name: str, layer: int, facts: Facts) -> int:
    if not 0 <= layer < facts.depth:
        raise PlanError(f"{name} must be a layer, 0 to {facts.depth - 1}, got {layer}")
    return layer


@dataclass(frozen=True)
class ToMe(Method):
    """Token Merging: r pairs of tokens with similar keys merge in every layer.

    Args:
        r: pairs per layer: a number, one for each layer, or (mean, inflection); default: tokens // (2 x layers).
        prop_attn: attention proportional to the size of the keys.

    Source: arXiv:2210.09461, section 3.
    """

    name = "tome"
    r: int | tuple[float, float] | list[int] | None = None
    prop_attn: bool = True

    def resolve(self, facts: Facts) -> "ToMe":
        r = (facts.patches + facts.prefix) // (2 * facts.depth) if self.r is None else self.r
        try:
            schedule = parse_r(facts.depth, r)
        except (TypeError, ValueError) as error:
            raise PlanError(f"tome: {error}") from error
        if len(schedule) > facts.depth:
            raise PlanError(f"tome: r holds {len(schedule)} numbers for {facts.depth} layers")
        return replace(self, r=schedule)

    def effects(self) -> Sequence[Effect]:
        assert isinstance(self.r, list)
        breaks = GRID | {"plain attention"} if self.prop_attn else GRID
        return [Effect(layer, "between", breaks=breaks) for layer, r in enumerate(self.r) if r]

    def between(self, layer: int, tokens: Tokens, parts: Parts, memo: Any) -> Tokens:
        assert isinstance(self.r, list)
        if not min(self.r[layer], merge_limit(tokens.x.shape[1], tokens.prefix)):
            return tokens
        merge, unmerge = bipartite_soft_matching(parts.metric.mean(dim=1), self.r[layer], prefix_tokens=tokens.prefix)
        x, size = merge_wavg(merge, tokens.x, tokens.size)
        rotation = tokens.rotation
        if rotation is not None:
            places = F.pad(rotation.coordinates.expand(x.shape[0], -1, -1), (0, 0, tokens.prefix, 0))
            rotation = rotation.at(merge_wavg(merge, places, tokens.size)[0][:, tokens.prefix :])
        bias = size[..., 0].log() if self.prop_attn else None
        undo = unmerge if tokens.prefix < 2 else _restore_order(unmerge)
        return tokens.update(x=x, size=size, key_bias=bias, rotation=rotation, grid=None, undone_by=undo)


def _restore_order(unmerge: Any) -> Any:
    """Tokens back at their own places, also those moved to the front."""
    return lambda x: unmerge(x, restore_order=True)


@dataclass(frozen=True)
class Hourglass(Method):
    """Token clustering before one layer, token reconstruction at the end; nothing is trained.

    Args:
        layer: default: a quarter of the depth.
        clusters: number (then on a grid like that of the patches) or (rows, columns); default: half of the patches.
        iters, window: iterations, and side of the window of cells that a patch may join.
        temperature: tau of the clustering, or "auto": 5 / m with m the image's median squared distance to the nearest
            centroid, so that it does not depend on the scale of the features.
        k, reconstruction_temperature: clusters per patch (default: 3, or all there are) and tau of the reconstruction;
            "auto": 1 / m.
        norm: of the reconstruction's weights: "l1" sums to one, "l2" as in the published code.

    Source: arXiv:2210.01035, token clustering and token reconstruction layers.
    """

    name = "hourglass"
    layer: int | None = None
    clusters: int | tuple[int, int] | None = None
    iters: int = 5
    window: int = 5
    temperature: float | Literal["auto"] = "auto"
    k: int | None = None
    reconstruction_temperature: float | Literal["auto"] = "auto"
    norm: Literal["l1", "l2"] = "l1"

    def resolve(self, facts: Facts) -> "Hourglass":
        if facts.grid is None:
            raise PlanError(f"hourglass needs a grid of patches, which {facts.name} has not")
        layer = _layer("hourglass: layer", facts.depth // 4 if self.layer is None else self.layer, facts)
        clusters = self.clusters
        if not isinstance(clusters, tuple):
            share = 0.5 if clusters is None else clusters / facts.patches
            clusters = _grid_of(share, facts.grid, clusters)
        if any(not 1 <= side <= most for side, most in zip(clusters, facts.grid, strict=True)):
            raise PlanError(f"hourglass: clusters must be 1 to {facts.grid} (rows, columns), got {clusters}")
        if self.iters < 0 or self.window < 1 or self.window % 2 == 0:
            raise PlanError(
                f"hourglass: iters must not be negative and window odd, got iters={self.iters}, window={self.window}"
            )
        number = clusters[0] * clusters[1]
        k = min(3, number) if self.k is None else self.k
        if k == 0 or k > number:
            raise PlanError(f"hourglass: k must be 1 to {number}, or negative for all, got {k}")
        if self.norm not in ("l1", "l2"):
            raise PlanError(f"hourglass: norm must be 'l1' or 'l2', got {self.norm!r}")
        for key, value in (("layer", layer), ("iters", self.iters), ("window", self.window), ("k", k)):
            if not isinstance(value, int):
                raise PlanError(f"hourglass: {key} must be a whole number, got {value!r}")
        for key in ("temperature", "reconstruction_temperature"):
            value = getattr(self, key)
            if value != "auto" and (isinstance(value, str) or not 0 <= value < float("inf")):
                raise PlanError(f"hourglass: {key} must be 'auto' or a number of at least 0, got {value!r}")
        return replace(self, layer=layer, clusters=clusters, k=k)

    def effects(self) -> Sequence[Effect]:
        assert self.layer is not None
        return [Effect(self.layer, "before", needs=GRID, breaks=GRID)]

    def before(self, layer: int, tokens: Tokens) -> Tokens:
        assert isinstance(self.clusters, tuple)
        if tokens.grid is None:
            raise PlanError("hourglass: the patches are not on a grid any more")
        grid = (min(self.clusters[0], tokens.grid[0]), min(self.clusters[1], tokens.grid[1]))  # of a smaller image
        prefix, patches = tokens.x[:, : tokens.prefix], tokens.x[:, tokens.prefix :]
        features = patches.transpose(1, 2).unflatten(2, tokens.grid)
        rotation = tokens.rotation
        if self.temperature == "auto":
            clusters, weights = cluster_free_of_scale(features, grid, self.iters, self.window // 2)
            if rotation is not None:
                places = rotation.coordinates.to(weights.dtype).expand(weights.shape[0], -1, -1)
                rotation = rotation.at(average_tokens(places, weights))
        else:
            block = TokenClusteringBlock(grid, self.iters, self.temperature, self.window)
            clusters, _ = block(features, return_labels=False)
            if rotation is not None:  # clusters begin and stay around the cells of their grid
                places = rotation.coordinates.mT.unflatten(2, tokens.grid)
                rotation = rotation.at(F.adaptive_avg_pool2d(places, grid).flatten(2).mT)

        k = min(self.k or 3, grid[0] * grid[1])

        def undo(x: Tensor) -> Tensor:
            if self.reconstruction_temperature == "auto":
                weights = weights_free_of_scale(patches, clusters, k, self.norm)
            else:
                tau = float(self.reconstruction_temperature)
                weights = reconstruction_weights(patches, clusters, k, tau, self.norm)
            return torch.cat([x[:, : tokens.prefix], weights @ x[:, tokens.prefix :]], dim=1)

        x = torch.cat([prefix, clusters], dim=1)
        return tokens.update(x=x, rotation=rotation, grid=None, undone_by=undo)


def _grid_of(share: float, grid: tuple[int, int], wanted: int | None) -> tuple[int, int]:
    """Rows and columns of clusters like those of the patches, a share of their number."""
    clusters = tuple(max(round(side * share**0.5), 1) for side in grid)
    if wanted is not None and clusters[0] * clusters[1] != wanted:
        rows, columns = clusters
        near = sorted(
            {(rows + i) * (columns + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}, key=lambda n: abs(n - wanted)
        )
        raise PlanError(
            f"hourglass: {wanted} clusters do not fill a grid like the patches' {grid[0]}x{grid[1]}; give (rows, "
            f"columns), or {near[0]} or {near[1]}"
        )
    return clusters


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (B, P, K) of a (B, P, C) and b (B, K, C), in float32 at least."""
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    return torch.baddbmm(a.square().sum(2)[..., None] + b.square().sum(2)[:, None], a, b.mT, alpha=-2).clamp_min(0)


def _scale(distances: Tensor) -> Tensor:
    """m: the median over an image's patches of the squared distance to the nearest centroid, (B, 1, 1)."""
    nearest = distances.amin(2)
    median = nearest.sort(dim=1).values[:, (nearest.shape[1] - 1) // 2]  # ONNX has no median
    return median[:, None, None].clamp_min(torch.finfo(nearest.dtype).tiny ** 0.5)


@torch.no_grad()
def cluster_free_of_scale(features: Tensor, grid: tuple[int, int], iters: int, radius: int) -> tuple[Tensor, Tensor]:
    """Token clustering whose temperature is 5 / m, m per image from the initial centroids.

    Args:
        features: (B, C, H, W).
        grid: rows and columns of clusters.
        iters, radius: iterations; cells that a patch may move in either direction.

    Returns:
        Clusters (B, rows x columns, C), and the weights of the patches in them, (B, H x W, rows x columns).
    """
    tokens = features.flatten(2).transpose(1, 2)
    z = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    centroids = F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2).to(z.dtype)
    size = (features.shape[2], features.shape[3])
    far = ~allowed_clusters(size, grid, radius, device=z.device, dtype=z.dtype)  # (P, K)
    weights = (~far).to(z.dtype).expand(z.shape[0], -1, -1)
    tau = None
    for _ in range(iters):
        distances = _distances(z, centroids)
        tau = TEMPERATURE / _scale(distances) if tau is None else tau
        weights = (-tau * distances).masked_fill(far, -torch.inf).softmax(2)
        centroids = average_tokens(z, weights)
    return centroids.to(tokens.dtype), weights


def weights_free_of_scale(before: Tensor, after: Tensor, k: int, norm: Literal["l1", "l2"]) -> Tensor:
    """Reconstruction weights (B, P, K) with temperature 1 / m, m per image from the final centroids.

    Distances are shifted by each row's smallest, which the norm cancels, so that no row underflows.
    """
    distances = _distances(before, after)
    tau = RECONSTRUCTION / _scale(distances)
    weights = torch.exp(-tau * (distances - distances.amin(2, keepdim=True)))
    if 0 < k < after.shape[1]:
        weights = weights.masked_fill(weights < weights.topk(k, dim=2).values[..., -1:], 0)
    return F.normalize(weights, p=1 if norm == "l1" else 2, dim=2).to(before.dtype)


@dataclass(frozen=True)
class EViT(Method):
    """EViT: patches that are attended least are dropped, or fused into one token.

    Args:
        keep: fraction of the patches that each of the layers keeps.
        layers: where; default: a quarter, half and three quarters of the depth.
        fuse: append the dropped patches, weighted by their scores, as one token.
        score: "class", attention of the class token, the default; or "mean" over all queries, that without one.
        restore: "nearest", the kept token most like a dropped one (cosine) then, followed to the end; or "frozen", the
            features that it had.

    Source: arXiv:2202.07800, section 3.
    """

    name = "evit"
    keep: float = 0.7
    layers: tuple[int, ...] | None = None
    fuse: bool = False
    score: Literal["class", "mean"] | None = None
    restore: Literal["nearest", "frozen"] = "nearest"

    def resolve(self, facts: Facts) -> "EViT":
        layers = self.layers
        if layers is None:
            layers = tuple(sorted({facts.depth * quarter // 4 for quarter in (1, 2, 3)}))
        layers = tuple(_layer("evit: layers", layer, facts) for layer in layers)
        if len(set(layers)) < len(layers):
            raise PlanError(f"evit: layers must differ, got {layers}")
        score = self.score or ("class" if facts.class_token else "mean")
        if score == "class" and not facts.class_token:
            raise PlanError(f"evit: score 'class' needs a class token, which {facts.name} has not; take 'mean'")
        if not 0 < self.keep <= 1:
            raise PlanError(f"evit: keep must be in (0, 1], got {self.keep}")
        for key, valid in (("score", ("class", "mean")), ("restore", ("nearest", "frozen"))):
            if getattr(self, key) not in (*valid, None):
                raise PlanError(f"evit: {key} must be one of {', '.join(valid)}, got {getattr(self, key)!r}")
        return replace(self, layers=layers, score=score)

    def effects(self) -> Sequence[Effect]:
        assert self.layers is not None
        if self.keep == 1:
            return []
        plain = frozenset({"plain attention"})  # whose probabilities are averaged
        attends = [Effect(layer, "attend", needs=plain) for layer in self.layers if self.score == "mean"]
        return attends + [Effect(layer, "between", breaks=GRID) for layer in self.layers]

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Any]:
        if not parts.dropout and has_kernel(parts.q, parts.k):
            return attend(parts, tokens), mean_attention(parts.q, parts.k)
        rows = CPU_ROWS if tokens.x.device.type == "cpu" else tokens.x.shape[1]
        return attend_and_score(parts.q, parts.k, parts.v, rows=rows, dropout=parts.dropout)

    def between(self, layer: int, tokens: Tokens, parts: Parts, memo: Any) -> Tokens:
        scores = (score_class_row(parts.q, parts.k) if memo is None else memo)[:, tokens.prefix :]  # (B, P)
        patches, kept = scores.shape[1], count_kept(scores.shape[1], self.keep)
        if kept >= patches:
            return tokens
        x = tokens.x
        ranked = scores.topk(patches, dim=1)
        index = ranked.indices + tokens.prefix
        chosen, others = take_tokens(x, index[:, :kept]), take_tokens(x, index[:, kept:])
        parts_left = [x[:, : tokens.prefix], chosen]
        if self.fuse:
            weights = ranked.values[:, kept:, None].to(x.dtype)
            parts_left.append((others * weights).sum(1, keepdim=True))
        undo = _Undrop(tokens.prefix, index, kept, chosen, others, self.restore)
        rotation = tokens.rotation
        if rotation is not None and self.fuse:
            places = rotation.coordinates.expand(x.shape[0], -1, -1)
            share = ranked.values[:, kept:, None] / ranked.values[:, kept:, None].sum(1, keepdim=True)
            fused = (take_tokens(places, ranked.indices[:, kept:]) * share).sum(1, keepdim=True)
            rotation = rotation.at(torch.cat([take_tokens(places, ranked.indices[:, :kept]), fused], dim=1))
        elif rotation is not None:
            rotation = rotation.take(ranked.indices[:, :kept])
        size = None if tokens.size is None else _follow(tokens.size, tokens.prefix, index[:, :kept], self.fuse)
        bias = None if tokens.key_bias is None or size is None else size[..., 0].log()
        x = torch.cat(parts_left, dim=1)
        return tokens.update(x=x, size=size, key_bias=bias, rotation=rotation, grid=None, undone_by=undo)


def _follow(size: Tensor, prefix: int, index: Tensor, fuse: bool) -> Tensor:
    """Sizes of the tokens left; the fused one counts as one."""
    left = [size[:, :prefix], size.gather(1, index[..., None])]
    return torch.cat([*left, torch.ones_like(size[:, :1])] if fuse else left, dim=1)


class _Undrop:
    """Puts dropped patches back: (B, U, C) to (B, N, C)."""

    def __init__(self, prefix: int, index: Tensor, kept: int, chosen: Tensor, others: Tensor, restore: str) -> None:
        self.prefix, self.index, self.kept, self.restore = prefix, index, kept, restore
        self.dropped_from = chosen, others

    def __call__(self, x: Tensor) -> Tensor:
        chosen, others = x[:, self.prefix : self.prefix + self.kept], self.dropped_from[1]
        if self.restore == "nearest":
            a, b = (F.normalize(y.float(), dim=2) for y in self.dropped_from)
            others = take_tokens(chosen, (b @ a.mT).argmax(2))
        patches = torch.cat([chosen, others], dim=1)
        places = (self.index - self.prefix)[..., None].expand_as(patches)
        return torch.cat([x[:, : self.prefix], torch.empty_like(patches).scatter(1, places, patches)], dim=1)

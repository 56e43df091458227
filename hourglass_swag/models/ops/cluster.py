"""Token clustering without parameters: local soft k-means that starts from an adaptive average pool.

Paper: Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv:2210.01035, its token
clustering layer. Written from the formulas.

Letters: B images, P = H x W tokens z, K = kh x kw clusters with centroids s, C width, tau inverse temperature,
r = window_size // 2.

One iteration, with the mask fixed by the initial assignment of token p to a cell of the grid of clusters:

    D[p,k] = |z_p - s_k|^2 + (1e16 where cell k is further than r, in either direction, from the initial cell of p)
    A[p,k] = softmax over k of -tau D[p,k]
    s_k    = sum_p A[p,k] z_p / sum_p A[p,k]

|z_p|^2 is the same for all clusters and cancels in the softmax, so it is never computed, and D is never formed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.measure.flops import OpCounts
from common.run.precision import without_autocast

MASK_DISTANCE = 1e16  # added to the squared distance outside the window
MIN_WEIGHT = 1e-16  # smallest divisor of a weighted average
AUTO_TEMPERATURE = 5.0  # tau times the median squared distance to the nearest centroid

Grid = tuple[int, int]


def cluster_grid(num_spixels: int | tuple[int, int] | list[int]) -> Grid:
    """Height and width of a grid of clusters, from the number of clusters (a square) or from the pair itself.

    Raises:
        ValueError: if a single number is not a square, or a side is below 1.
    """
    if isinstance(num_spixels, int):
        side = math.isqrt(max(num_spixels, 0))
        if num_spixels < 1 or side * side != num_spixels:
            nearest = ", ".join(str(s * s) for s in (side, side + 1) if s)
            raise ValueError(
                f"num_clusters (-n, --num_cluster) must be a square, got {num_spixels}; nearest are {nearest}"
            )
        return side, side
    height, width = num_spixels
    if height < 1 or width < 1:
        raise ValueError(f"a grid of clusters needs a height and a width of at least 1, got {(height, width)}")
    return height, width


def initial_labels(size: Grid, grid: Grid, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cell of the (kh, kw) grid that each of the H x W tokens starts in, (P,), whole numbers of type ``dtype``.

    A nearest-neighbour resize of the map of cell numbers: torch's own, because its rounding decides some borders.
    """
    cells = torch.arange(grid[0] * grid[1], device=device, dtype=dtype).view(1, 1, *grid)
    return F.interpolate(cells, size=size, mode="nearest").flatten()


def allowed_clusters(size: Grid, grid: Grid, radius: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Whether token p may join cluster k, (P, K): its initial cell is at most ``radius`` rows and columns away."""
    labels = initial_labels(size, grid, device=device, dtype=dtype).long()[:, None]
    cells = torch.arange(grid[0] * grid[1], device=device)
    near_rows = (labels // grid[1] - cells // grid[1]).abs() <= radius
    near_columns = (labels % grid[1] - cells % grid[1]).abs() <= radius
    return near_rows & near_columns


def assign_tokens(tokens: Tensor, centroids: Tensor, penalty: Tensor, temperature: float) -> Tensor:
    """Soft assignment A of tokens to clusters.

    Args:
        tokens: z, (B, P, C).
        centroids: s, (B, K, C).
        penalty: -tau times the masked distance, (P, K): zero where a token may join a cluster.
        temperature: tau.

    Returns:
        A, (B, P, K); the weights of a token sum to one over the clusters.

    Source: arXiv:2210.01035, token clustering layer: A = softmax_k(-tau |z_p - s_k|^2), clusters near p alone.
    """
    logits = penalty - temperature * centroids.square().sum(2)[:, None]  # (B, P, K)
    logits.baddbmm_(tokens, centroids.transpose(1, 2), alpha=2 * temperature)
    return logits.softmax(dim=2)


def average_tokens(tokens: Tensor, weights: Tensor) -> Tensor:
    """Centroids (B, K, C): averages of tokens (B, P, C) under weights (B, P, K).

    Source: arXiv:2210.01035, token clustering layer: s_k = sum_p A_pk z_p / sum_p A_pk.
    """
    total = weights.sum(1).clamp_min(MIN_WEIGHT)  # (B, K)
    return weights.transpose(1, 2) @ tokens / total[..., None]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (B, P, K) of a (B, P, C) and b (B, K, C), in float32 at least."""
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    return torch.baddbmm(a.square().sum(2)[..., None] + b.square().sum(2)[:, None], a, b.mT, alpha=-2).clamp_min(0)


def median_nearest(distances: Tensor) -> Tensor:
    """m: the median over an image's patches of the squared distance to the nearest centroid, (B, 1, 1)."""
    nearest = distances.amin(2)
    median = nearest.sort(dim=1).values[:, (nearest.shape[1] - 1) // 2]  # ONNX has no median
    return median[:, None, None].clamp_min(torch.finfo(nearest.dtype).tiny ** 0.5)


def cluster_free_of_scale(features: Tensor, grid: tuple[int, int], iters: int, radius: int) -> tuple[Tensor, Tensor]:
    """Token clustering whose temperature is 5 / m, m per image from the initial centroids.

    Gradients flow through the averaged tokens; the assignment is detached, as in ``TokenClusteringBlock``.

    Args:
        features: (B, C, H, W).
        grid: rows and columns of clusters.
        iters, radius: iterations; cells that a patch may move in either direction.

    Returns:
        Clusters (B, rows x columns, C), and the weights of the patches in them, (B, H x W, rows x columns).
    """
    with without_autocast(features):
        tokens = features.flatten(2).transpose(1, 2)
        z = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        centroids = F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2).to(z.dtype)
        size = (features.shape[2], features.shape[3])
        far = ~allowed_clusters(size, grid, radius, device=z.device, dtype=z.dtype)  # (P, K)
        weights = (~far).to(z.dtype).expand(z.shape[0], -1, -1)
        tau = None
        for iteration in range(iters):
            with torch.no_grad():
                distances = squared_distances(z, centroids)
                tau = AUTO_TEMPERATURE / median_nearest(distances) if tau is None else tau
                weights = (-tau * distances).masked_fill(far, -torch.inf).softmax(2)
            centroids = average_tokens(z if iteration == iters - 1 else z.detach(), weights)
        return centroids.to(tokens.dtype), weights


class TokenClusteringBlock(nn.Module):
    """Replace H x W tokens by a grid of clusters.

    Args:
        num_spixels: number of clusters, a square, or (height, width) of their grid; None if given at each call.
        n_iters: iterations; 0 returns the average pool.
        temperture: tau (spelt as published); 0 weighs all clusters alike, the far ones included, as in the formula.
        window_size: odd side of the square of cells that a token may join, centred on its initial cell.

    Raises:
        ValueError: if one of them is out of range.
    """

    def __init__(
        self,
        num_spixels: int | tuple[int, int] | list[int] | None = None,
        n_iters: int = 5,
        temperture: float = 1.0,
        window_size: int = 7,
    ) -> None:
        super().__init__()
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size (--cluster_window_size) must be odd and positive, got {window_size}")
        if n_iters < 0:
            raise ValueError(f"n_iters (--cluster_iters) must not be negative, got {n_iters}")
        if not temperture >= 0:
            raise ValueError(f"temperture (--cluster_temperture) must not be negative, got {temperture}")
        self.grid = None if num_spixels is None else cluster_grid(num_spixels)
        self.n_iters = n_iters
        self.temperture = float(temperture)
        self.window_size = window_size
        self.radius = window_size // 2
        self._windows: dict[tuple[Any, ...], Tensor] = {}

    def extra_repr(self) -> str:
        return f"grid={self.grid}, n_iters={self.n_iters}, temperture={self.temperture}, window_size={self.window_size}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the table of windows, which is made again when needed."""
        return self.__dict__ | {"_windows": {}}

    def calc_init_centroid(self, images: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Initial centroids and the cell that each token starts in.

        Args:
            images: features, (B, C, H, W).
            width, height: of the grid of clusters (width first, as published).

        Returns:
            Average-pooled centroids (B, C, K) and cells (B, P) as whole numbers of the features' type.

        Source: arXiv:2210.01035, token clustering layer: start from the adaptive average pool of the grid.
        """
        centroids = F.adaptive_avg_pool2d(images, (height, width)).flatten(2)
        labels = initial_labels(
            (images.shape[2], images.shape[3]), (height, width), device=images.device, dtype=images.dtype
        )
        return centroids, labels.expand(images.shape[0], -1)

    def forward(
        self, features: Tensor, num_spixels: int | tuple[int, int] | list[int] | None = None, return_labels: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Cluster a grid of tokens. Gradients flow through the averaged tokens; the assignment is detached.

        Args:
            features: tokens on their grid, (B, C, H, W). Half precision is computed in float32; on a GPU its matrix
                products take the tokens and the centroids as they are and add up in float32.
            num_spixels: as in the constructor, which it overrides.
            return_labels: whether to look for the nearest centroid of every token (one more product of K x P x C).

        Returns:
            Centroids (B, K, C), row by row, and the nearest centroid of every token, (B, P) int64, over all clusters
            and not only over those in the window; None instead unless asked for.

        Raises:
            ValueError: if the number of clusters is known neither here nor from the constructor.
        """
        grid = self.grid if num_spixels is None else cluster_grid(num_spixels)
        if grid is None:
            raise ValueError("num_spixels was given neither to TokenClusteringBlock nor to its forward")
        dtype = features.dtype if features.dtype in (torch.float32, torch.float64) else torch.float32
        with without_autocast(features):
            if features.is_cuda and features.dtype != dtype and not features.requires_grad:
                centroids, labels = self._cluster_half(features, grid, return_labels)
            else:
                centroids, labels = self._cluster(features.to(dtype), grid, return_labels)
        return centroids.to(features.dtype), labels

    def _cluster(self, features: Tensor, grid: Grid, return_labels: bool) -> tuple[Tensor, Tensor | None]:
        """``forward`` in float32 or float64."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, P, C)
        centroids = F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)  # (B, K, C)
        detached = tokens.detach()
        if self.n_iters:
            penalty = self._penalty((features.shape[2], features.shape[3]), grid, features.device, features.dtype)
            for iteration in range(self.n_iters):
                with torch.no_grad():
                    weights = assign_tokens(detached, centroids.detach(), penalty, self.temperture)  # (B, P, K)
                # Earlier centroids matter through the detached weights only.
                last = iteration == self.n_iters - 1
                centroids = average_tokens(tokens if last else detached, weights)
                del weights
        if not return_labels:
            return centroids, None
        with torch.no_grad():
            closeness = -centroids.detach().square().sum(2)[:, None].expand(-1, tokens.shape[1], -1)
            closeness = torch.baddbmm(closeness, detached, centroids.detach().transpose(1, 2), alpha=2)
            return centroids, closeness.argmax(2)

    @torch.no_grad()
    def _cluster_half(self, features: Tensor, grid: Grid, return_labels: bool) -> tuple[Tensor, Tensor | None]:
        """``forward`` of half-precision features on a GPU, whose matrix units add their products up in float32.

        Distances are to the rounded centroids, their squares included, so that rounding moves a centroid by its last
        place instead of adding noise to the distances.
        """
        half, precise = features.dtype, torch.float32
        clusters = grid[0] * grid[1]
        padded = -clusters % 8  # rows that begin at whole 16 bytes: the products take a fifth of the time
        tokens = features.flatten(2).transpose(1, 2).contiguous()  # (B, P, C)
        centroids = F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2).to(precise)
        centroids = F.pad(centroids, (0, 0, 0, padded))
        penalty = self._penalty((features.shape[2], features.shape[3]), grid, features.device, precise)
        penalty = F.pad(penalty, (0, padded), value=-math.inf)
        for _ in range(self.n_iters):
            rounded = centroids.to(half)
            logits = penalty - self.temperture * rounded.to(precise).square().sum(2)[:, None]  # (B, P, K)
            logits = torch.baddbmm(
                logits, tokens, rounded.transpose(1, 2), alpha=2 * self.temperture, out_dtype=precise
            )
            weights = logits.softmax(2).to(half)
            total = weights.sum(1, dtype=precise).clamp_min(MIN_WEIGHT)
            centroids = torch.bmm(weights.transpose(1, 2), tokens, out_dtype=precise) / total[..., None]
        centroids = centroids[:, :clusters]
        if not return_labels:
            return centroids, None
        rounded = centroids.to(half)
        closeness = -rounded.to(precise).square().sum(2)[:, None].expand(-1, tokens.shape[1], -1)
        closeness = torch.baddbmm(closeness, tokens, rounded.transpose(1, 2), alpha=2, out_dtype=precise)
        return centroids, closeness.argmax(2)

    def _penalty(self, size: Grid, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
        """-tau times the distance added outside the window, (P, K).

        It depends on shapes alone, so it is kept per shape and device, except while compiling or tracing, where the
        compiler folds it and a kept tensor could outlive the trace.
        """
        if torch.compiler.is_compiling():
            return self._make_penalty(size, grid, device, dtype)
        key = (size, grid, device, dtype, self.temperture, self.radius)
        if (known := self._windows.get(key)) is not None:
            return known
        with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, which serves training too
            penalty = self._make_penalty(size, grid, device, dtype)
        if type(penalty) is Tensor:
            self._windows[key] = penalty
        return penalty

    def _make_penalty(self, size: Grid, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
        allowed = allowed_clusters(size, grid, self.radius, device=device, dtype=dtype)
        penalty = torch.zeros(allowed.shape, device=device, dtype=dtype)
        return penalty.masked_fill(~allowed, -self.temperture * MASK_DISTANCE)

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """The published formula: other work around the same products.

        n_iters [PC + KC + 2KP (mul) + 2KP (add) + KP (sub) + 2KPC (matmul) + KP (softmax) + KC (div)], and 3KP for
        the window. The published tool sees |z|^2 computed, and the window in every pass; here neither is.
        """
        (B, C, H, W), K = args[0].shape, result[0].shape[1]
        P, n = H * W, self.n_iters
        return B * OpCounts(
            mul=K * P + n * (P * C + K * C + 2 * K * P),
            add=n * 2 * K * P,
            sub=2 * K * P + n * K * P,
            matmul=n * 2 * K * P * C,
            softmax=n * K * P,
            div=n * K * C,
        )


class AvgPool(nn.Module):
    """The ablation without iterations: an adaptive average pool with the interface of ``TokenClusteringBlock``."""

    def __init__(self, num_spixels: int | tuple[int, int] | list[int]) -> None:
        super().__init__()
        self.grid = cluster_grid(num_spixels)

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        """Pool features (B, C, H, W) to (B, K, C); there are no labels."""
        return F.adaptive_avg_pool2d(features, self.grid).flatten(2).transpose(1, 2), None

"""Token reconstruction without parameters: from K refined clusters back to P tokens, for dense prediction.

Paper: Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, arXiv:2210.01035, its token
reconstruction layer. The classifiers of this repository do not use it.

Letters: B images, P tokens z before clustering, K clusters s after it, C width, x the clusters after further layers.

    unpooler = block.derive_unpooler()
    unpooler.update_state(feat_before_pooling=z)
    unpooler.update_state(feat_after_pooling=s, hard_labels=labels)
    tokens, _ = unpooler.call(x)
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hosts.host import take_tokens
from common.run.precision import without_autocast
from hourglass_swag.models.ops.cluster import median_nearest, squared_distances

Normalize = Literal["l2", "l1"]
MIN_NORM = 1e-12  # smallest divisor of a row of weights
AUTO_TEMPERATURE = 1.0  # tau times the median squared distance to the nearest centroid


def naive_unpool(x: Tensor, hard_labels: Tensor) -> Tensor:
    """Give every token the features of its cluster.

    Args:
        x: clusters, (B, K, C).
        hard_labels: cluster of every token, (B, P) int64.

    Returns:
        (B, P, C).
    """
    return take_tokens(x, hard_labels)


def reconstruction_weights(before: Tensor, after: Tensor, k: int, temperature: float, normalize: Normalize) -> Tensor:
    """Weights of the clusters in every token: exp(-tau |z_p - s_m|^2), kept for the k nearest clusters, normalised.

    Args:
        before: z, (B, P, C).
        after: s, (B, K, C).
        k: clusters kept per token, all if negative. Clusters that tie with the k-th are kept too.
        temperature: tau.
        normalize: "l2" divides a row by its Euclidean norm, as the published code does: rows do not sum to one unless
            k is 1. "l1" divides by the sum: the weighted mean of the paper.

    Returns:
        (B, P, K). A row whose exponentials all underflow is zero.

    Raises:
        ValueError: if k is 0 or more than the number of clusters.

    Source: arXiv:2210.01035, token reconstruction layer: exp(-tau |z_p - s_m|^2) over the k nearest clusters.
    """
    clusters = after.shape[1]
    if k == 0 or k > clusters:
        raise ValueError(f"k must be between 1 and the number of clusters, {clusters}, or negative for all; got {k}")
    distances = before.square().sum(2)[..., None] + after.square().sum(2)[:, None]  # (B, P, K)
    distances = torch.baddbmm(distances, before, after.transpose(1, 2), alpha=-2)
    weights = torch.exp(-temperature * distances)
    if 0 < k < clusters:
        smallest = weights.detach().topk(k, dim=2).values[..., -1:]
        weights = weights.masked_fill(weights < smallest, 0)
    return F.normalize(weights, p=2 if normalize == "l2" else 1, dim=2, eps=MIN_NORM)


def weights_free_of_scale(before: Tensor, after: Tensor, k: int, norm: Normalize) -> Tensor:
    """Reconstruction weights (B, P, K) with temperature 1 / m, m per image from the final centroids.

    Distances are shifted by each row's smallest, which the norm cancels, so that no row underflows.
    """
    with without_autocast(before):
        distances = squared_distances(before, after)
        tau = AUTO_TEMPERATURE / median_nearest(distances)
        weights = torch.exp(-tau * (distances - distances.amin(2, keepdim=True)))
    if 0 < k < after.shape[1]:
        weights = weights.masked_fill(weights < weights.topk(k, dim=2).values[..., -1:], 0)
    return F.normalize(weights, p=1 if norm == "l1" else 2, dim=2).to(before.dtype)


class State:
    """What a reconstruction remembers from before and after a clustering; any keyword becomes an attribute."""

    def __init__(self, unpooling: "UnpoolingBase") -> None:
        self._unpooling = unpooling
        self.updated = False

    def update_state(self, **values: Any) -> None:
        """Remember ``values``."""
        self.__dict__.update(values)
        self.updated = True

    def get(self, name: str, default: Any = None) -> Any:
        """The value remembered under ``name``."""
        return getattr(self, name, default)

    def call(self, x: Tensor) -> tuple[Tensor, bool]:
        """Reconstruct tokens (B, P, C) from refined clusters ``x`` (B, K, C); see ``UnpoolingBase.forward``."""
        return self._unpooling(x, self)


class UnpoolingBase(nn.Module):
    """A way back from clusters to tokens."""

    def derive_unpooler(self) -> State:
        """A fresh state for one forward pass."""
        return State(self)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, bool]:
        """Tokens (B, P, C) of clusters ``x`` (B, K, C), and False; ``x`` itself if the state was never updated."""
        return (self.unpool(x, state) if state.updated else x), False

    def unpool(self, x: Tensor, state: State) -> Tensor:
        """Tokens (B, P, C) of clusters ``x`` (B, K, C)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to reconstruct tokens")


def _remembered(state: State, name: str) -> Tensor:
    """A value of the state that must be there."""
    if (value := state.get(name)) is None:
        raise ValueError(f"token reconstruction needs {name}: call update_state({name}=...) first")
    return value


class NaiveUnpooling(UnpoolingBase):
    """Every token takes over its cluster: needs ``hard_labels``."""

    def unpool(self, x: Tensor, state: State) -> Tensor:
        return naive_unpool(x, _remembered(state, "hard_labels"))


class TokenReconstructionBlock(UnpoolingBase):
    """Every token is a combination of the clusters it resembled: needs ``feat_before_pooling``, ``feat_after_pooling``.

    Args:
        k: nearest clusters used, all if negative.
        temperture: tau (spelt as published).
        normalize: see ``reconstruction_weights``.

    Raises:
        ValueError: if k is 0 or ``normalize`` is unknown.

    Source: arXiv:2210.01035, token reconstruction layer: each token from the refined clusters it resembled.
    """

    def __init__(self, k: int = 3, temperture: float = 0.05, normalize: Normalize = "l2") -> None:
        super().__init__()
        if k == 0:
            raise ValueError("k must be positive, or negative for all clusters; got 0")
        if normalize not in ("l2", "l1"):
            raise ValueError(f"normalize must be 'l2' or 'l1', got {normalize!r}")
        self.k, self.temperture = k, temperture
        self.normalize: Normalize = normalize

    def unpool(self, x: Tensor, state: State) -> Tensor:
        before, after = _remembered(state, "feat_before_pooling"), _remembered(state, "feat_after_pooling")
        return reconstruction_weights(before, after, self.k, self.temperture, self.normalize) @ x

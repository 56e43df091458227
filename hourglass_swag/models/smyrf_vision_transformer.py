"""SMYRF: layers whose attention stays inside equal-size clusters.

Paper: SMYRF: Efficient Attention using Asymmetric Clustering, arXiv:2010.05315, applied without training as in
arXiv:2210.01035. There are no parameters beyond the backbone's, so any of its checkpoints fits. The method itself is
in ``ops/smyrf``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from common.hosts import Effect, Facts, Method, Parts, PlanError, Tokens
from hourglass_swag.host import publish
from hourglass_swag.methods import ATTENTION, FIXED, check_layer
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention, cluster_lengths
from hourglass_swag.models.plug_in import NEVER, caller, plugged_in
from hourglass_swag.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class SMYRF(Method):
    """SMYRF: attention inside clusters of like queries and keys, several rounds combined. Every token stays.

    Args:
        hashes: rounds.
        cluster_size: queries and keys of a cluster, a number or (queries, keys).
        layer: the first with the method; default: half of the depth.
        stop: the first behind it without; default: none.
        padded: keep heads and images apart; the published rows let clusters straddle them, so that images of a batch
            couple.

    Source: arXiv:2010.05315, section 3.
    """

    name = "smyrf"
    swag: ClassVar = {"padded": False}
    hashes: int = 8
    cluster_size: int | tuple[int, int] = 16
    layer: int | None = None
    stop: int | None = None
    padded: bool = True

    def resolve(self, facts: Facts) -> "SMYRF":
        first = check_layer("smyrf: layer", facts.depth // 2 if self.layer is None else self.layer, facts)
        stop = facts.depth if self.stop is None else self.stop
        if not first < stop <= facts.depth:
            raise PlanError(f"smyrf: stop, the first layer without, must be {first + 1} to {facts.depth}, got {stop!r}")
        sizes = self.cluster_size if isinstance(self.cluster_size, tuple) else (self.cluster_size, self.cluster_size)
        cores = {
            layer: SmyrfAttention(self.hashes, *sizes, padded=self.padded) for layer in range(first, stop)
        }  # refuses what is out of range
        check_clusters(facts.tokens, self.hashes * facts.heads, *sizes, self.padded)
        return replace(self, cluster_size=sizes, layer=first, stop=stop).with_cores(cores)

    @property
    def hinders_any_batch(self) -> str | None:
        why = "padded=False couples the images of a batch, so that a file for any number of them cannot be compared"
        return None if self.padded else f"{why}: take padded=True"

    def effects(self) -> Sequence[Effect]:
        needs = ATTENTION if self.padded else ATTENTION | FIXED  # clusters were cut for the network's own length
        return [Effect(layer, "attend", needs=needs) for layer in self.cores]

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tokens, Parts]:
        """Attention inside clusters."""
        rows = parts.q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (parts.q, parts.k, parts.v))
        heads = self.cores[layer](q, k, v, norm_factor=1 / parts.scale, dropout=parts.dropout)
        return heads.unflatten(0, rows), tokens, parts


def check_clusters(tokens: int, lists: int, q_cluster_size: int, k_cluster_size: int, padded: bool) -> None:
    """Refuse cluster sizes that fit no batch, and warn of those that fit some: better now than in the last batch.

    Args:
        tokens: N, queries and keys of a row alike.
        lists: rounds times heads.
        q_cluster_size, k_cluster_size, padded: see ``SmyrfAttention``.

    Raises:
        ValueError: naming the flags.
    """
    sizes = (q_cluster_size, k_cluster_size)
    every = 1 if padded else math.lcm(*(size // math.gcd(lists * tokens, size) for size in sizes))
    cluster_lengths((tokens, tokens), sizes, lists * every, padded=padded)
    if every > 1:
        warnings.warn(
            f"clusters of {q_cluster_size} queries and {k_cluster_size} keys (--smyrf_q_cluster_size, "
            f"--smyrf_k_cluster_size) fit {tokens} tokens in batches of a multiple of {every} images only, and every "
            "other batch fails; divisors of the rounds (--smyrf_n_hashes) fit all, and so does --smyrf_padded",
            stacklevel=caller(),
        )


def published(
    net: VisionTransformer,
    *,
    smyrf_plug_in_index: int = 0,
    smyrf_plug_out_index: int = NEVER,
    smyrf_n_hashes: int = 32,
    smyrf_q_cluster_size: int = 64,
    smyrf_k_cluster_size: int = 64,
    smyrf_padded: bool = False,
) -> VisionTransformer:
    """The network of a published row, under the published names of the settings.

    Args:
        net: the backbone.
        smyrf_plug_in_index, smyrf_plug_out_index: first layer with the method, and first after that without; -1: never.
        smyrf_n_hashes: rounds.
        smyrf_q_cluster_size, smyrf_k_cluster_size: queries and keys per cluster.
        smyrf_padded: keep heads and images apart instead of letting clusters straddle them; not the published numbers.

    Raises:
        ValueError: if an argument is out of range.
    """
    layers = plugged_in(net.num_layers, smyrf_plug_in_index, smyrf_plug_out_index, "smyrf")
    method = SMYRF(
        hashes=smyrf_n_hashes,
        cluster_size=(smyrf_q_cluster_size, smyrf_k_cluster_size),
        layer=layers[0],
        stop=layers[-1] + 1,
        padded=smyrf_padded,
    )
    return publish(net, method)

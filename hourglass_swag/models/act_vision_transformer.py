"""ACT: layers whose attention runs between clusters of queries.

Paper: End-to-End Object Detection with Adaptive Clustering Transformer (ACT), arXiv:2011.09315, applied without
training as in arXiv:2210.01035. There are no parameters beyond the backbone's, so any of its checkpoints fits. The
method itself is in ``ops/ACT``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from common.hosts import Effect, Facts, Method, Parts, Tokens
from hourglass_swag.host import publish
from hourglass_swag.methods import ATTENTION, check_layers
from hourglass_swag.models.ops.ACT.ada_clustering_attention import (
    BUCKET_WIDTH,
    AdaClusteringAttention,
    ClustersUnknown,
)
from hourglass_swag.models.plug_in import NEVER, plugged_in
from hourglass_swag.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class ACT(Method):
    """Adaptive clustering attention: queries that share a hash code attend as their mean. Every token stays.

    The cost depends on weights, image and random projections; see ``set_generator``.

    Args:
        hashes: rounds, 1 to 32: the more, the more clusters.
        layers: default: all.
        bucket_width: of the hash; it is in units of the queries, so that a network of other scale wants another.
        queries, keys: what is clustered.
        key_hashes: rounds for keys; default: as for queries.

    Source: arXiv:2011.09315, section 3.
    """

    name = "act"
    hinders_onnx = "shifts of bits"
    hashes: int = 24
    layers: tuple[int, ...] | None = None
    bucket_width: float = BUCKET_WIDTH
    queries: bool = True
    keys: bool = False
    key_hashes: int | None = None

    def resolve(self, facts: Facts) -> "ACT":
        layers = check_layers("act: layers", range(facts.depth) if self.layers is None else self.layers, facts)
        rounds = self.hashes if self.key_hashes is None else self.key_hashes
        return replace(self, layers=layers, key_hashes=rounds).with_cores(
            {
                layer: AdaClusteringAttention(
                    self.queries, self.keys, self.hashes, rounds, bucket_width=self.bucket_width
                )
                for layer in layers
            }
        )

    def effects(self) -> Sequence[Effect]:
        return [Effect(layer, "attend", needs=ATTENTION) for layer in self.layers or ()]

    @property
    def depends_on_data(self) -> bool:
        return bool(self.layers) and (self.queries or self.keys)

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tokens, Parts]:
        """Attention between clusters."""
        q = parts.q.contiguous() * parts.scale
        return self.cores[layer](q, parts.k, parts.v, dropout=parts.dropout), tokens, parts


def attentions(model: nn.Module) -> list[AdaClusteringAttention]:
    """The clustered attentions of a network, by layer."""
    return [module for module in model.modules() if isinstance(module, AdaClusteringAttention)]


def clusters(model: nn.Module) -> list[int]:
    """Clusters formed in the last call, in the order of hashing: layer by layer, queries, then keys.

    Raises:
        ClustersUnknown: if there was none.
    """
    formed: list[int] = []
    for attention in attentions(model):
        sides = ((attention.group_Q, attention.Q_clusters), (attention.group_K, attention.K_clusters))
        for number in (number for grouped, number in sides if grouped):
            if number is None:
                raise ClustersUnknown("no clusters have been formed yet: run the model on an image first")
            formed.append(int(number))
    return formed


def published(
    net: VisionTransformer,
    *,
    act_plug_in_index: int = 0,
    act_plug_out_index: int = NEVER,
    act_group_q: bool = True,
    act_group_k: bool = False,
    act_q_hashes: int = 32,
    act_k_hashes: int = 32,
) -> VisionTransformer:
    """The network of a published row, under the published names of the settings.

    Args:
        net: the backbone.
        act_plug_in_index, act_plug_out_index: first layer with the method, and first after that without; -1: never.
        act_group_q, act_group_k: cluster queries; cluster keys and values.
        act_q_hashes, act_k_hashes: hash rounds, 1 to 32.

    Raises:
        ValueError: if an argument is out of range.
    """
    layers = plugged_in(net.num_layers, act_plug_in_index, act_plug_out_index, "act")
    sides: dict[str, Any] = {"queries": act_group_q, "keys": act_group_k}
    return publish(net, ACT(hashes=act_q_hashes, key_hashes=act_k_hashes, layers=layers, **sides))

"""ACT on the SWAG backbone: layers whose attention runs between clusters of queries.

Paper: End-to-End Object Detection with Adaptive Clustering Transformer (ACT), arXiv:2011.09315, applied without
training as in arXiv:2210.01035. There are no parameters beyond the backbone's, so any of its checkpoints fits. The
method itself is in ``ops/ACT``.

Letters: B images, N tokens, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hourglass_swag.models.ops.ACT.ada_clustering_attention import AdaClusteringAttention, ClustersUnknown
from hourglass_swag.models.ops.ACT.attention_layer import AdaMultiheadAttention
from hourglass_swag.models.plug_in import NEVER, plugged_in
from hourglass_swag.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer, sized


class ACTEncoderBlock(EncoderBlock):
    """Transformer layer with clustered attention.

    Args:
        num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate: see ``EncoderBlock``.
        group_q, group_k, q_hashes, k_hashes: see ``AdaClusteringAttention``.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        group_q: bool = True,
        group_k: bool = False,
        q_hashes: int = 32,
        k_hashes: int = 32,
    ) -> None:
        super().__init__(num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        dropout = self.self_attention.dropout
        self.self_attention = AdaMultiheadAttention(
            self.hidden_dim, self.num_heads, group_q, group_k, q_hashes, k_hashes, dropout=dropout, batch_first=True
        )

    def attend(self, y: Tensor) -> Tensor:
        """Clustered attention among normalised tokens (B, N, C)."""
        return self.self_attention(y, y, y)[0]


WrappedEncoderBlock = EncoderBlock  # the published name of a layer without the method


class ActEncoder(Encoder):
    """The backbone's encoder under its published name; ``make_block`` decides where the method is."""


class ActVisionTransformer(VisionTransformer):
    """Vision Transformer with clustered attention in some layers.

    Args:
        arguments, options: of ``VisionTransformer``.
        act_plug_in_index, act_plug_out_index: first layer with the method, and first after that without; -1: never.
        act_group_q, act_group_k: cluster queries; cluster keys and values.
        act_q_hashes, act_k_hashes: hash rounds, 1 to 32.

    Raises:
        ValueError: if an argument is out of range.
    """

    encoder_class = ActEncoder

    def __init__(
        self,
        *arguments: Any,
        act_plug_in_index: int = 0,
        act_plug_out_index: int = NEVER,
        act_group_q: bool = True,
        act_group_k: bool = False,
        act_q_hashes: int = 32,
        act_k_hashes: int = 32,
        **options: Any,
    ) -> None:
        method = {"group_q": act_group_q, "group_k": act_group_k, "q_hashes": act_q_hashes, "k_hashes": act_k_hashes}

        def make_block(index: int, *shape: Any) -> nn.Module:
            clustered = plugged_in(self.num_layers, act_plug_in_index, act_plug_out_index, "act")
            return ACTEncoderBlock(*shape, **method) if clustered[index] else WrappedEncoderBlock(*shape)

        super().__init__(*arguments, make_block=make_block, **options)

    def attentions(self) -> list[AdaClusteringAttention]:
        """The clustered attentions, by layer."""
        return [module for module in self.modules() if isinstance(module, AdaClusteringAttention)]

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Draw the random projections of all layers from ``generator``; None: torch's default one."""
        for attention in self.attentions():
            attention.generator = generator

    def clusters(self) -> list[int]:
        """Clusters formed in the last call, in the order of hashing: layer by layer, queries, then keys.

        Raises:
            ClustersUnknown: if there was none.
        """
        formed: list[int] = []
        for attention in self.attentions():
            sides = ((attention.group_Q, attention.Q_clusters), (attention.group_K, attention.K_clusters))
            for number in (number for grouped, number in sides if grouped):
                if number is None:
                    raise ClustersUnknown("no clusters have been formed yet: run the model on a picture first")
                formed.append(int(number))
        return formed

    @property
    def depends_on_data(self) -> bool:
        """Whether the cost depends on weights, image and random projections."""
        return any(attention.group_Q or attention.group_K for attention in self.attentions())


ActViTL16 = sized("ActViTL16", ActVisionTransformer, "l16")
ActViTH14 = sized("ActViTH14", ActVisionTransformer, "h14")
ActViTDesk = sized("ActViTDesk", ActVisionTransformer, "desk", 32)

"""SMYRF on the SWAG backbone: layers whose attention stays inside equal-size clusters.

Paper: SMYRF: Efficient Attention using Asymmetric Clustering, arXiv:2010.05315, applied without training as in
arXiv:2210.01035. There are no parameters beyond the backbone's, so any of its checkpoints fits. The method itself is
in ``ops/smyrf``.

Letters: B images, N tokens, C width.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention, cluster_lengths
from hourglass_swag.models.ops.smyrf.smyrf_attn import SmyrfMultiheadAttention
from hourglass_swag.models.plug_in import NEVER, plugged_in
from hourglass_swag.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer, sized


class SmyrfEncoderBlock(EncoderBlock):
    """Transformer layer with attention inside clusters.

    Args:
        num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate: see ``EncoderBlock``.
        n_hashes, q_cluster_size, k_cluster_size, padded: see ``SmyrfAttention``.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        n_hashes: int = 32,
        q_cluster_size: int = 64,
        k_cluster_size: int = 64,
        padded: bool = False,
    ) -> None:
        super().__init__(num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        self.self_attention = SmyrfMultiheadAttention(
            self.hidden_dim,
            self.num_heads,
            n_hashes,
            q_cluster_size,
            k_cluster_size,
            dropout=self.self_attention.dropout,
            padded=padded,
            batch_first=True,
        )

    def attend(self, y: Tensor) -> Tensor:
        """Clustered attention among normalised tokens (B, N, C)."""
        return self.self_attention(y, y, y)[0]


class SmyrfEncoder(Encoder):
    """The backbone's encoder under its published name; ``make_block`` decides where the method is."""


class SmyrfVisionTransformer(VisionTransformer):
    """Vision Transformer with attention inside clusters in some layers.

    Args:
        arguments, options: of ``VisionTransformer``.
        smyrf_plug_in_index, smyrf_plug_out_index: first layer with the method, and first after that without; -1: never.
        smyrf_n_hashes: rounds.
        smyrf_q_cluster_size, smyrf_k_cluster_size: queries and keys per cluster.
        smyrf_padded: keep heads and images apart instead of letting clusters straddle them; not the published numbers.

    Raises:
        ValueError: if an argument is out of range.
    """

    encoder_class = SmyrfEncoder

    def __init__(
        self,
        *arguments: Any,
        smyrf_plug_in_index: int = 0,
        smyrf_plug_out_index: int = NEVER,
        smyrf_n_hashes: int = 32,
        smyrf_q_cluster_size: int = 64,
        smyrf_k_cluster_size: int = 64,
        smyrf_padded: bool = False,
        **options: Any,
    ) -> None:
        method = {"n_hashes": smyrf_n_hashes, "padded": smyrf_padded}
        sizes = {"q_cluster_size": smyrf_q_cluster_size, "k_cluster_size": smyrf_k_cluster_size}

        def make_block(index: int, *shape: Any) -> nn.Module:
            clustered = plugged_in(self.num_layers, smyrf_plug_in_index, smyrf_plug_out_index, "smyrf")
            return SmyrfEncoderBlock(*shape, **method, **sizes) if clustered[index] else EncoderBlock(*shape)

        super().__init__(*arguments, make_block=make_block, **options)
        attention = next((module for module in self.modules() if isinstance(module, SmyrfMultiheadAttention)), None)
        if attention is not None:
            lists = smyrf_n_hashes * attention.num_heads
            check_clusters(self.seq_length, lists, smyrf_q_cluster_size, smyrf_k_cluster_size, smyrf_padded)

    def set_generator(self, generator: torch.Generator | None) -> None:
        """Draw the random projections of all layers from ``generator``; None: torch's default one."""
        for module in self.modules():
            if isinstance(module, SmyrfAttention):
                module.generator = generator


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
            f"--smyrf_k_cluster_size) fit {tokens} tokens in batches of a multiple of {every} pictures only, and every "
            "other batch fails; divisors of the rounds (--smyrf_n_hashes) fit all, and so does --smyrf_padded",
            stacklevel=3,
        )


SmyrfViTL16 = sized("SmyrfViTL16", SmyrfVisionTransformer, "l16")
SmyrfViTH14 = sized("SmyrfViTH14", SmyrfVisionTransformer, "h14")
SmyrfViTDesk = sized("SmyrfViTDesk", SmyrfVisionTransformer, "desk", 32)

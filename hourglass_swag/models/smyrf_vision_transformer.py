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
from hourglass_swag.models.vision_transformer import SIZES, Encoder, EncoderBlock, VisionTransformer


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
        *,
        padded: bool = False,
    ) -> None:
        super().__init__(num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        self.self_attention = SmyrfMultiheadAttention(
            hidden_dim,
            num_heads,
            n_hashes,
            q_cluster_size,
            k_cluster_size,
            dropout=attention_dropout_rate,
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
        image_size, patch_size, num_layers, num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate,
            options: see ``VisionTransformer``.
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
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        smyrf_plug_in_index: int = 0,
        smyrf_plug_out_index: int = NEVER,
        smyrf_n_hashes: int = 32,
        smyrf_q_cluster_size: int = 64,
        smyrf_k_cluster_size: int = 64,
        *,
        smyrf_padded: bool = False,
        **options: Any,
    ) -> None:
        clustered = plugged_in(num_layers, smyrf_plug_in_index, smyrf_plug_out_index, "smyrf")
        shape = (num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        clustering = (smyrf_n_hashes, smyrf_q_cluster_size, smyrf_k_cluster_size)

        def make_block(index: int) -> nn.Module:
            if clustered[index]:
                return SmyrfEncoderBlock(*shape, *clustering, padded=smyrf_padded)
            return EncoderBlock(*shape)

        super().__init__(
            image_size,
            patch_size,
            num_layers,
            num_heads,
            hidden_dim,
            mlp_dim,
            dropout_rate,
            attention_dropout_rate,
            make_block=make_block,
            **options,
        )
        if any(clustered):
            check_clusters(
                self.seq_length, smyrf_n_hashes * num_heads, smyrf_q_cluster_size, smyrf_k_cluster_size, smyrf_padded
            )

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


class SmyrfViTL16(SmyrfVisionTransformer):
    """SMYRF on ViT-L/16; ``options`` are the other arguments of ``SmyrfVisionTransformer``."""

    def __init__(self, image_size: int = 224, **options: Any) -> None:
        super().__init__(image_size=image_size, **SIZES["l16"].kwargs(), **options)


class SmyrfViTH14(SmyrfVisionTransformer):
    """SMYRF on ViT-H/14; ``options`` are the other arguments of ``SmyrfVisionTransformer``."""

    def __init__(self, image_size: int = 224, **options: Any) -> None:
        super().__init__(image_size=image_size, **SIZES["h14"].kwargs(), **options)


class SmyrfViTDesk(SmyrfVisionTransformer):
    """The network of the embedded experiment; ``options`` are the other arguments of ``SmyrfVisionTransformer``."""

    def __init__(self, image_size: int = 32, **options: Any) -> None:
        super().__init__(image_size=image_size, **SIZES["desk"].kwargs(), **options)

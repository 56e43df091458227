"""The older ViT-* family of the release (separate q, k and v; published JAX names): forward pass only.

It has no gates, so neither stage of UVC runs with it; ``uvc.models.create`` refuses it by name. The reference vectors
compare its outputs. B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeparateAttention(nn.Module):
    """Self-attention with one matrix each for q, k and v, which also returns its probabilities."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D) and probabilities (B, H, T, T)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        probabilities = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((probabilities @ v).transpose(1, 2).flatten(2)), probabilities


class FeedForward(nn.Module):
    """Two linear layers, dropout after each."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class EncoderLayer(nn.Module):
    """Pre-norm layer."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SeparateAttention(dim, num_heads)
        self.mlp = FeedForward(dim, hidden, dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        update, probabilities = self.attn(self.attention_norm(x))
        x = x + update
        return x + self.mlp(self.ffn_norm(x)), probabilities


class ViTEmbeddings(nn.Module):
    """Patches, class token and positions."""

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(3, dim, patch_size, patch_size)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        patches = (height // patch_size) * (width // patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embeddings(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.dropout(x + self.position_embeddings)


class ViTEncoder(nn.Module):
    """Layers and final norm."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(dim, num_heads, mlp_dim, dropout) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        attention = []
        for layer in self.layer:
            x, probabilities = layer(x)
            attention.append(probabilities)
        return self.encoder_norm(x), attention


class ViTTransformer(nn.Module):
    """Embeddings and encoder."""

    def __init__(self, embeddings: ViTEmbeddings, encoder: ViTEncoder) -> None:
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.encoder(self.embeddings(images))


class PlainViT(nn.Module):
    """A network of the ViT-* family.

    Args:
        img_size: side of the input, or (height, width), in pixels.
        patch_size: side of a patch in pixels.
        hidden_size, num_layers, num_heads, mlp_dim: of the encoder.
        num_classes: outputs.
        dropout: after embeddings and twice in each MLP, while training.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        num_classes: int = 21843,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.transformer = ViTTransformer(
            ViTEmbeddings(img_size, patch_size, hidden_size, dropout),
            ViTEncoder(hidden_size, num_layers, num_heads, mlp_dim, dropout),
        )
        self.head = nn.Linear(hidden_size, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes) and the attention probabilities (B, H, T, T) of every layer."""
        x, attention = self.transformer(images)
        return self.head(x[:, 0]), attention

"""Multi-head attention around adaptive clustering, with the parameters and the signature of torch's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass_swag.models.ops.ACT.ada_clustering_attention import AdaClusteringAttention


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: nn.MultiheadAttention,
    core: nn.Module,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Project, split into heads, scale the queries, attend with ``core``, concatenate, project.

    Args:
        query, key, value: (B, N, C), (B, M, C), (B, M, C), one and the same tensor for self-attention.
        layer: holds the parameters.
        core: attention on (B, h, N, d), (B, h, M, d), (B, h, M, d) and a mask (B, h, M).
        key_padding_mask: keys to ignore, (B, M), True = ignore; handed on if any is.

    Returns:
        (B, N, C).
    """
    heads, scale = layer.num_heads, layer.head_dim**-0.5
    q, k, v = (split_heads(x, heads) for x in project(query, key, value, layer))  # (B, h, N, d), views
    mask = None
    if key_padding_mask is not None and bool(key_padding_mask.any()):
        mask = key_padding_mask[:, None].expand(-1, heads, -1)
    out = core(q.contiguous() * scale, k, v, mask)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def project(query: Tensor, key: Tensor, value: Tensor, layer: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, N, C) under the packed or, for other widths of key and value, separate weights."""
    bias = layer.in_proj_bias
    if layer.in_proj_weight is not None and query is key and key is value:
        return F.linear(query, layer.in_proj_weight, bias).chunk(3, dim=-1)  # pyright: ignore[reportReturnType]
    weights = (
        (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        if layer.in_proj_weight is None
        else layer.in_proj_weight.chunk(3)
    )
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) as (B, h, N, d), a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def check_plain(layer: nn.MultiheadAttention) -> None:
    """Refuse options of torch's attention that add keys.

    Raises:
        ValueError: for ``add_bias_kv`` or ``add_zero_attn``.
    """
    if layer.bias_k is not None or layer.add_zero_attn:
        raise ValueError(f"{type(layer).__name__} has neither add_bias_kv nor add_zero_attn")


class AdaMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` between clusters of queries and, if asked for, of keys.

    Args:
        embed_dim, num_heads: width C and number of heads h.
        group_Q, group_K, q_hashes, k_hashes: see ``AdaClusteringAttention``, which is the attribute ``attention``.
        options: further arguments of torch's class, such as ``dropout``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        group_Q: bool = True,
        group_K: bool = False,
        q_hashes: int = 32,
        k_hashes: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        check_plain(self)
        self.attention = AdaClusteringAttention(
            group_Q, group_K, q_hashes, k_hashes, attention_dropout=options.get("dropout", 0.0)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - published: no need_weights
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend; shapes as in torch's class: (N, B, C), or (B, N, C) with ``batch_first``.

        Args:
            key_padding_mask: keys to ignore, (B, M), True = ignore.
            attn_mask: must be None: queries of a cluster share one row of weights.

        Returns:
            The result and None: there is no N x M map of weights.

        Raises:
            ValueError: for an ``attn_mask``, or a mask that is not boolean of shape (B, M).
        """
        if attn_mask is not None:
            raise ValueError("AdaMultiheadAttention has no attn_mask: all queries of a cluster get the same weights")
        if not self.batch_first:
            own = query is key and key is value
            query = query.transpose(0, 1)
            key, value = (query, query) if own else (key.transpose(0, 1), value.transpose(0, 1))
        if key_padding_mask is not None and (
            key_padding_mask.dtype != torch.bool or key_padding_mask.shape != key.shape[:2]
        ):
            raise ValueError(
                f"key_padding_mask must be boolean, (batch, keys) = {tuple(key.shape[:2])}, got "
                f"{key_padding_mask.dtype}, {tuple(key_padding_mask.shape)}"
            )
        out = multi_head_attention_forward(query, key, value, self, self.attention, key_padding_mask)
        return out if self.batch_first else out.transpose(0, 1), None

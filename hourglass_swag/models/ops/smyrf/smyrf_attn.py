"""Multi-head attention around SMYRF, with the parameters and the signature of torch's."""

from typing import Any

from torch import Tensor, nn

from hourglass_swag.models.ops.ACT.attention_layer import check_plain, project, split_heads
from hourglass_swag.models.ops.smyrf.attn import SmyrfAttention


class SmyrfMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` inside clusters.

    Args:
        embed_dim, num_heads: width C and number of heads h.
        n_hashes, q_cluster_size, k_cluster_size, q_attn_size, k_attn_size, clustering_algo, dropout, r, padded: see
            ``SmyrfAttention``, which is the attribute ``attention``.
        options: further arguments of torch's class, such as ``batch_first``.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        n_hashes: int,
        q_cluster_size: int,
        k_cluster_size: int,
        q_attn_size: int | None = None,
        k_attn_size: int | None = None,
        clustering_algo: str = "lsh",
        dropout: float = 0.0,
        r: float = 1,
        *,
        padded: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        check_plain(self)
        self.attention = SmyrfAttention(
            n_hashes, q_cluster_size, k_cluster_size, q_attn_size, k_attn_size, clustering_algo, dropout, r,
            padded=padded,
        )  # fmt: skip

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - the flags for weights are ignored
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend; shapes as in torch's class: (N, B, C), or (B, N, C) with ``batch_first``.

        Returns:
            The result and None, whatever ``need_weights`` says: there is no N x N map of weights.

        Raises:
            ValueError: for any mask.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("SMYRF attention has no masks: they have no meaning inside sorted clusters")
        if not self.batch_first:
            own = query is key and key is value
            query = query.transpose(0, 1)
            key, value = (query, query) if own else (key.transpose(0, 1), value.transpose(0, 1))
        q, k, v = (split_heads(x, self.num_heads).flatten(0, 1) for x in project(query, key, value, self))  # (R, N, d)
        out = self.attention(q, k, v, norm_factor=self.head_dim**0.5)
        out = self.out_proj(out.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None

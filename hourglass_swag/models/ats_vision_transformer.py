"""ATS on the SWAG backbone: layers that go on with the tokens their class token needs.

Paper: Adaptive Token Sampling for Efficient Vision Transformers, arXiv:2111.15667. There are no parameters beyond the
backbone's, so any of its checkpoints fits. The sampling is in ``ops/ats.py``.

The published rows on SWAG add the attention output to the *normalised* input (``residual="normalized"``, the default),
which explains most of their loss of accuracy; ATS itself adds it to the input (``residual="input"``).

How many tokens survive depends on weights and images. In a batch, an image with fewer survivors than another is padded
with zero tokens; as published, plain layers attend to this padding and later samplers see it, so that a result depends
on what else is in the batch. With classifier "gap" the first patch plays the part of the class token.

Letters: B images, N tokens in, U tokens out, C width.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from common.measure.flops import OpCounts
from hourglass_swag.models.ops.ats import attend_with_policy, gather_tokens, sample_tokens
from hourglass_swag.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer, sized

Residual = Literal["normalized", "input"]


class ATSBlock(EncoderBlock):
    """Transformer layer that samples among its tokens.

    Args:
        shape: arguments of ``EncoderBlock``.
        n_ref_tokens, drop_tokens: see ``ops.ats.sample_tokens``.
        residual: what the attention output is added to, see the top of this file.

    Raises:
        ValueError: for another ``residual``.
    """

    def __init__(
        self,
        *shape: Any,
        n_ref_tokens: int,
        drop_tokens: bool = False,
        residual: Residual = "normalized",
        **named: Any,
    ) -> None:
        super().__init__(*shape, **named)
        if residual not in ("normalized", "input"):
            raise ValueError(f"residual must be 'normalized' or 'input', got {residual!r}")
        self.residual: Residual = residual
        self.n_ref_tokens, self.drop_tokens = n_ref_tokens, drop_tokens

    def forward(self, x: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One layer.

        Args:
            x: tokens, (N, B, C).
            policy: 1 for tokens, 0 for padding, (B, N, 1); None without padding.

        Returns:
            The sampled tokens (U, B, C), and their policy.
        """
        x = x.transpose(0, 1)  # (B, N, C)
        normalized = self.ln_1(x)
        q, k, v = self.self_attention.project(normalized)
        if policy is not None:
            k, v = k * policy[:, None], v * policy[:, None]
        before, (positions, policy) = policy, self.sample(q, k, v, policy)
        q = q.gather(2, positions[:, None, :, None].expand(-1, self.num_heads, -1, q.shape[3]))
        dropout = self.self_attention.dropout if self.training else 0.0
        attended = self.self_attention.merge_heads(attend_with_policy(q, k, v, before, dropout=dropout))
        x = gather_tokens(normalized if self.residual == "normalized" else x, positions, policy)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        if policy is not None:
            x = x * policy
        return x.transpose(0, 1), policy

    def sample(self, q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Positions (B, U) of the sampled tokens, and their policy; see ``ops.ats.sample_tokens``."""
        return sample_tokens(q, k, v, policy, n_ref_tokens=self.n_ref_tokens, drop_tokens=self.drop_tokens)

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """As executed around the attention, which the published code computes for all N tokens before it samples U.

        5NC + 2N^2 C + 2N^2 + 5hN^2 + hN + (R-1)^2 + 15(R-1) there, the softmax being spelt out (subtract, exp,
        multiply, add, divide), and the policy counts as if there were padding.
        """
        (N, B, C), U, h = args[0].shape, len(result[0]), self.num_heads
        R = self.n_ref_tokens - 1
        around = ("linear", "linear_bias", "layer_norm", "dropout", "gelu")
        return OpCounts({kind: inside[kind] for kind in around}) + B * OpCounts(
            matmul=2 * N * N * C,
            mul=3 * N * C + N * N + h * N * N + 3 * U * C + 5 * R,
            add=N * N + h * N * N + h * N + 2 * U * C + 2 * R,
            sub=h * N * N + R * R + 4 * R,
            div=N * C + h * N * N + 3 * R,
            exp=h * N * N,
            norm=N * C,
            cumsum=R,
        )


class ATSEncoder(Encoder):
    """Encoder whose sampling layers hand their policy on to the next one; plain layers ignore it, as published."""

    def forward(self, x: Tensor) -> Tensor:
        """All layers; tokens (N, B, C) in, those that are left out."""
        x, policy = self.dropout(self.embed(x)), None
        for layer in self.layers:
            if isinstance(layer, ATSBlock):
                x, policy = layer(x, policy)
            else:
                x = layer(x)
        return self.normalize(x)


class ATSVisionTransformer(VisionTransformer):
    """Vision Transformer with adaptive token sampling in some layers.

    Args:
        arguments, options: of ``VisionTransformer``.
        ats_blocks: indices of the layers that sample.
        num_tokens: upper bound of the tokens sampled. It must not bind: at least as many as enter the network, or 1
            for all of them (the published code fails otherwise).
        drop_tokens: shorten the sequence to the survivors; else they are followed by zero tokens, up to N.
        residual: see the top of this file.

    Raises:
        ValueError: if one of ``ats_blocks`` is no layer, ``num_tokens`` would bind, or the residual is unknown.
    """

    encoder_class = ATSEncoder

    def __init__(
        self,
        *arguments: Any,
        ats_blocks: Sequence[int] = (),
        num_tokens: float = 197,
        drop_tokens: bool = False,
        residual: Residual = "normalized",
        **options: Any,
    ) -> None:
        def make_block(index: int, *shape: Any) -> nn.Module:
            if beyond := sorted(index for index in ats_blocks if not 0 <= index < self.num_layers):
                raise ValueError(
                    f"ats_blocks (--ats_blocks_indexes) must hold layers 0 to {self.num_layers - 1}, got {beyond}"
                )
            if index not in ats_blocks:
                return EncoderBlock(*shape)
            return ATSBlock(*shape, n_ref_tokens=self.seq_length, drop_tokens=drop_tokens, residual=residual)

        super().__init__(*arguments, make_block=make_block, **options)
        self.ats_blocks, self.drop_tokens = sorted(set(ats_blocks)), drop_tokens
        if self.ats_blocks and num_tokens != 1 and num_tokens < self.seq_length:
            raise ValueError(
                f"num_tokens (--ats_num_tokens) must be at least {self.seq_length}, the tokens that enter the network "
                f"at {self.image_size} pixels, got {num_tokens}: it is a bound that ATS cannot keep to"
            )

    @property
    def depends_on_data(self) -> bool:
        """Whether the number of tokens, and so the cost, depends on weights and images."""
        return self.drop_tokens and bool(self.ats_blocks)


ATSViTB16 = sized("ATSViTB16", ATSVisionTransformer, "b16")
ATSViTL16 = sized("ATSViTL16", ATSVisionTransformer, "l16")
ATSViTH14 = sized("ATSViTH14", ATSVisionTransformer, "h14")
ATSViTDesk = sized("ATSViTDesk", ATSVisionTransformer, "desk", 32)

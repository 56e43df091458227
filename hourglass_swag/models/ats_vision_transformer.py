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
from typing import Any, Literal, cast

from torch import Tensor, nn

from common.measure.flops import OpCounts
from hourglass_swag.models.ops.ats import AdaptiveTokenSampler, gather_tokens
from hourglass_swag.models.vision_transformer import SIZES, Encoder, EncoderBlock, VisionTransformer

Residual = Literal["normalized", "input"]


class ATSBlock(EncoderBlock):
    """Transformer layer that samples among its tokens.

    Args:
        num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate: see ``EncoderBlock``.
        n_ref_tokens, drop_tokens: see ``AdaptiveTokenSampler``.
        residual: what the attention output is added to, see the top of this file.

    Raises:
        ValueError: for another ``residual``.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        *,
        n_ref_tokens: int,
        drop_tokens: bool = False,
        residual: Residual = "normalized",
    ) -> None:
        super().__init__(num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        if residual not in ("normalized", "input"):
            raise ValueError(f"residual must be 'normalized' or 'input', got {residual!r}")
        self.residual: Residual = residual
        self.self_attention = AdaptiveTokenSampler(
            hidden_dim, num_heads, attention_dropout_rate, n_ref_tokens=n_ref_tokens, drop_tokens=drop_tokens
        )

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
        attended, positions, policy = self.self_attention(normalized, policy)
        x = gather_tokens(normalized if self.residual == "normalized" else x, positions, policy)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        if policy is not None:
            x = x * policy
        return x.transpose(0, 1), policy

    def published_ops(self, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """As executed around the attention, which the published code computes for all N tokens before it samples U.

        5NC + 2N^2 C + 2N^2 + 5hN^2 + hN + (R-1)^2 + 15(R-1) there, the softmax being spelt out (subtract, exp,
        multiply, add, divide), and the policy counts as if there were padding.
        """
        (N, B, C), U, h = args[0].shape, len(result[0]), self.num_heads
        R = cast(AdaptiveTokenSampler, self.self_attention).n_ref_tokens - 1
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
        image_size, patch_size, num_layers, num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate,
            options: see ``VisionTransformer``.
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
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        *,
        ats_blocks: Sequence[int] = (),
        num_tokens: float = 197,
        drop_tokens: bool = False,
        residual: Residual = "normalized",
        **options: Any,
    ) -> None:
        if beyond := sorted(index for index in ats_blocks if not 0 <= index < num_layers):
            raise ValueError(f"ats_blocks (--ats_blocks_indexes) must hold layers 0 to {num_layers - 1}, got {beyond}")

        def make_block(index: int) -> nn.Module:
            shape = (num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
            if index not in ats_blocks:
                return EncoderBlock(*shape)
            return ATSBlock(*shape, n_ref_tokens=self.seq_length, drop_tokens=drop_tokens, residual=residual)

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
        self.ats_blocks, self.drop_tokens = sorted(set(ats_blocks)), drop_tokens
        if self.ats_blocks and num_tokens != 1 and num_tokens < self.seq_length:
            raise ValueError(
                f"num_tokens (--ats_num_tokens) must be at least {self.seq_length}, the tokens that enter the network "
                f"at {image_size} pixels, got {num_tokens}: it is a bound that ATS cannot keep to"
            )

    @property
    def depends_on_data(self) -> bool:
        """Whether the number of tokens, and so the cost, depends on weights and images."""
        return self.drop_tokens and bool(self.ats_blocks)


class ATSViTB16(ATSVisionTransformer):
    """ATS ViT-B/16; ``options`` are the other arguments of ``ATSVisionTransformer``."""

    def __init__(self, image_size: int = 224, **options: Any) -> None:
        super().__init__(image_size, **SIZES["b16"].kwargs(), **options)


class ATSViTL16(ATSVisionTransformer):
    """ATS ViT-L/16; ``options`` are the other arguments of ``ATSVisionTransformer``."""

    def __init__(self, image_size: int = 224, **options: Any) -> None:
        super().__init__(image_size, **SIZES["l16"].kwargs(), **options)


class ATSViTH14(ATSVisionTransformer):
    """ATS ViT-H/14; ``options`` are the other arguments of ``ATSVisionTransformer``."""

    def __init__(self, image_size: int = 224, **options: Any) -> None:
        super().__init__(image_size, **SIZES["h14"].kwargs(), **options)


class ATSViTDesk(ATSVisionTransformer):
    """The network of the embedded experiment; ``options`` are the other arguments of ``ATSVisionTransformer``."""

    def __init__(self, image_size: int = 32, **options: Any) -> None:
        super().__init__(image_size, **SIZES["desk"].kwargs(), **options)

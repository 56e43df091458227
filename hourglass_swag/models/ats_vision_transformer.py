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

import torch
from torch import Tensor, nn

from common.measure import flops
from common.measure.flops import OpCounts
from hourglass_swag.models.ops.ats import AdaptiveTokenSampler, gather_tokens
from hourglass_swag.models.vision_transformer import SIZES, Encoder, EncoderBlock, VisionTransformer, count_layer

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

    def count_ops(self, num_tokens: int, num_sampled: int | None = None) -> OpCounts:
        """The published form for N tokens in and U out (N if not given); the policy counts as if there were padding.

        4NC for the first norm, the sampler, and 12UC + UM(C+1) + UC(M+1) + 2UM for the rest.
        """
        sampled = num_tokens if num_sampled is None else num_sampled
        elements = sampled * self.hidden_dim
        sampler = cast(AdaptiveTokenSampler, self.self_attention)
        return (
            flops.layer_norm(num_tokens * self.hidden_dim + elements)
            + sampler.count_ops(num_tokens, num_sampled)
            + flops.mul(3 * elements)
            + flops.dropout(2 * elements)
            + flops.add(2 * elements)
            + self.mlp.count_ops(sampled)
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

    def count_tokens(self, images: Tensor) -> list[int]:
        """Tokens that enter each layer for these images and, last, those that leave the last one."""
        entering: list[int] = []
        modules = [*self.encoder.layers, self.encoder.ln]
        dimension = [0] * len(self.encoder.layers) + [1]  # the norm sees (B, N, C)
        handles = [
            module.register_forward_pre_hook(lambda _, args, dim=dim: entering.append(args[0].shape[dim]))
            for module, dim in zip(modules, dimension, strict=True)
        ]
        try:
            with torch.inference_mode():
                self(images)
        finally:
            for handle in handles:
                handle.remove()
        return entering

    def count_ops_on(self, images: Tensor) -> OpCounts:
        """Operations for one image of a batch (B, 3, S, S); the batch shares its number of tokens."""
        return self.count_outer_ops() + self.count_encoder_ops(self.count_tokens(images))

    def count_encoder_ops(self, tokens: Sequence[int] | None = None) -> OpCounts:
        """2NC for position embedding and dropout, the layers, 4 N_L C for the norm.

        Args:
            tokens: those that enter each layer and, last, those that leave the last one; may be omitted where their
                number does not depend on the data.

        Raises:
            ValueError: if it depends on the data and is not given.
        """
        if tokens is None:
            if self.depends_on_data:
                raise ValueError(
                    "how many tokens ATS drops depends on the weights and on the image, and with it the cost: ask "
                    "count_ops_on(images)"
                )
            tokens = [self.seq_length] * (self.num_layers + 1)
        *entering, leaving = tokens
        counts = flops.add(entering[0] * self.hidden_dim) + flops.dropout(entering[0] * self.hidden_dim)
        for layer, before, after in zip(self.encoder.layers, entering, tokens[1:], strict=True):
            counts += layer.count_ops(before, after) if isinstance(layer, ATSBlock) else count_layer(layer, before)
        return counts + flops.layer_norm(leaving * self.hidden_dim)


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

"""Token merging in a SWAG Vision Transformer (and whatever has its modules): ``apply_patch(model)``.

The network is recognised by the names of its classes, so that this package does not depend on where it is defined:
``VisionTransformer``, ``Encoder``, ``EncoderBlock``, and in the latter an attention with packed weights. Tokens travel
sequence first, (N, B, C), into and out of the encoder, and batch first, (B, N, C), inside.

Letters: B images, N tokens, U tokens after merging, C width, h heads, d = C / h, M width of the MLP.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .common import Patched, ToMeBlock, ToMeModel, attend, change_class, change_settings, is_patched, make_info

ATTENTION = ("SelfAttention", "MultiheadAttention")
"""Names of attention classes: ``in_proj_weight``, ``in_proj_bias``, ``out_proj`` and ``num_heads`` are what counts."""


class ToMeAttention(Patched):
    """Mixin of the attention."""

    def attend(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention among the tokens of ``x`` (B, N, C), proportional to their sizes; also the keys (B, h, N, d).

        As in the published code, there is no dropout at the attention weights.
        """
        module = cast(Any, self)
        qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)  # (B, N, 3C)
        q, k, v = qkv.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        out = attend(q, k, v, size)
        return module.out_proj(out.transpose(1, 2).flatten(2)), k


class ToMeEncoderBlock(ToMeBlock):
    """Mixin of a layer: attention, merging, MLP."""

    def forward(self, x: Tensor) -> Tensor:
        """One layer: tokens (B, N, C) to (B, U, C)."""
        block = cast(Any, self)
        r = self.begin()
        attended, keys = block.self_attention.attend(block.ln_1(x), self.attention_size())
        x = x + block.dropout(attended)
        if r > 0:
            x = self.merge(x, keys, r)
        return x + block.mlp(block.ln_2(x))


class ToMeEncoder(Patched):
    """Mixin of the encoder."""

    def forward(self, x: Tensor) -> Tensor:
        """All layers: tokens (N, B, C) to normalised tokens (U, B, C)."""
        encoder = cast(Any, self)
        x = encoder.dropout(x + encoder.pos_embedding).transpose(0, 1)  # (B, N, C)
        for layer in encoder.layers:
            x = layer(x)
        return encoder.ln(x).transpose(0, 1)


class ToMeVisionTransformer(ToMeModel):
    """Mixin of the network."""


def apply_patch(
    model: nn.Module, trace_source: bool = False, prop_attn: bool = True, *, scatter: str = "auto"
) -> nn.Module:
    """Make a SWAG Vision Transformer merge tokens, in place. Then set ``model.r``; it is 0 at first.

    Args:
        model: a ``VisionTransformer`` with plain layers.
        trace_source: keep track of which patches are in which token, in ``model._tome_info["source"]``.
        prop_attn: proportional attention. Networks trained without merging want it, those of masked auto-encoding
            (evaluated after fine-tuning) do not.
        scatter: form of the merging, see ``tome.ops.FORMS``.

    Returns:
        The model. Its state dict stays the same. A model patched before takes the new settings and keeps its ``r``.

    Raises:
        TypeError: if the model has modules that this patch does not know, naming them; nothing is changed then.
        ValueError, ImportError: if ``scatter`` cannot be used here.
    """
    if is_patched(model):
        change_settings(model, trace_source=trace_source, prop_attn=prop_attn, scatter=scatter)
        return model
    check_model(model)
    vit = cast(Any, model)
    info = make_info(
        trace_source=trace_source, prop_attn=prop_attn, scatter=scatter, class_token=vit.classifier == "token"
    )
    layers = list(vit.encoder.layers)
    for index, layer in enumerate(layers):
        change_class(layer.self_attention, ToMeAttention, info)
        change_class(layer, ToMeEncoderBlock, info, _tome_layer=index, _tome_layers=len(layers))
    change_class(vit.encoder, ToMeEncoder, info)
    change_class(vit, ToMeVisionTransformer, info, _tome_layers=len(layers))
    return model


def check_model(model: nn.Module) -> None:
    """Refuse a network whose tokens this patch would not get hold of, or whose layers it does not know.

    Raises:
        TypeError: naming the module.
    """
    name = type(model).__name__
    encoder = getattr(model, "encoder", None)
    if type(encoder).__name__ != "Encoder" or not hasattr(model, "classifier"):
        raise _refusal(f"{name} has no encoder of class Encoder (but {type(encoder).__name__})")
    for method in ("forward", "encode"):
        owner = getattr(getattr(type(model), method, None), "__qualname__", "VisionTransformer.").rpartition(".")[0]
        if owner != "VisionTransformer":
            raise _refusal(f"{name} has a way of its own with tokens ({owner}.{method})")
    position = getattr(encoder, "pos_embedding", None)
    if not isinstance(position, Tensor) or position.dim() != 3 or position.shape[1] != 1:
        raise _refusal("encoder.pos_embedding is not (tokens, 1, width): tokens do not travel sequence first")
    for i, layer in enumerate(cast(Any, encoder).layers):
        if type(layer).__name__ != "EncoderBlock":
            raise _refusal(f"encoder.layers.layer_{i} is not an EncoderBlock, but {type(layer).__name__}")
        attention = getattr(layer, "self_attention", None)
        if type(attention).__name__ not in ATTENTION or getattr(attention, "in_proj_weight", None) is None:
            raise _refusal(
                f"encoder.layers.layer_{i}.self_attention is not {' or '.join(ATTENTION)} with packed weights, but "
                f"{type(attention).__name__}"
            )


def _refusal(what: str) -> TypeError:
    return TypeError(
        f"tome.patch.swag merges tokens in the plain SWAG VisionTransformer, which this model is not: {what}. For a "
        "VisionTransformer of timm there is tome.patch.timm"
    )

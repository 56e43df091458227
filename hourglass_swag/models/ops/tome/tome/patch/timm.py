"""Token merging in a VisionTransformer of timm: ``apply_patch(model)``.

The network keeps its own class as a base (so DeiT with distillation keeps its two heads), and every module of a layer
is honoured: LayerScale, query and key normalisation, stochastic depth, the gate and the norm of the attention. Class,
distillation and register tokens never merge and stay in front. A module that this patch does not know is refused by
name rather than skipped.

Letters: B images, N tokens, U tokens after merging, C width, h heads, d = C / h.
"""

from typing import Any, cast

from torch import Tensor, nn

from ..utils import parse_r
from .common import Patched, ToMeBlock, ToMeModel, attend, change_class, change_settings, is_patched, make_info

BLOCK_PARTS = frozenset({"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2", "drop_path"})
ATTENTION_PARTS = frozenset({"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"})


class ToMeAttention(Patched):
    """Mixin of the attention."""

    def attend(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention among the tokens of ``x`` (B, N, C), proportional to their sizes; also the keys (B, h, N, d)."""
        module = cast(Any, self)
        qkv = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d)
        q, k, v = qkv.unbind(0)
        q, k = module.q_norm(q), module.k_norm(k)
        out = attend(q, k, v, size, module.attn_drop.p if module.training else 0.0)
        out = _apply(module, "norm", out.transpose(1, 2).flatten(2))  # (B, N, C)
        gate = getattr(module, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return module.proj_drop(module.proj(out)), k


class ToMeTimmBlock(ToMeBlock):
    """Mixin of a layer: attention, merging, MLP."""

    def forward(self, x: Tensor, *args: Any, **masks: Any) -> Tensor:
        """One layer: tokens (B, N, C) to (B, U, C). A layer before the first merge that merges nothing is timm's own.

        Raises:
            ValueError: for an attention mask once tokens were merged, as it speaks of other tokens.
        """
        block = cast(Any, self)
        r, size = self.begin(), self._tome_info["size"]
        if r == 0 and size is None:
            return super().forward(x, *args, **masks)  # pyright: ignore[reportAttributeAccessIssue]
        if args or any(mask is not None and mask is not False for mask in masks.values()):
            raise ValueError("an attention mask cannot be combined with token merging: set model.r = 0")
        attended, keys = block.attn.attend(block.norm1(x), self.attention_size())
        x = x + _apply(block, "drop_path1", _apply(block, "ls1", attended))
        if r > 0:
            x = self.merge(x, keys, r)
        return x + _apply(block, "drop_path2", _apply(block, "ls2", block.mlp(block.norm2(x))))


class ToMeTimmVisionTransformer(ToMeModel):
    """Mixin of the network."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse to compute layers twice, the second time with the sizes that the first left behind."""
        if enable:
            raise NotImplementedError(f"{type(self).__name__} merges tokens: gradient checkpointing is not supported")

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Tokens behind chosen layers; merged tokens are no grid."""
        layout = args[4] if len(args) > 4 else options.get("output_fmt", "NCHW")
        if layout != "NLC" and any(parse_r(self._tome_layers, self.r)):
            raise ValueError("merged tokens do not fill a grid: ask for output_fmt='NLC', or set model.r = 0")
        return super().forward_intermediates(x, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]


def apply_patch(
    model: nn.Module, trace_source: bool = False, prop_attn: bool = True, *, scatter: str = "auto"
) -> nn.Module:
    """Make a timm VisionTransformer merge tokens, in place. Then set ``model.r``; it is 0 at first.

    With average pooling, tokens that remain count alike, whatever their size, as in the published code.

    Args:
        model: a ``timm.models.vision_transformer.VisionTransformer`` or a subclass, with layers of class ``Block``.
        trace_source: keep track of which patches are in which token, in ``model._tome_info["source"]``.
        prop_attn: proportional attention. Networks trained without merging want it, those of masked auto-encoding
            (evaluated after fine-tuning) do not.
        scatter: form of the merging, see ``tome.ops.FORMS``.

    Returns:
        The model. Its state dict stays the same. A model patched before takes the new settings and keeps its ``r``.

    Raises:
        ImportError: if timm is not installed.
        TypeError: if the model has modules that this patch does not know, naming them; nothing is changed then.
        ValueError, ImportError: if ``scatter`` cannot be used here.
    """
    if is_patched(model):
        change_settings(model, trace_source=trace_source, prop_attn=prop_attn, scatter=scatter)
        return model
    check_model(model)
    vit = cast(Any, model)
    class_token = getattr(vit, "cls_token", None) is not None
    distill_token = getattr(vit, "dist_token", None) is not None
    info = make_info(
        trace_source=trace_source,
        prop_attn=prop_attn,
        scatter=scatter,
        class_token=class_token,
        distill_token=distill_token,
        prefix_tokens=getattr(vit, "num_prefix_tokens", int(class_token) + int(distill_token)),
    )
    layers = list(vit.blocks)
    for index, layer in enumerate(layers):
        change_class(layer.attn, ToMeAttention, info)
        change_class(layer, ToMeTimmBlock, info, _tome_layer=index, _tome_layers=len(layers))
    change_class(vit, ToMeTimmVisionTransformer, info, _tome_layers=len(layers))
    return model


def check_model(model: nn.Module) -> None:
    """Refuse a network, a layer or a part of a layer that this patch does not know.

    Raises:
        ImportError: if timm is not installed.
        TypeError: naming the module.
    """
    try:
        from timm.models import vision_transformer as known
    except ImportError as error:
        raise ImportError("tome.patch.timm needs timm: pip install 'timm>=1.0.20,<1.1'") from error
    if not isinstance(model, known.VisionTransformer):
        kind = type(model)
        reason = next((f", which has {name}" for name, _ in model.named_modules() if "rope" in name), "")
        raise TypeError(
            f"tome.patch.timm merges tokens in timm.models.vision_transformer.VisionTransformer, not in "
            f"{kind.__module__}.{kind.__name__}{reason}"
        )
    if cast(Any, model).grad_checkpointing:
        raise TypeError("tome.patch.timm: gradient checkpointing is on; call model.set_grad_checkpointing(False) first")
    block_class, attention_class = known.Block, known.Attention  # pyright: ignore[reportPrivateImportUsage]
    for i, block in enumerate(model.blocks):
        _check_part(f"blocks.{i}", block, block_class, BLOCK_PARTS)
        _check_part(f"blocks.{i}.attn", cast(Any, block).attn, attention_class, ATTENTION_PARTS)


def _check_part(name: str, module: nn.Module, expected: type[nn.Module], parts: frozenset[str]) -> None:
    """Refuse a module that runs something else than ``expected`` does, or that has further parts."""
    if type(module).forward is not expected.forward:
        raise TypeError(
            f"tome.patch.timm does not know {name}, a {type(module).__name__}: it must work like {expected.__name__}"
        )
    for part, child in module.named_children():
        if part not in parts:
            raise TypeError(f"tome.patch.timm does not know {name}.{part}, a {type(child).__name__}")


def _apply(module: nn.Module, part: str, x: Tensor) -> Tensor:
    """``x`` through a part that not every version of timm has; old versions call both stochastic depths drop_path."""
    layer = getattr(module, part, None)
    if layer is None and part.startswith("drop_path"):
        layer = getattr(module, "drop_path", None)
    return x if layer is None else layer(x)

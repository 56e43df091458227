"""ToMe on SWAG: the dense Vision Transformer, patched to merge its most similar tokens in every layer.

Paper: Token Merging: Your ViT But Faster, arXiv:2210.09461. The method itself is the package ``ops/tome``; it has no
parameters, so any checkpoint of the backbone fits. ``model.r`` may be changed at any time.
"""

from collections.abc import Callable
from typing import Any, cast

from common.measure.flops import CUSTOM_OPERATORS
from hourglass_swag.models.ops.tome import ops, parse_r, patch
from hourglass_swag.models.vision_transformer import VisionTransformer, ViTDesk, ViTH14, ViTL16

CUSTOM_OPERATORS["tome::merge_wavg"] = lambda args, result: {  # tokens times their sizes, rows divided by theirs
    "mul": args[0].numel(),
    "div": result[0].numel(),
}


def make_tome_vit(dense: type[VisionTransformer]) -> Callable[..., VisionTransformer]:
    """The function that builds ``dense`` and makes it merge tokens."""

    def build(
        *,
        tome_r: int | tuple[float, float] | list[int] = 0,
        trace_source: bool = False,
        prop_attn: bool = True,
        scatter: str = "auto",
        **options: Any,
    ) -> VisionTransformer:
        """A dense network that merges tokens.

        Args:
            tome_r: tokens merged in every layer, or a schedule, see ``parse_r``; a layer merges at most half.
            trace_source, prop_attn, scatter: see ``patch.swag``.
            options: arguments of the dense network.

        Raises:
            ValueError: if ``tome_r`` is negative, if ``scatter`` cannot be used here, or as the dense network.
        """
        try:
            parse_r(1, tome_r)
        except ValueError as error:
            raise ValueError(f"--tome_r (tome_r): {error}") from error
        try:
            ops.check_form(scatter)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--scatter: {error}") from error
        model = dense(**options)
        patch.swag(model, trace_source=trace_source, prop_attn=prop_attn, scatter=scatter)
        cast(Any, model).r = tome_r
        return model

    build.__name__ = build.__qualname__ = f"ToMe{dense.__name__}"
    return build


ToMeViTL16 = make_tome_vit(ViTL16)
ToMeViTH14 = make_tome_vit(ViTH14)
ToMeViTDesk = make_tome_vit(ViTDesk)

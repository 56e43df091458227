"""ToMe: the most similar tokens merge in every layer.

Paper: Token Merging: Your ViT But Faster, arXiv:2210.09461. What merges into what is in the package ``ops/tome``; it
has no parameters, so any checkpoint of the backbone fits. A network that was patched in place (``tome.patch.timm``,
``tome.patch.swag``, the names ``tome_vit_*``) has ``model.r``, which may be changed at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from common.hosts import Effect, Facts, Lean, Method, NotAHost, Parts, Plan, PlanError, Tokens
from common.hosts.network import check, find_host, lean_class
from common.measure.flops import CUSTOM_OPERATORS
from hourglass_swag.methods import EQUAL, REDUCES
from hourglass_swag.models.ops.tome.tome.merge import Matching, bipartite_soft_matching, merge_limit, merge_wavg
from hourglass_swag.models.ops.tome.tome.ops import check_form
from hourglass_swag.models.ops.tome.tome.utils import R, parse_r
from hourglass_swag.models.vision_transformer import VisionTransformer

CUSTOM_OPERATORS["tome::match"] = lambda args, result: args[0].numel() * args[0].shape[1] // 4  # half of them by half
CUSTOM_OPERATORS["tome::merge_wavg"] = lambda args, result: {  # tokens times their sizes, rows divided by theirs
    "mul": args[0].numel(),
    "div": result[0].numel(),
}


@dataclass(frozen=True)
class ToMe(Method):
    """Token Merging: r pairs of tokens with similar keys merge in every layer.

    Args:
        r: pairs per layer: a number, one for each layer, or (mean, inflection); default: tokens // (2 x layers).
        prop_attn: attention proportional to the size of the keys.
        scatter: form of the merging, see ``tome.ops.FORMS``.

    Source: arXiv:2210.09461, section 3; proportional attention: Eq. 1.
    """

    name = "tome"
    r: R | None = None
    prop_attn: bool = True
    scatter: str = "auto"

    def resolve(self, facts: Facts) -> "ToMe":
        r = facts.tokens // (2 * facts.depth) if self.r is None else self.r
        try:
            schedule = parse_r(facts.depth, r)
            check_form(self.scatter)
        except (TypeError, ValueError, ImportError, OverflowError) as error:
            raise PlanError(f"tome: {error}") from error
        if len(schedule) > facts.depth:
            raise PlanError(f"tome: r holds {len(schedule)} numbers for {facts.depth} layers")
        return replace(self, r=schedule)

    def effects(self) -> Sequence[Effect]:
        assert isinstance(self.r, list)
        breaks = REDUCES | {"plain attention"} if self.prop_attn else REDUCES
        return [Effect(layer, "between", needs=EQUAL, breaks=breaks) for layer, r in enumerate(self.r) if r]

    def between(self, layer: int, tokens: Tokens, parts: Parts) -> Tokens:
        """Merge r pairs of tokens with similar keys."""
        assert isinstance(self.r, list)
        if not min(self.r[layer], merge_limit(tokens.x.shape[1], tokens.prefix)):
            return tokens
        metric, prefix = parts.metric.mean(dim=1), tokens.prefix
        merge, _ = bipartite_soft_matching(metric, self.r[layer], prefix_tokens=prefix, scatter=self.scatter)
        x, size = merge_wavg(merge, tokens.x, tokens.size)
        rotation = tokens.rotation
        if rotation is not None:
            places = F.pad(rotation.coordinates.expand(x.shape[0], -1, -1), (0, 0, prefix, 0))
            rotation = rotation.at(merge_wavg(merge, places, tokens.size)[0][:, prefix:])
        bias = size[..., 0].log() if self.prop_attn or tokens.key_bias is not None else None
        matching = cast(Matching, merge)

        def undo(x: Tensor) -> Tensor:
            return matching.unmerge(x, restore_order=True)

        return tokens.update(x=x, size=size, key_bias=bias, rotation=rotation, grid=None, undone_by=undo)


class Patched(Lean):
    """Mixin of a network that was patched in place.

    Attributes:
        _tome_info: of the last pass ``size`` (B, N, 1), None where nothing merged, and with ``trace_source`` also
            ``source``, which patches are in which token, (B, U, N); and the settings.
    """

    _tome_info: dict[str, Any]

    @property
    def r(self) -> R:
        """Tokens that each layer merges away, see ``tome.parse_r``."""
        return self._tome_info["r"]

    @r.setter
    def r(self, value: R) -> None:
        info = self._tome_info
        parse_r(self.plan.host.facts.depth, value)
        method = ToMe(r=value, prop_attn=info["prop_attn"], scatter=info["scatter"])
        self.plan = Plan(self.plan.host, [method], restores=False)
        info["r"] = list(value) if isinstance(value, list) else value

    def run(self, images: Tensor, *, restorable: bool = True, seen: list[Tokens] | None = None) -> Tokens:
        info = self._tome_info
        tokens = super().run(images, restorable=restorable or info["trace_source"], seen=seen)
        info |= {"size": tokens.size, "source": tokens.membership() if info["trace_source"] else None}
        return tokens

    def restore(self) -> nn.Module:
        """Take the patch off again; returns the network itself."""
        net: Any = self
        del net._modules["plan"], self._tome_info
        net.__class__ = type(self).__bases__[-1]
        return net


def patch(
    model: nn.Module,
    trace_source: bool = False,
    prop_attn: bool = True,
    *,
    scatter: str = "auto",
    verify: bool = True,
) -> Any:
    """Make a Vision Transformer merge tokens, in place. Then set ``model.r``; it is 0 at first.

    As in the published code, an average over patches takes the tokens left alike, whatever their size.

    Args:
        model: a network of SWAG, timm or torchvision that ``common.hosts`` knows; for transformers there is ``lean``.
        trace_source: keep track of which patches are in which token, in ``model._tome_info["source"]``.
        prop_attn: proportional attention. Networks trained without merging want it, those of masked auto-encoding
            (evaluated after fine-tuning) do not.
        scatter: form of the merging, see ``tome.ops.FORMS``.
        verify: compare the network with its opened blocks on one random image first.

    Returns:
        The model. Its state dict stays the same. A model patched before takes the new settings and keeps its ``r``.

    Raises:
        TypeError: if the model has modules that are not known, naming them; nothing is changed then.
        ValueError, ImportError: if ``scatter`` cannot be used here.
    """
    settings = {"trace_source": trace_source, "prop_attn": prop_attn, "scatter": check_form(scatter)}
    if not isinstance(model, Patched):
        try:
            host = find_host(model)
            if hasattr(host, "call"):
                raise NotAHost(
                    "networks of transformers are not patched in place: use leanvit.lean(net, 'tome', r=...)"
                )
            if verify:
                check(host)
        except NotAHost as error:
            raise TypeError(f"tome cannot patch this network: {error}") from error
        model.__class__ = lean_class(Patched, host.lean_class, type(model))
        object.__setattr__(model, "_tome_info", {"r": 0, "size": None, "source": None})
        cast(Any, model).plan = Plan(host, (), restores=False)
    cast(Any, model)._tome_info |= settings
    cast(Any, model).r = cast(Any, model).r
    return model


def published(
    net: VisionTransformer,
    *,
    tome_r: R = 0,
    trace_source: bool = False,
    prop_attn: bool = True,
    scatter: str = "auto",
) -> nn.Module:
    """The network of a published row, patched in place.

    Args:
        net: the backbone.
        tome_r: tokens merged in every layer, or a schedule, see ``parse_r``; a layer merges at most half.
        trace_source, prop_attn, scatter: see ``patch``.

    Raises:
        ValueError: if ``tome_r`` is negative, or ``scatter`` cannot be used here.
    """
    try:
        parse_r(1, tome_r)
    except ValueError as error:
        raise ValueError(f"--tome_r (tome_r): {error}") from error
    try:
        model = patch(net, trace_source, prop_attn, scatter=scatter, verify=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"--scatter: {error}") from error
    model.r = tome_r
    return model

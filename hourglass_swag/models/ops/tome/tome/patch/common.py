"""What patched networks have in common: the state of a pass, the step that merges, and the change of class.

A patched module gets a class of its own, derived from the class it had and from one of the mixins below, so that
parameters, hooks and the state dict stay as they are.
"""

from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

try:
    from common.measure.attention import attention
except ImportError:  # this package may be installed by itself
    attention = None

from .. import ops
from ..merge import bipartite_soft_matching, key_bias, merge_source, merge_wavg
from ..utils import R, parse_r

Info = dict[str, Any]
"""State shared by the modules of one network, and its settings:

r: what ``model.r`` was set to; schedule: tokens to merge in each layer of this pass; size: patches per token (B, N, 1),
None before the first merge; source: membership (B, N, tokens at first), None unless traced; trace_source, prop_attn,
class_token, distill_token: flags; prefix_tokens: tokens at the beginning that never merge; scatter: see ``tome.ops``.
"""


def make_info(
    *,
    trace_source: bool,
    prop_attn: bool,
    scatter: str,
    class_token: bool,
    distill_token: bool = False,
    prefix_tokens: int | None = None,
) -> Info:
    """State of a network before its first pass, with r = 0.

    Raises:
        ValueError, ImportError: if ``scatter`` cannot be used here.
    """
    return {
        "r": 0,
        "schedule": [],
        "size": None,
        "source": None,
        "trace_source": trace_source,
        "prop_attn": prop_attn,
        "scatter": ops.check_form(scatter),
        "class_token": class_token,
        "distill_token": distill_token,
        "prefix_tokens": int(class_token) + int(distill_token) if prefix_tokens is None else prefix_tokens,
    }


class Patched:
    """Mixin of every patched module: it can be copied and pickled although its class was made at run time."""

    _tome_mixin: ClassVar[type["Patched"]]
    _tome_class: ClassVar[type[nn.Module]]
    _tome_info: Info

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self)._tome_mixin, type(self)._tome_class), self.__getstate__()


class ToMeModel(Patched):
    """Mixin of the network: ``r`` says how many tokens each layer merges away, see ``tome.parse_r``."""

    _tome_layers: int

    @property
    def r(self) -> R:
        return self._tome_info["r"]

    @r.setter
    def r(self, value: R) -> None:
        parse_r(self._tome_layers, value)
        self._tome_info["r"] = list(value) if isinstance(value, list) else value


class ToMeBlock(Patched):
    """Mixin of a layer."""

    _tome_layer: int  # index of the layer
    _tome_layers: int  # number of layers

    def begin(self) -> int:
        """Tokens that this layer merges away; the first layer begins a new pass."""
        info = self._tome_info
        if self._tome_layer == 0:
            info.update(schedule=parse_r(self._tome_layers, info["r"]), size=None, source=None)
        return info["schedule"][self._tome_layer]

    def attention_size(self) -> Tensor | None:
        """Sizes that the attention of this layer must account for."""
        return self._tome_info["size"] if self._tome_info["prop_attn"] else None

    def merge(self, x: Tensor, keys: Tensor, r: int) -> Tensor:
        """Merge r pairs of tokens (B, N, C) with similar keys (B, heads, N, d)."""
        info = self._tome_info
        merge, _ = bipartite_soft_matching(
            keys.mean(dim=1), r, prefix_tokens=info["prefix_tokens"], scatter=info["scatter"]
        )
        if info["trace_source"]:
            info["source"] = merge_source(merge, x, info["source"])
        x, info["size"] = merge_wavg(merge, x, info["size"])
        return x


def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Fused attention, proportional to the size of the keys where there are sizes.

    Args:
        q, k, v: (B, heads, N, d).
        size: patches that each key stands for, (B, N, 1), or None.
        dropout: rate at the attention weights.

    Returns:
        (B, heads, N, d).

    Source: ToMe, arXiv:2210.09461, Eq. 1.
    """
    if size is not None and attention is not None and q.is_cuda:
        return attention(q, k, v, size[..., 0].log(), dropout=dropout)
    bias = None if size is None else key_bias(size, q.dtype)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


@cache
def patched_class(mixin: type[Patched], kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of class ``kind`` gets."""
    return type(f"ToMe{kind.__name__}", (mixin, kind), {"_tome_mixin": mixin, "_tome_class": kind})


def change_class(module: nn.Module, mixin: type[Patched], info: Info, **attributes: Any) -> None:
    """Derive the class of a module from ``mixin`` too, and give it the state of the network."""
    module.__class__ = patched_class(mixin, type(module))
    for name, value in {"_tome_info": info, **attributes}.items():
        object.__setattr__(module, name, value)


def _restore(mixin: type[Patched], kind: type[nn.Module]) -> nn.Module:
    """An empty module of a patched class, for copying and unpickling."""
    made = patched_class(mixin, kind)
    return made.__new__(made)


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` was patched before, under whatever name this package was imported."""
    return hasattr(model, "_tome_info")


def change_settings(model: nn.Module, *, trace_source: bool, prop_attn: bool, scatter: str) -> None:
    """Give a patched network other settings.

    Raises:
        ValueError, ImportError: if ``scatter`` cannot be used here; nothing is changed then.
    """
    scatter = ops.check_form(scatter)
    model._tome_info.update(trace_source=trace_source, prop_attn=prop_attn, scatter=scatter)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

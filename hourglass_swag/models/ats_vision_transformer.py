"""ATS: layers that go on with the tokens their class token needs.

Paper: Adaptive Token Sampling for Efficient Vision Transformers, arXiv:2111.15667. There are no parameters beyond the
backbone's, so any of its checkpoints fits. The sampling is in ``ops/ats.py``.

The published rows on SWAG add the attention output to the *normalised* input (``residual="normalized"``), which
explains most of their loss of accuracy; ATS itself adds it to the input (``residual="input"``).

How many tokens survive depends on weights and images. In a batch, an image with fewer survivors than another is padded
with zero tokens. In the published rows plain layers attend to this padding and later samplers see it
(``padding="seen"``), so that a result depends on what else is in the batch; by default they do not.

Letters: B images, N tokens in, U tokens out, C width, h heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from common.hosts import Effect, Facts, Method, Parts, PlanError, Tokens
from common.hosts.host import take_tokens
from common.hosts.runner import attend
from common.measure.flops import OpCounts
from hourglass_swag.host import publish
from hourglass_swag.methods import CLASS_TOKEN, REDUCES, Undrop, check_layers
from hourglass_swag.models.ops.ats import attend_with_policy, find_samplers, sample_tokens
from hourglass_swag.models.vision_transformer import VisionTransformer

Scored = tuple[Tensor, Tensor]
NEEDS = CLASS_TOKEN | {"plain attention"}
HIDDEN = 1e4  # below the other scores of attention are those of padding: finite in half precision, and exp(-1e4) is 0


@dataclass(frozen=True)
class ATS(Method):
    """Adaptive token sampling: patches survive that the class token's attention, weighed by their values, singles out.

    Args:
        layers: where; default: the last half.
        tokens: as many survive at most, the prefix included; default: those that enter the first of the layers.
        residual: what attention is added to: "input", or "normalized", as in the published rows.
        drop: shorten the sequence to the survivors of the image with most; else they are followed by zero tokens.
        padding: "masked", or "seen" by plain layers, as in the published rows, where images of a batch then couple.
        restore: what a dropped patch becomes: "copy", the sampled one nearest to it in the cumulative scores, which a
            point in its place would have sampled; or "nearest" or "frozen", see ``EViT``.

    Source: arXiv:2111.15667, section 3.
    """

    name = "ats"
    swag: ClassVar = {"residual": "normalized", "padding": "seen"}
    layers: tuple[int, ...] | None = None
    tokens: int | None = None
    residual: Literal["input", "normalized"] = "input"
    drop: bool = True
    padding: Literal["masked", "seen"] = "masked"
    restore: Literal["nearest", "frozen", "copy"] = "nearest"

    def resolve(self, facts: Facts) -> "ATS":
        layers = range(facts.depth // 2, facts.depth) if self.layers is None else self.layers
        if self.tokens is not None and self.tokens < 2:
            raise PlanError(
                f"ats: tokens must be a whole number of at least 2, or None for no limit, got {self.tokens!r}"
            )
        return replace(self, layers=check_layers("ats: layers (--ats_blocks_indexes)", layers, facts))

    def effects(self) -> Sequence[Effect]:
        breaks = REDUCES | {"equal lengths"}
        hooks = (("attend", NEEDS, breaks), ("after", frozenset(), breaks))
        return [Effect(layer, *each) for layer in self.layers or () for each in hooks]

    @property
    def depends_on_data(self) -> bool:
        return self.drop and bool(self.layers)

    @property
    def drops_by_data(self) -> bool:
        return self.depends_on_data

    @property
    def hinders_export(self) -> str | None:
        return "how many tokens survive is read from the images; drop=False keeps the length" if self.drop else None

    def points(self, tokens: Tokens) -> int:
        """R: by so many points, the class token's place included, every layer samples."""
        return self.tokens or tokens.carried.get(self.name, tokens.x.shape[1])

    def see(self, tokens: Tokens, parts: Parts) -> Parts:
        """Keys and values as the layer sees them: zero for padding that is seen."""
        if tokens.mask is None or self.padding == "masked":
            return parts
        return replace(parts, k=parts.k * tokens.mask[:, None], v=parts.v * tokens.mask[:, None])

    def sample(self, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tensor | None, Scored | None]:
        """Places (B, U) of the sampled tokens, 1 for them and 0 for padding, and what they were sampled by.

        See ``sample_tokens``; ``parts`` are those of ``see``.
        """
        places, mask, scored = sample_tokens(
            parts.q,
            parts.k,
            parts.v,
            tokens.mask,
            n_ref_tokens=self.points(tokens),
            drop_tokens=self.drop,
            prefix=tokens.prefix,
            scale=parts.scale,
            see_padding=self.padding == "seen",
        )
        first = torch.arange(places.shape[1], device=places.device).clamp_max(tokens.prefix)
        return places.maximum(first), mask, scored  # any patch will do for padding

    def attend(self, layer: int, tokens: Tokens, parts: Parts) -> tuple[Tensor, Tokens, Parts]:
        """Attention of the sampled tokens to all, and those tokens."""
        parts = self.see(tokens, parts)
        places, mask, scored = self.sample(tokens, parts)
        q = parts.q.gather(2, places[:, None, :, None].expand(-1, parts.q.shape[1], -1, parts.q.shape[3]))
        if self.padding == "seen":
            heads = attend_with_policy(q, parts.k, parts.v, tokens.mask, scale=parts.scale, dropout=parts.dropout)
        else:
            heads = attend(replace(parts, q=q), tokens)
        sampled = tokens.take(places)
        x = sampled.x
        if self.residual == "normalized":
            assert parts.normalized is not None
            x = take_tokens(parts.normalized, places)
        if mask is not None:
            x = x * mask
        bias = None if mask is None or self.padding == "seen" else (mask[..., 0] - 1) * HIDDEN
        undo: Callable[[Tensor], Tensor]
        if self.restore == "copy" and scored is not None:
            undo = lambda x: take_tokens(x, find_samplers(*scored, places, mask, tokens.prefix))  # noqa: E731
        else:
            undo = Undrop(tokens, places, mask, self.restore)
        gate = None if parts.gate is None else take_tokens(parts.gate, places)
        carried = {**tokens.carried, self.name: self.points(tokens)}
        sampled = sampled.update(x=x, mask=mask, key_bias=bias, carried=carried, undone_by=undo)
        return heads, sampled, replace(parts, gate=gate)

    def after(self, layer: int, tokens: Tokens) -> Tokens:
        """Padding is zero again."""
        return tokens if tokens.mask is None else tokens.update(x=tokens.x * tokens.mask)

    def published_ops(self, hook: str, inside: OpCounts, args: Sequence[Any], result: Any) -> OpCounts:
        """Attention as the published code computes it, for all N tokens before it samples U.

        5NC + 2N^2 C + 2N^2 + 5hN^2 + hN + (R-1)^2 + 15(R-1) there, the softmax being spelt out (subtract, exp,
        multiply, add, divide); the policy counts as if there were padding, and the MLP's update passes a dropout more.
        """
        if hook != "attend":
            return OpCounts()
        (B, N, C), U, h = args[0].x.shape, result[1].x.shape[1], args[1].k.shape[1]
        R = self.points(args[0]) - 1
        return B * OpCounts(
            matmul=2 * N * N * C,
            mul=3 * N * C + N * N + h * N * N + 3 * U * C + 5 * R,
            add=N * N + h * N * N + h * N + 2 * R,
            sub=h * N * N + R * R + 4 * R,
            div=N * C + h * N * N + 3 * R,
            exp=h * N * N,
            norm=N * C,
            cumsum=R,
            dropout=U * C,
        )


def published(
    net: VisionTransformer,
    *,
    ats_blocks: Sequence[int] = (),
    num_tokens: float = 197,
    drop_tokens: bool = False,
    residual: Literal["input", "normalized"] = "normalized",
) -> VisionTransformer:
    """The network of a published row, under the published names of the settings.

    Args:
        net: the backbone, with a class token.
        ats_blocks: indices of the layers that sample.
        num_tokens: upper bound of the tokens sampled. It must not bind: at least as many as enter the network, or 1
            for all of them (the published code fails otherwise).
        drop_tokens: shorten the sequence to the survivors; else they are followed by zero tokens, up to N.
        residual: see the top of this file.

    Raises:
        ValueError: if one of ``ats_blocks`` is no layer, ``num_tokens`` would bind, or the residual is unknown.
    """
    layers = tuple(sorted(set(ats_blocks)))
    if num_tokens < 1 or (layers and 1 < num_tokens < net.seq_length):
        raise ValueError(
            f"num_tokens (--ats_num_tokens) must be at least {net.seq_length}, the tokens that enter the network at "
            f"{net.image_size} pixels, got {num_tokens}: it is a bound that ATS cannot keep to"
        )
    settings: dict[str, Any] = {**ATS.swag, "residual": residual}
    return publish(net, ATS(layers=layers, drop=drop_tokens, **settings))

"""The SWAG networks as hosts of token methods."""

from typing import Any, cast

from torch import Tensor, nn

from common.hosts import BlockView, Facts, Host, Lean, Method, NotAHost, Parts, Plan, Rotation, Tokens
from common.hosts.host import refuse_hooks
from common.hosts.network import make_lean
from hourglass_swag.models.vision_transformer import Encoder, EncoderBlock, SelfAttention, VisionTransformer


class SwagBlock(BlockView):
    """View of ``EncoderBlock``, whose tokens travel sequence first; ``enter`` acts on tokens (B, N, C) before it."""

    def __init__(self, module: nn.Module, name: str, enter: nn.Module | None = None) -> None:
        self.module, self.enter = cast(EncoderBlock, module), enter
        for part, kind, found in (
            ("", EncoderBlock, module),
            (".self_attention", SelfAttention, getattr(module, "self_attention", None)),
        ):
            if type(found) is not kind:
                raise NotAHost(f"{name}{part} is not a plain {kind.__name__}, but {type(found).__name__}")
        self.opened = refuse_hooks([(name, module), (f"{name}.self_attention", self.module.self_attention)])

    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        x = x if self.enter is None else self.enter(x)
        return self.module(x.transpose(0, 1)).transpose(0, 1)

    def qkv(self, x: Tensor, rotation: Rotation | None) -> Parts:
        attention = self.module.self_attention
        rate, y = attention.dropout if self.module.training else 0.0, self.module.ln_1(x)
        return Parts(*attention.project(y), attention.head_dim**-0.5, rate, normalized=y)

    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        return self.module.dropout(self.module.self_attention.merge_heads(heads))

    def mlp(self, x: Tensor) -> Tensor:
        return self.module.mlp(self.module.ln_2(x))


class LeanSwag(Lean):
    """Mixin of a SWAG network: its logits, or features without a head, through the plan."""

    def forward(self, images: Tensor) -> Tensor:
        return self.output(images)


class SwagViT(Host):
    """B/16, L/16, H/14 and the desk network, with a class token or an average of the patches.

    Args:
        net: the network.
        dropout_everywhere: before every layer, as in the published Hourglass, where the dense network has it once.
    """

    lean_class = LeanSwag
    layers = "encoder.layers"

    @staticmethod
    def accepts(net: nn.Module) -> bool:
        return isinstance(net, VisionTransformer)

    def __init__(self, net: nn.Module, *, dropout_everywhere: bool = False) -> None:
        super().__init__(net)
        vit, kind = cast(VisionTransformer, net), type(net)
        for method in ("forward", "embed"):
            if getattr(kind, method) is not getattr(VisionTransformer, method):
                raise NotAHost(f"{kind.__name__} has a way of its own with tokens: it has a {method} of its own")
        if type(vit.encoder) is not Encoder:
            raise NotAHost(f"encoder is not a plain Encoder, but {type(vit.encoder).__name__}")
        self.opened = refuse_hooks([("encoder", vit.encoder), ("encoder.layers", vit.encoder.layers)])
        self.blocks = [
            SwagBlock(layer, f"encoder.layers.{name}", vit.encoder.dropout if index and dropout_everywhere else None)
            for index, (name, layer) in enumerate(vit.encoder.layers.named_children())
        ]
        self.facts = Facts(
            name=kind.__name__,
            depth=len(self.blocks),
            prefix=vit.num_class_tokens,
            class_token=vit.classifier == "token",
            grid=(vit.grid_size, vit.grid_size),
            width=vit.hidden_dim,
            heads=vit.num_heads,
            image_size=(vit.image_size, vit.image_size),
        )

    def embed(self, net: Any, images: Tensor) -> Tokens:
        x = net.encoder.dropout(net.encoder.embed(net.embed(images)))
        return Tokens(x.transpose(0, 1), self.facts.prefix, self.facts.grid)

    def normalize(self, net: Any, x: Tensor) -> Tensor:
        return net.encoder.ln(x)

    def reads_prefix(self, net: Any) -> bool:
        return net.classifier == "token"

    def finish(self, net: Any, x: Tensor) -> Tensor:
        x = net.trunk_output(x[:, 0] if net.classifier == "token" else x.mean(dim=1))
        return x if net.head is None else net.head(x)


def publish(net: VisionTransformer, *methods: Method, dropout_everywhere: bool = False) -> VisionTransformer:
    """A network of the registry: as in the published code its output is read from the tokens left, none restored."""
    return make_lean(net, Plan(SwagViT(net, dropout_everywhere=dropout_everywhere), methods, restores=False))

"""torchvision's ``VisionTransformer`` as a host: packed ``MultiheadAttention``, a class token in front."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer

from common.hosts.host import BlockView, Facts, Host, NotAHost, Parts, Rotation, Tokens, refuse_hooks
from common.hosts.network import Lean


class TorchvisionBlock(BlockView):
    """View of ``torchvision.models.vision_transformer.EncoderBlock``."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = cast(Any, module)
        attention = getattr(module, "self_attention", None)
        if type(module).forward is not EncoderBlock.forward:
            raise NotAHost(f"{name} is a {type(module).__name__}, which does not work like EncoderBlock")
        if (
            type(attention) is not nn.MultiheadAttention
            or attention.in_proj_weight is None
            or not attention.batch_first
        ):
            raise NotAHost(f"{name}.self_attention is not a MultiheadAttention with packed weights, batch first")
        self.opened = refuse_hooks([(name, module), (f"{name}.self_attention", attention)])

    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        return self.module(x)

    def qkv(self, x: Tensor, rotation: Rotation | None) -> Parts:
        attention = self.module.self_attention
        y = self.module.ln_1(x)
        qkv = F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        rate = attention.dropout if self.module.training else 0.0
        return Parts(q, k, v, attention.head_dim**-0.5, rate, normalized=y)

    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        return self.module.dropout(self.module.self_attention.out_proj(heads.transpose(1, 2).flatten(2)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.module.mlp(self.module.ln_2(x))


class LeanTorchvision(Lean):
    """Mixin of a torchvision network: its logits through the plan."""

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x)


class TorchvisionViT(Host):
    """B/16 to H/14 of torchvision, also with the weights of SWAG."""

    lean_class = LeanTorchvision
    layers = "encoder.layers"

    @staticmethod
    def accepts(net: nn.Module) -> bool:
        return isinstance(net, VisionTransformer)

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        vit, kind = cast(Any, net), type(net)
        for found, base, name in ((kind, VisionTransformer, ""), (type(vit.encoder), Encoder, "encoder: ")):
            if found.forward is not base.forward:
                raise NotAHost(f"{name}{found.__name__} has a forward of its own")
        self.opened = refuse_hooks([("encoder", vit.encoder), ("encoder.layers", vit.encoder.layers)])
        layers = vit.encoder.layers.named_children()
        self.blocks = [TorchvisionBlock(layer, f"encoder.layers.{name}") for name, layer in layers]
        side = vit.image_size // vit.patch_size
        self.facts = Facts(
            name=f"torchvision's {kind.__name__}",
            depth=len(self.blocks),
            prefix=1,
            class_token=True,
            grid=(side, side),
            width=vit.hidden_dim,
            heads=vit.encoder.layers[0].num_heads,
            image_size=(vit.image_size, vit.image_size),
        )

    def embed(self, net: Any, images: Tensor) -> Tokens:
        x = net._process_input(images)
        x = torch.cat([net.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return Tokens(net.encoder.dropout(x + net.encoder.pos_embedding), 1, self.facts.grid)

    def normalize(self, net: Any, x: Tensor) -> Tensor:
        return net.encoder.ln(x)

    def reads_prefix(self, net: Any) -> bool:
        return True

    def finish(self, net: Any, x: Tensor) -> Tensor:
        return net.heads(x[:, 0])

"""timm's ``VisionTransformer`` as a host: plain, DeiT, DeiT III, AugReg, DINOv2, CLIP, SigLIP; with LayerScale,
registers, qk-norm, gate, pre-norm, attention pool or average pool."""

from typing import Any, ClassVar, cast

import torch
from timm.layers.attention import Attention
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from common.hosts.host import BlockView, Facts, Host, NotAHost, Parts, Rotation, Tokens, channels_of, refuse_hooks
from common.hosts.network import Lean
from common.run.errors import UsageError

BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
OWN = ("forward", "forward_features", "pool")
"""Methods that must be timm's; ``forward_head`` and ``_pos_embed`` of a subclass are called and so may be its own."""


class TimmBlock(BlockView):
    """View of ``timm.models.vision_transformer.Block``."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = cast(Any, module)
        for part, kind, found, known in (
            ("", timm_vit.Block, module, BLOCK_PARTS),
            (".attn", Attention, self.module.attn if hasattr(module, "attn") else None, ATTENTION_PARTS),
        ):
            if found is None or type(found).forward is not kind.forward:
                raise NotAHost(f"{name}{part} is a {type(found).__name__}, which does not work like {kind.__name__}")
            if unknown := {child for child, _ in found.named_children()} - known:
                raise NotAHost(f"{name}{part}.{sorted(unknown)[0]} is a part that {kind.__name__} has not")
        self.opened = refuse_hooks([(name, module), (f"{name}.attn", self.module.attn)])

    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        return self.module(x)

    def qkv(self, x: Tensor, rotation: Rotation | None) -> Parts:
        block, attn = self.module, self.module.attn
        y = block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        gate = None if getattr(attn, "gate", None) is None else attn.gate(y).sigmoid()
        rate = attn.attn_drop.p if attn.training else 0.0
        return Parts(attn.q_norm(q), attn.k_norm(k), v, attn.scale, rate, normalized=y, gate=gate)

    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        block, attn = self.module, self.module.attn
        x = attn.norm(heads.transpose(1, 2).flatten(2))
        if parts.gate is not None:
            x = x * parts.gate
        return block.drop_path1(block.ls1(attn.proj_drop(attn.proj(x))))

    def mlp(self, x: Tensor) -> Tensor:
        block = self.module
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class LeanTimm(Lean):
    """Mixin of a timm network: what it does with images goes through the plan."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_mask(attn_mask, is_causal)
        return self.output(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised tokens on the full grid again, (B, N, C)."""
        _refuse_mask(attn_mask, is_causal)
        return self.hidden(x)

    def forward_intermediates(self, *_: Any, **__: Any) -> Any:
        raise UsageError("features between the blocks are not restored: ask the dense network, fast.restore()")

    get_intermediate_layers = forward_intermediates

    def set_input_size(self, *_: Any, **__: Any) -> Any:
        raise UsageError("a plan is made for one network as it is: change fast.restore() and call lean on it again")

    prune_intermediate_layers = set_grad_checkpointing = set_input_size


class TimmHost(Host):
    """What the two families of timm share: names of modules, checks, the way from tokens to an output."""

    lean_class = LeanTimm
    layers = "blocks"
    family: ClassVar[Any]
    """timm's class"""
    view: ClassVar[Any]
    """class of the block views"""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        vit, kind = cast(Any, net), type(net)
        for method in OWN:
            if getattr(kind, method) is not getattr(self.family, method):
                raise NotAHost(f"{kind.__name__} has a {method} of its own")
        if vit.grad_checkpointing:
            raise NotAHost("gradient checkpointing is on: call net.set_grad_checkpointing(False) first")
        if not isinstance(vit.patch_drop, (nn.Identity, type(None))):
            raise NotAHost("patch_drop drops patches in training: build the network with patch_drop_rate=0")
        if getattr(vit.patch_embed, "grid_size", None) is None:
            raise NotAHost(f"patch_embed ({type(vit.patch_embed).__name__}) has no grid of patches")
        if not len(vit.blocks):
            raise NotAHost(f"{kind.__name__} has no blocks")
        self.opened = refuse_hooks([("blocks", vit.blocks)])
        self.blocks = [self.view(block, f"blocks.{index}") for index, block in enumerate(vit.blocks)]
        self.facts = Facts(
            name=kind.__name__,
            depth=len(self.blocks),
            prefix=vit.num_prefix_tokens,
            class_token=vit.cls_token is not None,
            grid=tuple(vit.patch_embed.grid_size),
            width=vit.embed_dim,
            heads=vit.blocks[0].attn.num_heads,
            image_size=tuple(vit.patch_embed.img_size),
            channels=channels_of(net),
        )

    def normalize(self, net: Any, x: Tensor) -> Tensor:
        return net.norm(x)

    def prefix_heads(self) -> tuple[Any, ...]:
        """Forms of ``forward_head`` that read nothing but the prefix where the pool is "token"."""
        return (self.family.forward_head,)

    def reads_prefix(self, net: Any) -> bool:
        from_token = net.global_pool == "token" and net.attn_pool is None
        return from_token and net.forward_head.__func__ in self.prefix_heads()

    def finish(self, net: Any, x: Tensor) -> Tensor:
        return net.forward_head(x)


class TimmViT(TimmHost):
    """See the top of this file."""

    family = timm_vit.VisionTransformer
    view = TimmBlock

    @staticmethod
    def accepts(net: nn.Module) -> bool:
        return isinstance(net, timm_vit.VisionTransformer)

    def embed(self, net: Any, images: Tensor) -> Tokens:
        x = net.patch_embed(images)
        grid = tuple(x.shape[1:3]) if net.dynamic_img_size else self.facts.grid
        x = net.norm_pre(net._pos_embed(x))
        return Tokens(x, self.facts.prefix, grid)

    def prefix_heads(self) -> tuple[Any, ...]:
        return (*super().prefix_heads(), _distilled_head())


def _distilled_head() -> Any:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled.forward_head


def _refuse_mask(mask: torch.Tensor | None, is_causal: bool) -> None:
    if mask is not None or is_causal:
        raise UsageError("attn_mask and is_causal do not go with token methods: positions change between the blocks")

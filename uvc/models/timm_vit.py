"""timm's ``VisionTransformer`` with UVC's gates on its blocks, and the same network with fewer heads and neurons.

Any plain one: LayerScale, registers, qk-norm, pre-norm, any pool, distillation token. The modules, their names and
their weights stay timm's; gates and masks come beside them and go again.

Every head of timm's attention has as many values as queries, so dimensions inside heads cost what their head costs:
heads, neurons and blocks are what saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.init import skip_init

from common.hosts.host import NotAHost, channels_of, refuse_shared
from common.hosts.network import Lean, floating
from common.hosts.timm_vit import TimmViT
from common.measure.flops import count_operations
from common.run.errors import UsageError
from uvc.models.gates import GatedTransformer

GATES = ("block_skip_gating", "patch_gating")
ADDED = ("gates", "running", "kept_patches", "num_heads", "hidden_dim", "num_patches", "image_size")
"""What a gated network has besides timm's."""


class GatedTimm(GatedTransformer):
    """Mixin of a timm network whose blocks have gates; ``gate_blocks`` makes one.

    It has no gates of patches and no sum of all blocks, for which a plain network has no place.
    """

    values_apart = False
    least_kept = 1
    num_reg_tokens: int
    patch_embed: Any
    norm_pre: nn.Module
    forward_head: Any

    def forward_features(self, images: Tensor, tau: float = -1.0, ratio: float = 0.9) -> Tensor:
        """Normalised tokens (B, T, D); ``tau`` and ``ratio`` select nothing here."""
        if tau > 0 or self.gates.patch != "off" or self.gates.jumping:
            raise UsageError("a network of timm has no place for gates of patches, their selection, or enable_jumping")
        tokens = self._pos_embed(self.patch_embed(images))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        return self.norm(self.run_blocks(self.norm_pre(tokens)))

    def forward(self, images: Tensor, tau: float = -1.0, ratio: float = 0.9) -> Tensor | tuple[Tensor, Tensor]:
        """Class logits, as of ``GatedTransformer``."""
        logits = self.forward_head(self.forward_features(images, tau, ratio))
        return logits if not self.training or isinstance(logits, tuple) else (logits, logits)

    def embed_macs(self, batch: int = 1) -> int:
        """All that is executed outside of the blocks: embedding, pooling, heads."""
        running, gates = self.running, self.gates
        self.running, self.gates = (False,) * len(self.blocks), replace(gates, block_gating=False)
        images = torch.empty(batch, channels_of(self), *self.image_size, dtype=floating(self).dtype, device="meta")
        try:
            return count_operations(self, images).executed.macs
        finally:
            self.running, self.gates = running, gates

    def no_weight_decay(self) -> set[str]:
        """Names that stage 2 does not decay: timm's own."""
        return super(GatedTransformer, self).no_weight_decay()  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _gated_class(kind: type) -> type:
    return type(f"Gated{kind.__name__}", (GatedTimm, kind), {"__module__": __name__})


def gate_blocks(net: nn.Module) -> GatedTimm:
    """Give a plain network of timm gates, in place; ``ungated`` is the way back.

    Raises:
        NotAHost: it cannot be pruned, see ``check_prunable``.
    """
    host, model = check_prunable(net), net
    model.__class__ = _gated_class(type(net))
    assert isinstance(model, GatedTimm)
    block: Any = model.blocks[0]
    model.num_heads, model.hidden_dim = block.attn.num_heads, block.mlp.fc1.out_features
    model.num_patches, model.image_size = host.facts.patches, host.facts.image_size
    model.add_gates(host.facts.depth)
    model.block_skip_gating.data = model.block_skip_gating.data.to(floating(net))
    for name in ("dist_token", "head_dist"):
        if not hasattr(model, name):
            setattr(model, name, None)
    if model.dist_token is not None:
        vars(model)["distilled_training"] = True  # both heads while training
    return model


def ungated(model: nn.Module) -> VisionTransformer:
    """A copy of timm's own class, without gates and masks; weights are as they are. A plain network is copied alone."""
    made: Any = deepcopy(model)
    for module in made.modules():
        module._buffers.pop("mask", None)
    if isinstance(made, GatedTimm):
        for name in GATES:
            del vars(made)["_parameters"][name]
        for name in (*ADDED, *(name for name in ("dist_token", "head_dist") if getattr(made, name) is None)):
            delattr(made, name)
        made.__class__ = type(made).__bases__[1]
        if hasattr(made, "distilled_training"):
            vars(made)["distilled_training"] = False
    return cast(VisionTransformer, made)


def check_prunable(net: nn.Module) -> TimmViT:
    """The view of a plain network whose heads, neurons and blocks can go.

    Raises:
        NotAHost: naming the module that hinders it, and why.
    """
    if isinstance(net, Lean):
        raise NotAHost("this network has token methods already: prune fast.restore(), and give the result to lean")
    if not TimmViT.accepts(net):
        raise NotAHost(f"{type(net).__name__} cannot be pruned: expected timm's VisionTransformer or a subclass")
    host = TimmViT(net)
    refuse_shared(net)
    first: Any = None
    for index, block in enumerate(net.blocks):  # pyright: ignore[reportArgumentType]
        attn, mlp, name = block.attn, block.mlp, f"blocks.{index}"
        if type(mlp).forward is not Mlp.forward:
            raise NotAHost(
                f"{name}.mlp is a {type(mlp).__name__}: only neurons of timm's Mlp, a row of fc1 and a column of fc2, "
                "can be removed"
            )
        for part, layer in (
            ("attn.qkv", attn.qkv),
            ("attn.proj", attn.proj),
            ("mlp.fc1", mlp.fc1),
            ("mlp.fc2", mlp.fc2),
        ):
            if type(layer) is not nn.Linear:
                raise NotAHost(f"{name}.{part} is a {type(layer).__name__}, of which no rows or columns can be taken")
        for part, layer in (("attn.proj", attn.proj), ("mlp.fc2", mlp.fc2)):
            if layer.bias is None:
                raise NotAHost(f"{name}.{part} has no bias, which what is constant after pruning is added to")
        if getattr(attn, "gate", None) is not None:
            raise NotAHost(f"{name}.attn.gate reads every channel of the heads, so that no head can be removed")
        for part, layer in (("attn.norm", attn.norm), ("mlp.norm", mlp.norm)):
            if not isinstance(layer, nn.Identity):
                raise NotAHost(f"{name}.{part} normalises over all heads or neurons, so that none can be removed")
        if attn.num_heads * attn.head_dim != attn.qkv.in_features:
            raise NotAHost(
                f"{name}.attn: {attn.num_heads} heads of {attn.head_dim} channels do not make up the width "
                f"{attn.qkv.in_features}; if the network was pruned before, start from the whole one"
            )
        sizes = attn.num_heads, mlp.fc1.out_features
        if sizes != (first := first or sizes):
            raise NotAHost(
                f"{name} has {sizes[0]} heads and {sizes[1]} neurons, blocks.0 has {first[0]} and {first[1]}: all "
                "blocks must be of one size"
            )
    return host


def narrow_(block: nn.Module, heads: int, neurons: int) -> None:
    """Give a block of timm another number of heads, each of its size, and of neurons; their weights hold anything."""
    attn: Any = block.attn
    mlp: Any = block.mlp
    attn.num_heads, attn.attn_dim = heads, heads * attn.head_dim
    attn.qkv = _linear(attn.qkv, attn.qkv.in_features, 3 * attn.attn_dim)
    attn.proj = _linear(attn.proj, attn.attn_dim, attn.proj.out_features)
    mlp.fc1 = _linear(mlp.fc1, mlp.fc1.in_features, neurons)
    mlp.fc2 = _linear(mlp.fc2, neurons, mlp.fc2.out_features)


def _linear(like: nn.Linear, inputs: int, outputs: int) -> nn.Module:
    options = {"device": like.weight.device, "dtype": like.weight.dtype}
    return skip_init(nn.Linear, inputs, outputs, bias=like.bias is not None, **options).train(like.training)


def keep_blocks_(net: VisionTransformer, indices: Sequence[int]) -> None:
    """Take the other blocks out."""
    net.blocks = nn.Sequential(*(net.blocks[index] for index in indices))
    net.feature_info = [net.feature_info[index] | {"module": f"blocks.{place}"} for place, index in enumerate(indices)]

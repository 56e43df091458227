"""timm's ``Eva`` as a host: EVA-02, DINOv3 and RoPE-ViT, with rotation (one table, or learned ones of every layer and
head), SwiGLU, LayerScale, separate or fused projections."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from common.hosts.host import BlockView, NotAHost, Parts, Rotation, Tokens, refuse_hooks
from common.hosts.rotation import LayerRotation, TableRotation, read_line, sum_of_angles, turn
from common.hosts.timm_vit import TimmHost

KNOWN = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, type(None))
"""Rotations whose angles are linear in a patch's row and column."""


class EvaView(BlockView):
    """View of ``timm.models.eva.EvaBlock``."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.layer = cast(Any, module), int(name.rpartition(".")[2])
        if type(module).forward is not EvaBlock.forward:
            raise NotAHost(f"{name} is a {type(module).__name__}, which does not work like EvaBlock")
        attention = self.module.attn
        if type(attention).forward not in (EvaAttention.forward, AttentionRope.forward):
            raise NotAHost(f"{name}.attn is a {type(attention).__name__}, which does not work like EvaAttention")
        if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
            raise NotAHost(f"{name}.attn has fewer heads for keys than for queries")
        self.opened = refuse_hooks([(name, module), (f"{name}.attn", attention)])

    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        return self.module(x, rope=None if rotation is None else rotation.of(self.layer))

    def qkv(self, x: Tensor, rotation: Rotation | None) -> Parts:
        attn = self.module.attn
        y = self.module.norm1(x)
        if attn.qkv is None:
            q, k, v = (
                part(y).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
                for part in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
        else:
            if getattr(attn, "q_bias", None) is None:
                qkv = attn.qkv(y)
            else:  # as the host does, which does not call the module then
                qkv = F.linear(y, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
            q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        gate = None if getattr(attn, "gate", None) is None else attn.gate(y).sigmoid()
        rate = attn.attn_drop.p if attn.training else 0.0
        if rotation is None:
            return Parts(q, k, v, attn.scale, rate, normalized=y, gate=gate)
        prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        table = rotation.of(self.layer)

        def rotate(x: Tensor) -> Tensor:
            turned = apply_rot_embed_cat(x[:, :, prefix:], table, half=half)
            return torch.cat([x[:, :, :prefix], turned], 2).type_as(v)

        return Parts(rotate(q), rotate(k), v, attn.scale, rate, keys=k, normalized=y, gate=gate)

    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        block, attn = self.module, self.module.attn
        x = attn.norm(heads.transpose(1, 2).flatten(2))
        if parts.gate is not None:
            x = x * parts.gate
        x = attn.proj_drop(attn.proj(x))
        return block.drop_path1(x if block.gamma_1 is None else block.gamma_1 * x)

    def mlp(self, x: Tensor) -> Tensor:
        block = self.module
        x = block.mlp(block.norm2(x))
        return block.drop_path2(x if block.gamma_2 is None else block.gamma_2 * x)


class TimmEva(TimmHost):
    """See the top of this file."""

    family = Eva
    view = EvaView

    @staticmethod
    def accepts(net: nn.Module) -> bool:
        return isinstance(net, Eva)

    def __init__(self, net: nn.Module) -> None:
        eva = cast(Any, net)
        if not isinstance(eva.rope, KNOWN):
            raise NotAHost(f"rope ({type(eva.rope).__name__}) rotates in a way that is not known here")
        if getattr(eva.rope, "in_pixels", False):
            raise NotAHost("rope turns neighbouring patches by more than half a turn (in_pixels)")
        if isinstance(eva.rope, RotaryEmbeddingMixed) and getattr(eva.rope, "aug_active", False):
            raise NotAHost("rope moves its coordinates at random in training, which merged tokens would not follow")
        super().__init__(net)
        grid = self.facts.grid
        assert grid is not None
        if isinstance(eva.rope, (RotaryEmbeddingCat, RotaryEmbeddingDinoV3)):
            _check_line(eva.rope.get_embed(shape=list(grid)), grid, _frequencies(eva.rope))

    def embed(self, net: Any, images: Tensor) -> Tokens:
        x = net.patch_embed(images)
        grid = tuple(x.shape[1:3]) if net.dynamic_img_size else self.facts.grid
        assert grid is not None
        x, table = net._pos_embed(x)
        rotation = None
        if isinstance(net.rope, RotaryEmbeddingMixed):
            across, down = net.rope.freqs.repeat_interleave(2, -1)
            if net.rope.grid_indexing == "ij":
                across, down = down, across
            rotation = LayerRotation(grid=grid, tables=table, rates=torch.stack([down, across]))
        elif net.rope is not None:
            rotation = TableRotation(grid=grid, table=table, frequencies=_frequencies(net.rope))
        return Tokens(net.norm_pre(x), self.facts.prefix, grid, rotation=rotation)


def _frequencies(rope: Any) -> Tensor | None:
    """DINOv3's angles per row and column up to a factor, (2, d): it may turn by more than half from patch to patch."""
    if not isinstance(rope, RotaryEmbeddingDinoV3):
        return None
    periods = cast(Tensor, rope.periods)
    once, none = 1 / periods, torch.zeros_like(periods)
    axes = torch.stack([torch.cat([once, none]), torch.cat([none, once])])
    axes = axes.flip(0) if rope.grid_indexing == "xy" else axes
    return axes.repeat(1, 2) if rope.rotate_half else axes.repeat_interleave(2, 1)


def _check_line(table: Tensor, grid: tuple[int, int], frequencies: Tensor | None) -> None:
    if table.is_meta:
        return
    first, rates = read_line(table, grid, frequencies)
    again = turn(first + sum_of_angles(TableRotation(grid=grid, table=table).coordinates[0], rates[0], rates[1]))
    if (again - table).abs().max() > 1e-3:
        raise NotAHost("rope turns patches by angles that are not linear in row and column")

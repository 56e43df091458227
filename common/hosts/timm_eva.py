"""timm's ``Eva`` as a host: EVA-02 and DINOv3, with rotation, SwiGLU, LayerScale, separate or fused projections."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from common.hosts.host import BlockView, NotAHost, Parts, Rotation, Tokens, refuse_hooks
from common.hosts.timm_vit import TimmHost


class EvaView(BlockView):
    """View of ``timm.models.eva.EvaBlock``."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = cast(Any, module)
        if type(module).forward is not EvaBlock.forward:
            raise NotAHost(f"{name} is a {type(module).__name__}, which does not work like EvaBlock")
        attention = self.module.attn
        if type(attention).forward not in (EvaAttention.forward, AttentionRope.forward):
            raise NotAHost(f"{name}.attn is a {type(attention).__name__}, which does not work like EvaAttention")
        if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
            raise NotAHost(f"{name}.attn has fewer heads for keys than for queries")
        refuse_hooks([(name, module), (f"{name}.attn", attention)])

    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        return self.module(x, rope=None if rotation is None else rotation.table)

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
            return Parts(q, k, v, attn.scale, rate, extra=gate)
        prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

        def rotate(x: Tensor) -> Tensor:
            turned = apply_rot_embed_cat(x[:, :, prefix:], rotation.table, half=half)
            return torch.cat([x[:, :, :prefix], turned], 2).type_as(v)

        return Parts(rotate(q), rotate(k), v, attn.scale, rate, keys=k, extra=gate)

    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        block, attn = self.module, self.module.attn
        x = attn.norm(heads.transpose(1, 2).flatten(2))
        if parts.extra is not None:
            x = x * parts.extra
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
        if eva.rope_mixed or not isinstance(eva.rope, (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, type(None))):
            raise NotAHost(f"rope ({type(eva.rope).__name__}) rotates every layer, or in a way that is not known here")
        if getattr(eva.rope, "in_pixels", False):
            raise NotAHost("rope turns neighbouring patches by more than half a turn (in_pixels)")
        super().__init__(net)
        grid = self.facts.grid
        assert grid is not None
        self.rotation = None if eva.rope is None else rotate(eva.rope.get_embed(shape=list(grid)), grid)
        if self.rotation is not None and not self.rotation.table.is_meta:
            again = self.rotation.at(self.rotation.coordinates).table[0, 0]
            if (again - self.rotation.table).abs().max() > 1e-3:
                raise NotAHost("rope turns patches by angles that are not linear in row and column")

    def embed(self, net: Any, images: Tensor) -> Tokens:
        x = net.patch_embed(images)
        grid = tuple(x.shape[1:3]) if net.dynamic_img_size else self.facts.grid
        assert grid is not None
        x, table = net._pos_embed(x)
        rotation = self.rotation
        if rotation is not None and grid != self.facts.grid:
            rotation = rotate(table, grid)
        elif rotation is not None:
            constants = (rotation.coordinates, rotation.first, rotation.rates)
            rotation = Rotation(table, *(constant.to(table.device) for constant in constants))
        return Tokens(net.norm_pre(x), self.facts.prefix, grid, rotation=rotation)


def rotate(table: Tensor, grid: tuple[int, int]) -> Rotation:
    """The rotation of a table (P, 2 d) of a grid, its rates being the steps between neighbouring patches."""
    sine, cosine = table.float().unflatten(0, grid).chunk(2, dim=-1)  # (rows, columns, d)
    places = torch.stack(torch.meshgrid(*(torch.arange(n, device=table.device) for n in grid), indexing="ij"), -1)

    def step(sine: Tensor, cosine: Tensor) -> Tensor:
        """Mean angle from one entry of the first dimension to the next, (d,)."""
        if len(sine) < 2:
            return sine.new_zeros(sine.shape[-1])
        turned = torch.atan2(
            sine[1:] * cosine[:-1] - cosine[1:] * sine[:-1], cosine[1:] * cosine[:-1] + sine[1:] * sine[:-1]
        )
        return turned.flatten(0, 1).mean(0)

    down = step(sine, cosine)
    right = step(sine.transpose(0, 1), cosine.transpose(0, 1))
    first = torch.atan2(sine[0, 0], cosine[0, 0])
    return Rotation(table, places.flatten(0, 1)[None].to(sine.dtype), first, torch.stack([down, right]))

"""Any plain Vision Transformer of timm at any width: ``TimmViT_scala(net)(images, ratio)``.

*Slicing Vision Transformer for Flexible Inference*, arXiv:2412.04786, on networks that it does not show (design). A
width is timm's network of that width with the same heads (``narrowing.py``): LayerScale, registers, qk-norm, gates,
SwiGLU, pre-norm, average and attention pool are cut like everything else. As in the published networks the fused qkv
projection is cut as one block, and attention is scaled by the full head dimension at every width: the weights that make
the queries are multiplied by sqrt(r), so that timm's own attention does it. Normalisations keep their own eps.

Legend: B batch, C classes, D full width, d = r D, r width ratio.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from common.hosts.files import LIBRARIES, Unknown
from common.hosts.host import NotAHost, refuse_shared
from common.hosts.network import find_host
from common.hosts.opening import known_timm
from common.run.wrapping import divided, within
from scala import models_scala
from scala.narrowing import FULL, Narrowed, State
from scala.slicing import Ratio, SliceRule, Width, WidthError, check_ratio, exact

PARTS = (VisionTransformer, Block, Attention, PatchEmbed, Mlp, GluMlp, SwiGLU, AttentionPoolLatent, LayerScale,
         nn.Linear)  # fmt: skip
"""What can be narrowed, besides normalisations and the convolution of the patch embedding."""
TIMM_WORDS, TIMM_NETWORK = LIBRARIES["timm"]
HEADS = ("head", "head_dist")
"""Linear layers that keep their rows."""
CHANNELS = ("embed_dim", "num_features", "head_hidden_size", "head_dim", "attn_dim", "latent_dim", "out_features")
"""Attributes that count channels which shrink."""


# ---------------------------------------------------------------------------------------------------------------------
# What can be sliced


def check(net: nn.Module) -> None:
    """Refuse what cannot be sliced.

    Raises:
        NotAHost: naming the module and the reason.
    """
    if not isinstance(net, VisionTransformer):
        raise NotAHost(f"a {type(net).__name__} cannot be sliced: only networks of timm's VisionTransformer can")
    find_host(net)
    refuse_shared(net)
    for name, module in net.named_modules():
        own = list(module.named_parameters(recurse=False))
        if not own and not any(module.children()) and not isinstance(module, tuple(PARTS)):
            continue  # dropout, activation, nothing
        if not _known(name, module):
            raise NotAHost(f"{name} is a {type(module).__name__}, whose channels cannot be sliced")
        if unknown := [leaf for leaf, _ in own if leaf not in _shrinking(name, module, packed=False)]:
            raise NotAHost(f"{name}.{unknown[0]} is a parameter of which nothing says how to slice it".lstrip("."))
        if isinstance(module, (Attention, AttentionPoolLatent)) and not _query_weights(module):
            raise NotAHost(f"{name}.q_norm has no weights to carry the scale of the attention, so it cannot be sliced")
    for name, _ in net.named_buffers():
        raise NotAHost(f"{name} is a buffer, of which nothing says how to slice it")


def _known(name: str, module: nn.Module) -> bool:
    if name == "blocks":
        return isinstance(module, nn.Sequential)
    if name == "patch_embed.proj":
        return type(module) is nn.Conv2d
    return _is_norm(module) or any(type(module).forward is part.forward for part in PARTS)


def _is_norm(module: Any) -> bool:
    """Over the last dimension."""
    ours = type(module).__module__.startswith(("torch.nn.", "timm.layers."))
    return ours and len(getattr(module, "normalized_shape", ())) == 1 and not type(module).__name__.endswith("2d")


def _shrinking(name: str, module: nn.Module, *, packed: bool) -> Mapping[str, Mapping[int, int]]:
    """Own parameters -> dimension that shrinks -> equal parts along it, see ``layers.Sliced``.

    Args:
        packed: of a linear layer, whether its rows are two halves.
    """
    if isinstance(module, VisionTransformer):
        return {leaf: {2: 1} for leaf in ("cls_token", "reg_token", "dist_token", "pos_embed")}
    if isinstance(module, AttentionPoolLatent):
        return {"latent": {2: 1}}
    if isinstance(module, LayerScale):
        return {"gamma": {0: 1}}
    if isinstance(module, nn.Linear) and name in HEADS:
        return {"weight": {1: 1}, "bias": {}}
    if isinstance(module, nn.Linear):
        return {"weight": {0: 1 + packed, 1: 1}, "bias": {0: 1 + packed}}
    return {"weight": {0: 1}, "bias": {0: 1}}


# ---------------------------------------------------------------------------------------------------------------------
# A width as a network of its own


def narrow(net: nn.Module, width: Width) -> Any:
    """The network with r of the channels of ``net``, on the meta device, of the same class and in the same mode."""
    made: dict[int, Any] = {}
    for name, module in net.named_modules():
        owner = net.get_submodule(name.rpartition(".")[0])
        dims = _shrinking(name, module, packed=isinstance(owner, GluMlp) and name.endswith(".fc1"))
        for leaf, value in module.named_parameters(recurse=False):
            shape = list(value.shape)
            for dim, parts in dims[leaf].items():
                shape[dim] = parts * width.channels(shape[dim] // parts)
            made[id(value)] = nn.Parameter(value.new_empty(shape, device="meta"), requires_grad=value.requires_grad)
    plain: Any = copy.deepcopy(net, made)  # which takes these in place of copies
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels = len(module.weight)
        elif _is_norm(module):
            module.normalized_shape = tuple(width.channels(size) for size in module.normalized_shape)
        else:
            for attribute in set(CHANNELS) & set(vars(module)):
                setattr(module, attribute, width.channels(getattr(module, attribute)))
            if hasattr(module, "head_dim"):
                module.scale = module.head_dim**-0.5
    for info in plain.feature_info:
        info["num_chs"] = plain.embed_dim
    if width != FULL and hasattr(net, "_model_args"):
        plain._model_args = {**plain._model_args, **_arguments(plain)}
    return plain


def _arguments(plain: Any) -> dict[str, Any]:
    """Those of timm's factories that make a network of this width."""
    own, mlp = plain.embed_dim, plain.blocks[0].mlp
    hidden = len((mlp.fc1 if hasattr(mlp, "fc1") else mlp.fc1_x).weight)
    ratio = hidden / own
    if int(own * ratio) != hidden:  # timm truncates
        ratio = (hidden + 0.5) / own
    return {"embed_dim": own, "num_heads": plain.blocks[0].attn.num_heads, "mlp_ratio": ratio}


def _query_weights(module: Any) -> dict[str, int]:
    """Those of one attention that there may be."""
    norm = getattr(module, "q_norm", None)
    if not isinstance(norm, (nn.Identity, type(None))):
        return {f"q_norm.{leaf}": 1 for leaf, _ in norm.named_parameters()}
    if isinstance(module, AttentionPoolLatent):
        return {"latent": 1} if isinstance(module.q, nn.Identity) else {"q.weight": 1, "q.bias": 1}
    return {"qkv.weight": 3, "qkv.bias": 3}


def query_weights(model: nn.Module) -> dict[str, int]:
    """Parameters that make the queries of a network of timm or of ``models_scala`` -> the part of their rows that does.

    Returns:
        Name -> n where the first of n equal parts does.
    """
    kinds = (Attention, AttentionPoolLatent, models_scala.Attention)
    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    found = {f"{name}.{leaf}": part for name, module in attentions for leaf, part in _query_weights(module).items()}
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def scale_queries(queries: Mapping[str, int], state: State, ratio: float) -> State:
    """The weights of a slice for attention that scales by its own head dimension d/H in place of the full one, D/H.

    Args:
        queries: of :func:`query_weights`.
        state: weights at a width.
        ratio: d / D.

    Returns:
        ``state``, of which what makes the queries is multiplied by sqrt(r).
    """
    scaled = dict(state)
    for name, part in queries.items() if ratio != 1 else ():
        rows = len(state[name]) // part
        scaled[name] = torch.cat([state[name][:rows] * math.sqrt(ratio), state[name][rows:]])
    return scaled


# ---------------------------------------------------------------------------------------------------------------------
# The network


def make_timm(model_name: str, **arguments: Any) -> Any:
    """A network of timm's registry with random weights, if it can be sliced.

    Args:
        arguments: of its factory.

    Raises:
        UsageError: an unknown name, or patches that do not fill the sides; ``NotAHost`` for a network that cannot be
            sliced.
        TypeError: an argument that it does not take.
    """
    with torch.device("meta"):  # where structure is all there is
        check(timm.create_model(known_timm(model_name)))
    net: Any = TIMM_NETWORK(model_name, arguments)
    embed = net.patch_embed
    for side, patch in zip(embed.img_size, embed.patch_size, strict=True):
        models_scala.check_filled(side, patch)
    return net


def create(
    model_name: str, *, smallest_ratio: float = 0.25, largest_ratio: float = 1.0, **arguments: Any
) -> TimmViT_scala:
    """:func:`make_timm` at any width."""
    return TimmViT_scala(make_timm(model_name, **arguments), smallest_ratio, largest_ratio)


class TimmViT_scala(Narrowed):
    """A plain ViT of timm whose every forward pass takes a width ratio; the weights keep their names.

    Args:
        net: what is sliced; its parameters become those of this network.
        smallest_ratio, largest_ratio: the slicing bound s, l, which decides the end that a width is cut from.
        isolated_activation: off, every width leads, see :class:`scala.slicing.SliceRule`.

    Raises:
        NotAHost: a network that cannot be sliced, naming the module.
        WidthError: a bound outside of (0, 1], or the smallest above the largest.
    """

    def __init__(
        self,
        net: nn.Module,
        smallest_ratio: float = 0.25,
        largest_ratio: float = 1.0,
        *,
        isolated_activation: bool = True,
    ) -> None:
        check(net)
        bounds = [exact(bound) for bound in (smallest_ratio, largest_ratio)]
        if Fraction(*bounds[0]) > Fraction(*bounds[1]):
            raise WidthError(f"smallest_ratio {smallest_ratio:g} is above largest_ratio {largest_ratio:g}")
        super().__init__(
            partial(narrow, narrow(net, FULL)), SliceRule(smallest_ratio, largest_ratio, isolated_activation)
        )
        host: Any = net
        self.num_classes, self.embed_dim, self.num_features = host.num_classes, host.embed_dim, host.num_features
        sizes = [module.head_dim for module in host.modules() if hasattr(module, "head_dim")]
        self.num_heads = host.embed_dim // math.gcd(host.embed_dim, *sizes)
        self.queries = query_weights(host)
        self._units: dict[Width, Any] = {}
        for name, child in host.named_children():
            self.add_module(name, child)
        for name, parameter in host.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.train(host.training)

    def plain(self, width: Width) -> Any:
        network = super().plain(width)
        if hasattr(network, "distilled_training"):
            network.distilled_training = True  # both heads in training mode
        return network

    def alone(self, width: Width) -> nn.Module:
        """The network that a width is, with copies of its weights."""
        state = {name: value.detach().clone() for name, value in self._state(width).items()}
        network = self.make(width)
        network.load_state_dict(state, assign=True)
        return network.train(self.training)

    def check_ratio(self, ratio: Ratio) -> Width:
        """The exact width; one that the heads cannot share is refused, naming the nearest and all valid ones."""
        return check_ratio(ratio, self.embed_dim, self.num_heads)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        embed: Any = self.patch_embed
        return embed.proj.in_channels, *embed.img_size

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers leave undecayed."""
        return self.plain(FULL).no_weight_decay()

    def slice_arguments(self, width: Width) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of ``timm.create_model``.

        Raises:
            ValueError: a network that timm's registry has not made.
        """
        try:
            name, arguments = TIMM_WORDS(self.make(width))
        except Unknown as error:
            raise ValueError(f"how to build the network cannot be written: {error}") from error
        return {"model_name": name, **arguments}, {"smallest_ratio": 1.0, "largest_ratio": 1.0}

    def _state(self, width: Width, names: Callable[[str], bool] | None = None) -> State:
        trunk = self.trunk(width, names)
        queries = {name: part for name, part in self.queries.items() if name in trunk}
        return scale_queries(queries, trunk, width.steps / width.of)

    def _in_units(self, width: Width) -> tuple[nn.Module, State]:
        """The plain network of a width whose blocks cut their weights when they run, and the weights of the rest."""
        plain, blocks = self.plain(width), cast(Any, self.blocks)
        if width not in self._units:
            units = (
                _Unit(own, block, partial(self._block_state, width, f"blocks.{index}."))
                for index, (own, block) in enumerate(zip(blocks, plain.blocks, strict=True))
            )
            self._units[width] = copy.copy(plain)
            self._units[width]._modules = plain._modules | {"blocks": nn.Sequential(*units)}
        network = self._units[width]
        network.training = plain.training  # its modules are those of the plain one
        return network, self._state(width, lambda name: not name.startswith("blocks."))

    def _block_state(self, width: Width, prefix: str) -> State:
        state = self._state(width, lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): value for name, value in state.items()}

    def _call(self, method: str, ratio: Ratio, *args: Any, **options: Any) -> Any:
        width = self.check_ratio(ratio)
        state = {f"net.{name}": value for name, value in self._state(width).items()}
        return functional_call(_Method(self.plain(width), method), state, args, options)

    def forward_features(self, images: Tensor, ratio: Ratio) -> Tensor:
        """Normalised tokens (B, N, d)."""
        return self._call("forward_features", ratio, images)

    def forward_head(self, x: Tensor, ratio: Ratio, pre_logits: bool = False) -> Any:
        """Pooled logits (B, C), or features (B, d)."""
        return self._call("forward_head", ratio, x, pre_logits=pre_logits)

    def forward(self, images: Tensor, ratio: Ratio) -> Any:
        """Logits (B, C) of images (B, 3, height, width) at a width ratio; a pair in training if it is distilled.

        Raises:
            ValueError: a ratio the heads cannot share.
        """
        width = self.check_ratio(ratio)
        if divided(cast(nn.Module, self.blocks)):
            network, state = self._in_units(width)
        else:
            network, state = self.plain(width), self._state(width)
        return functional_call(network, state, (images,))


class _Unit(nn.Module):
    """A block of a plain network as a unit of FSDP: it runs with a part of the weights of ``own``, gathered meanwhile.

    Args:
        own: the block of the network at any width.
        block: the one of the plain network.
        state: its weights.
    """

    def __init__(self, own: nn.Module, block: nn.Module, state: Callable[[], State]) -> None:
        super().__init__()
        self.block, self.state = block, state
        self._own = (own,)  # a tuple, so that it is not registered

    def forward(self, *args: Any, **options: Any) -> Any:
        return within(self._own[0], self._run, *args, **options)

    def _run(self, *args: Any, **options: Any) -> Any:
        return functional_call(self.block, self.state(), args, options)


class _Method(nn.Module):
    """A method of a network other than ``forward`` as a module."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, *args: Any, **options: Any) -> Any:
        return getattr(self.net, self.name)(*args, **options)

"""Networks of transformers as hosts, bare or under any head: ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP.

What has the blocks is the *trunk*, such as ``ViTModel``. A lean trunk takes and returns what the trunk does. A network
that holds one trunk, such as ``ViTForImageClassification``, is lean by holding the lean one: its own forward does the
rest. ``transformers`` is an optional extra, and nothing here imports it before there is such a network.
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.hosts.host import (
    BlockView,
    Facts,
    Host,
    NotAHost,
    Parts,
    Rotation,
    Tokens,
    channels_of,
    check_images,
    refuse_hooks,
)
from common.hosts.network import Lean, make_lean
from common.hosts.rotation import TableRotation
from common.hosts.runner import Plan
from common.run.errors import UsageError


@dataclass(frozen=True)
class Names:
    """How a family calls the parts of a block."""

    norms: tuple[str, str]
    attention: str
    output: str
    """projection of the attention's heads"""
    behind: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """modules that the update of either half passes at its end"""


VIT = Names(("layernorm_before", "layernorm_after"), "attention", "o_proj", (("dropout",), ("dropout",)))
DINO = Names(("norm1", "norm2"), "attention", "o_proj", (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")))
CLIP = Names(("layer_norm1", "layer_norm2"), "self_attn", "out_proj")


def _pooler(trunk: Any, x: Tensor) -> Tensor | None:
    return None if trunk.pooler is None else trunk.pooler(x)


def _class_row(trunk: Any, x: Tensor) -> Tensor:
    return x[:, 0]


def _normalized_class_row(trunk: Any, x: Tensor) -> Tensor:
    return trunk.post_layernorm(x[:, 0])


def _attention_pool(trunk: Any, x: Tensor) -> Tensor | None:
    return trunk.head(x) if trunk.use_head else None


@dataclass(frozen=True)
class Family:
    """A trunk: where its parts are.

    Args:
        module: of transformers.models.
        name: what the classes of its blocks begin with.
        layers: path to the list of blocks.
        names: parts of a block.
        patches: path to the projection of patches.
        norm: of the last hidden state; None for none.
        pool: ``pooler_output`` of the trunk and its last hidden state.
        before: norm of the tokens that enter the first block.
    """

    module: str
    name: str
    layers: str
    names: Names
    patches: str
    norm: str | None
    pool: Callable[[Any, Tensor], Tensor | None]
    before: str | None = None

    @property
    def modeling(self) -> Any:
        """The module with its classes; whoever has a network has it imported."""
        return importlib.import_module(f"transformers.models.{self.module}")


FAMILIES = {
    "ViTModel": Family(
        "vit.modeling_vit", "ViT", "layers", VIT, "embeddings.patch_embeddings.projection", "layernorm", _pooler
    ),
    "DeiTModel": Family(
        "deit.modeling_deit", "DeiT", "layers", VIT, "embeddings.patch_embeddings.projection", "layernorm", _pooler
    ),
    "Dinov2Model": Family(
        "dinov2.modeling_dinov2", "Dinov2", "encoder.layer", DINO, "embeddings.patch_embeddings.projection",
        "layernorm", _class_row,
    ),
    "Dinov2WithRegistersModel": Family(
        "dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegisters", "encoder.layer", DINO,
        "embeddings.patch_embeddings.projection", "layernorm", _class_row,
    ),
    "DINOv3ViTModel": Family(
        "dinov3_vit.modeling_dinov3_vit", "DINOv3ViT", "model.layer", DINO, "embeddings.patch_embeddings", "norm",
        _class_row,
    ),
    "CLIPVisionModel": Family(
        "clip.modeling_clip", "CLIP", "encoder.layers", CLIP, "embeddings.patch_embedding", None,
        _normalized_class_row, before="pre_layrnorm",
    ),
    "SiglipVisionModel": Family(
        "siglip.modeling_siglip", "Siglip", "encoder.layers", CLIP, "embeddings.patch_embedding", "post_layernorm",
        _attention_pool,
    ),
}  # fmt: skip
"""By the trunk's class."""
READ_THE_PREFIX = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
"""Heads that read nothing but prefix tokens, and return nothing else."""
ATTENTION = ("sdpa", "eager")
"""Forms of attention that a file may name: further ones are programs, which transformers fetches and runs."""
EMBEDDING_OPTIONS = ("bool_masked_pos", "interpolate_pos_encoding")
REFUSED = {
    "output_hidden_states": "features between the blocks are not restored: ask the dense network, fast.restore()",
    "output_attentions": "methods change which tokens attend: ask the dense network, fast.restore()",
    "attention_mask": "a mask does not go with token methods: positions change between the blocks",
    "is_causal": "a mask does not go with token methods: positions change between the blocks",
}


def check_config(config: Any) -> None:
    """Refuse a configuration, as JSON has it, that names another form of attention or of anything else.

    Raises:
        UsageError: naming the key.
    """
    waiting = [config]
    while waiting:
        value = waiting.pop()
        for key, inner in value.items() if isinstance(value, dict) else ():
            if "implementation" in key and inner not in (None, *ATTENTION):
                raise UsageError(
                    f"config: {key} must be {' or '.join(ATTENTION)}, got {inner!r}, which may be a program"
                )
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value


def _from_transformers(net: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in type(net).__mro__
    )


def family_of(net: nn.Module) -> Family | None:
    """The family of a trunk; None for any other module."""
    if not _from_transformers(net):
        return None
    return next((FAMILIES[kind.__name__] for kind in type(net).__mro__ if kind.__name__ in FAMILIES), None)


class HuggingFaceBlock(BlockView):
    """View of the layer of a family."""

    def __init__(self, family: Family, module: nn.Module, index: int) -> None:
        self.module, self.names, modeling = cast(Any, module), family.names, family.modeling
        self.layer, name = index, f"{family.layers}.{index}"
        self.rotate = getattr(modeling, "apply_rotary_pos_emb", None)
        attention: Any = getattr(module, self.names.attention, None)
        for part, kind, found in (
            ("", "EncoderLayer" if family.names is CLIP else "Layer", module),
            (f".{self.names.attention}", "Attention", attention),
        ):
            known = getattr(modeling, family.name + kind, None)
            if known is None or type(found).forward is not known.forward:
                raise NotAHost(
                    f"{name}{part} is a {type(found).__name__}, which does not work like {family.name}{kind}"
                )
        for part in ("q_proj", "k_proj", "v_proj", self.names.output):
            if not hasattr(attention, part):
                raise NotAHost(f"{name}.{self.names.attention} has no {part}: {_versions()}")
        if self.module.gradient_checkpointing:
            raise NotAHost("gradient checkpointing is on: call net.gradient_checkpointing_disable() first")
        self.opened = refuse_hooks([(name, module), (f"{name}.{self.names.attention}", attention)])
        self.scale = next(getattr(attention, key) for key in ("scaling", "scale") if hasattr(attention, key))
        self.rate = next(key for key in ("attention_dropout", "dropout") if hasattr(attention, key))

    def block(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        if rotation is None:
            return self.module(x, None)
        sine, cosine = rotation.of(self.layer).chunk(2, dim=-1)
        return self.module(x, None, position_embeddings=(cosine, sine))

    def qkv(self, x: Tensor, rotation: Rotation | None) -> Parts:
        attention = getattr(self.module, self.names.attention)
        y = getattr(self.module, self.names.norms[0])(x)
        q, keys, v = (
            part(y).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k = keys
        if rotation is not None and self.rotate is not None:
            sine, cosine = rotation.of(self.layer).chunk(2, dim=-1)
            q, k = self.rotate(q, keys, cosine, sine)
        return Parts(
            q, k, v, self.scale, getattr(attention, self.rate) if attention.training else 0.0, keys=keys, normalized=y
        )

    def project(self, heads: Tensor, parts: Parts) -> Tensor:
        x = getattr(getattr(self.module, self.names.attention), self.names.output)(heads.transpose(1, 2).flatten(2))
        for name in self.names.behind[0]:
            x = getattr(self.module, name)(x)
        return x

    def mlp(self, x: Tensor) -> Tensor:
        x = self.module.mlp(getattr(self.module, self.names.norms[1])(x))
        for name in self.names.behind[1]:
            x = getattr(self.module, name)(x)
        return x


class LeanHuggingFace(Lean):
    """Mixin of a lean network of transformers.

    Its class has the name of the host's, by which pipelines know it; its ``forward`` the signature that Trainer reads.
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        dense = cast(Any, super(Lean, cls)).forward

        @functools.wraps(dense)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.plan.host.call(self, *args, **kwargs)

        cls.__name__ = cls.__bases__[-1].__name__  # by which transformers knows what a network is for
        cls.forward = forward  # pyright: ignore[reportAttributeAccessIssue]

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> Any:
        raise UsageError("a plan opens the blocks, so that checkpoints of them would be silent")

    gradient_checkpointing_enable = activation_checkpointing_enable

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Write the network as its own class, whose weights these are."""
        return dense_form(self).save_pretrained(*args, **kwargs)


def dense_form(net: Any) -> Any:
    """A lean network, or one that holds one, with its present modules, without the plan and what methods learned."""
    if not isinstance(net, Lean):
        return net
    kind: Any = type(net).__bases__[-1]
    dense = kind.__new__(kind)
    dense.__dict__ |= net.__dict__
    lean_parts = {"plan", *(name for method in net.methods for name in method.weights)}
    dense._modules = {
        name: dense_form(child) for name, child in cast(Any, net)._modules.items() if name not in lean_parts
    }
    return dense


class HuggingFaceTrunk(Host):
    """A bare network."""

    lean_class = LeanHuggingFace

    @staticmethod
    def accepts(net: nn.Module) -> bool:
        return family_of(net) is not None

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        trunk, family, kind = cast(Any, net), cast(Family, family_of(net)), type(net)
        self.family = family
        known = next(base for base in kind.__mro__ if base.__name__ in FAMILIES)
        if kind.forward is not known.forward:
            raise NotAHost(f"{kind.__name__} has a forward of its own")
        self.names = list(inspect.signature(known.forward).parameters)[1:]
        try:
            patches, layers = trunk.get_submodule(family.patches), trunk.get_submodule(family.layers)
        except AttributeError as error:
            raise NotAHost(f"{kind.__name__}: {error}: {_versions()}") from error
        self.layers = family.layers
        above, _, _ = family.layers.rpartition(".")
        self.opened = refuse_hooks([(above, trunk.get_submodule(above))] if above else [])
        self.blocks = [HuggingFaceBlock(family, layer, index) for index, layer in enumerate(layers)]
        config, image = trunk.config, _pair(trunk.config.image_size)
        class_token = any(hasattr(trunk.embeddings, name) for name in ("cls_token", "class_embedding"))
        distilled = hasattr(trunk.embeddings, "distillation_token")
        self.facts = Facts(
            name=f"transformers' {kind.__name__}",
            depth=len(self.blocks),
            prefix=class_token + distilled + getattr(config, "num_register_tokens", 0),
            class_token=class_token,
            grid=(image[0] // patches.stride[0], image[1] // patches.stride[1]),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            image_size=image,
            channels=channels_of(net),
        )

    def embed(self, net: Any, images: Tensor, **options: Any) -> Tokens:
        patches = net.get_submodule(self.family.patches)
        grid = (images.shape[2] // patches.stride[0], images.shape[3] // patches.stride[1])
        if "interpolate_pos_encoding" in self.names:
            options.setdefault("interpolate_pos_encoding", grid != self.facts.grid)
        images = images.to(patches.weight.dtype)
        x = net.embeddings(images, **options)
        x = x if self.family.before is None else getattr(net, self.family.before)(x)
        rotation = None
        if hasattr(net, "rope_embeddings"):
            cosine, sine = net.rope_embeddings(images)
            once = net.rope_embeddings.inv_freq
            none = torch.zeros_like(once)
            axes = torch.stack([torch.cat([once, none]), torch.cat([none, once])]).repeat(1, 2)
            rotation = TableRotation(grid=grid, table=torch.cat([sine, cosine], dim=-1), frequencies=axes)
        return Tokens(x, self.facts.prefix, grid, rotation=rotation)

    def normalize(self, net: Any, x: Tensor) -> Tensor:
        return x if self.family.norm is None else getattr(net, self.family.norm)(x)

    def reads_prefix(self, net: Any) -> bool:
        return False

    def finish(self, net: Any, x: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(
            last_hidden_state=cast(Any, x), pooler_output=cast(Any, self.family.pool(net, x))
        )

    def call(self, net: Any, *args: Any, restored: bool = True, **kwargs: Any) -> Any:
        """The trunk's forward through a plan; a head that reads nothing but the prefix asks for ``restored=False``."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        for name, why in REFUSED.items():
            asked = given.get(name, getattr(net.config, name, None) if name.startswith("output_") else None)
            if asked is not None and asked is not False:
                raise UsageError(f"{name}: {why}")
        if given.get("pixel_values") is None:
            raise UsageError("pixel_values are missing: expected images (B, C, H, W)")
        check_images(given["pixel_values"])
        self.check_blocks(net)
        options = {name: given.get(name) for name in EMBEDDING_OPTIONS if name in self.names}
        restored = restored and net.plan.restores
        tokens = self.embed(net, given["pixel_values"], **options)
        tokens = net.plan.run(tokens if restored else tokens.update(undo=None))
        output = self.finish(net, self.normalize(net, tokens.restored() if restored else tokens.x))
        return_dict = given.get("return_dict")
        return output if (net.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class HuggingFaceHead(Host):
    """A network that holds one trunk."""

    lean_class = LeanHuggingFace

    @staticmethod
    def accepts(net: nn.Module) -> bool:
        return _from_transformers(net)

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        kind = type(net)
        trunks = [name for name, child in net.named_children() if family_of(child)]
        if len(trunks) != 1:
            raise NotAHost(
                f"transformers' {kind.__name__} is not a host; known are {', '.join(FAMILIES)}, each alone or once "
                f"inside of a network with a head; {_versions()}"
            )
        self.child = trunks[0]
        if cast(Any, net).main_input_name != "pixel_values":
            raise NotAHost(
                f"transformers' {kind.__name__} takes more than images: give it a lean part, "
                f"net.{self.child} = leanvit.lean(net.{self.child}, ...)"
            )
        self.trunk = HuggingFaceTrunk(getattr(net, self.child))
        self.facts = replace(self.trunk.facts, name=f"transformers' {kind.__name__}")
        self.blocks, self.opened = self.trunk.blocks, self.trunk.opened
        self.layers = f"{self.child}.{self.trunk.layers}"
        head = getattr(self.trunk.family.modeling, kind.__name__, None)
        self._reads_prefix = kind.__name__ in READ_THE_PREFIX and head is kind

    def graft(self, fast: Any) -> None:
        plan: Plan = copy.copy(fast.plan)
        plan.host = self.trunk
        fast._modules[self.child] = make_lean(self.trunk.net, plan)

    def embed(self, net: Any, images: Tensor) -> Tokens:
        return self.trunk.embed(getattr(net, self.child), images)

    def normalize(self, net: Any, x: Tensor) -> Tensor:
        return self.trunk.normalize(getattr(net, self.child), x)

    def reads_prefix(self, net: Any) -> bool:
        return self._reads_prefix

    def finish(self, net: Any, x: Tensor) -> Any:
        raise NotImplementedError("the network's own forward goes from its trunk's tokens to its output")

    def call(self, net: Any, *args: Any, **kwargs: Any) -> Any:
        """The network's own forward, around the lean trunk."""
        restored = {"restored": False} if self._reads_prefix else {}
        return type(self.net).forward(net, *args, **restored, **kwargs)


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _versions() -> str:
    return f"this is transformers {importlib.import_module('transformers').__version__}, tested is {TESTED}"


TESTED = "5.24"

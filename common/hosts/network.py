"""``lean``: a network that runs through a plan, of the host's own class, with its modules, which stay as they are."""

import copy
import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.hosts.host import Host, NotAHost, Tokens, check_images
from common.hosts.runner import Method, Plan, PlanError
from common.measure.flops import count_operations, evaluating, gmacs
from common.run.errors import UsageError
from common.run.wrapping import unwrap

HOSTS = (
    "hourglass_swag.host:SwagViT",
    "common.hosts.timm_vit:TimmViT",
    "common.hosts.timm_eva:TimmEva",
    "common.hosts.torchvision_vit:TorchvisionViT",
    "common.hosts.huggingface:HuggingFaceTrunk",
    "common.hosts.huggingface:HuggingFaceHead",
)
METHODS = {
    "tome": "hourglass_swag.models.tome_vit:ToMe",
    "hourglass": "hourglass_swag.models.hourglass_vit:Hourglass",
    "evit": "hourglass_swag.models.evit:EViT",
    "evo_vit": "hourglass_swag.models.evo_vit:EvoViT",
    "ats": "hourglass_swag.models.ats_vision_transformer:ATS",
    "act": "hourglass_swag.models.act_vision_transformer:ACT",
    "smyrf": "hourglass_swag.models.smyrf_vision_transformer:SMYRF",
}
"""Where adapters and methods are; imported when asked for, so that this room imports no paper."""
TRAINED = {"slim": "sit.models.slim:Slim"}
"""Methods with weights of their own, which come with them: no network can have them untrained."""


def load(place: str) -> Any:
    """The object at ``module:name``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class Lean:
    """Mixin of a lean network; the host family's own mixin adds ``forward``."""

    plan: Plan

    def run(self, images: Tensor, *, restorable: bool = True, seen: list[Tokens] | None = None) -> Tokens:
        """Tokens behind the last block, reduced; ``seen`` as in ``Plan.run``."""
        tokens = self.start(images)
        return self.plan.run(tokens if restorable else tokens.update(undo=None), seen=seen)

    def start(self, images: Tensor) -> Tokens:
        """Tokens that enter the first block."""
        check_images(images)
        self.plan.host.check_blocks(self)  # pyright: ignore[reportArgumentType] - a mixin of modules
        return self.plan.host.embed(self, images)

    def output(self, images: Tensor, *, seen: list[Tokens] | None = None) -> Any:
        """What the host returns for images; ``seen`` as in ``Plan.run``."""
        host = self.plan.host
        restored = self.plan.restores and not host.reads_prefix(self)
        return host.finish(self, self.normalized(images, restored, seen=seen))

    def hidden(self, images: Tensor) -> Tensor:
        """Normalised tokens, prefix and patches, on the full grid again unless the plan leaves them reduced."""
        return self.normalized(images, self.plan.restores)

    def normalized(self, images: Tensor, restored: bool = True, *, seen: list[Tokens] | None = None) -> Tensor:
        """Normalised tokens, prefix and patches, on the full grid again or reduced; ``seen`` as in ``Plan.run``."""
        tokens = self.run(images, restorable=restored, seen=seen)
        return self.plan.host.normalize(self, tokens.restored() if restored else tokens.x)

    def features(self, images: Tensor) -> Tensor:
        """Normalised features of the patches on the full grid again.

        Args:
            images: (B, 3, H, W).

        Returns:
            (B, C, rows, columns).
        """
        host = self.plan.host
        start = self.start(images)
        x = host.normalize(self, self.plan.run(start).restored())
        assert start.grid is not None
        return x[:, start.prefix :].transpose(1, 2).unflatten(2, start.grid)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods with all their settings."""
        return tuple(self.plan.methods)

    @property
    def depends_on_data(self) -> bool:
        """Whether the number of tokens or the cost depends on weights and images."""
        return any(method.depends_on_data for method in self.plan.methods)

    def tokens_per_layer(self, images: Tensor | None = None) -> list[int]:
        """Tokens that enter each block and, last, those that leave the last one.

        Args:
            images: (B, 3, H, W); default: an empty one of the network's own resolution, unless tokens depend on it.

        Raises:
            UsageError: if they do, and there are no images.
        """
        seen: list[Tokens] = []
        with torch.no_grad(), evaluating(self):  # pyright: ignore[reportArgumentType] - a mixin of modules
            self.plan.run(self.start(self._probe(images, "drops_by_data")), seen=seen)
        return [tokens.x.shape[1] for tokens in seen]

    def gmacs(self, images: Tensor | None = None) -> float:
        """Multiply-accumulates per image in 1e9, those of the methods included; arguments as ``tokens_per_layer``."""
        probe = self._probe(images, "depends_on_data")
        counted = count_operations(self, probe if self.depends_on_data else probe.to("meta"))  # pyright: ignore[reportArgumentType] - a mixin
        return gmacs(counted.executed) / len(probe)

    def restore(self) -> nn.Module:
        """The network that this was made of; its modules, parameters and state dict are untouched."""
        net = self.plan.host.net
        net.training = self.training  # pyright: ignore[reportAttributeAccessIssue] - as its modules, which both share
        return net

    def _probe(self, images: Tensor | None, needs: str) -> Tensor:
        """The images given, or an empty one; ``needs`` is the property of methods for which that says nothing."""
        if images is not None:
            return images
        if names := ", ".join(method.name for method in self.plan.methods if getattr(method, needs)):
            raise UsageError(f"what {names} does depends on weights and images: give some, (B, C, H, W)")
        parameter = floating(self)
        facts = self.plan.host.facts
        return torch.zeros(1, facts.channels, *facts.image_size, device=parameter.device, dtype=parameter.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, self.__dict__


@cache
def lean_class(*bases: type) -> type:
    """The class of a lean network: mixins, the family's last among them, before the host's own class."""
    return type(f"Lean{bases[-1].__name__}", bases, {"__module__": __name__})


def _empty(*bases: type) -> Any:
    """A network without content, for copying and unpickling."""
    made: Any = lean_class(*bases)
    return made.__new__(made)


def find_host(net: nn.Module) -> Host:
    """The adapter of a network.

    Raises:
        NotAHost: naming the module that is not known, or the families that are.
    """
    if isinstance(net, Lean):
        raise NotAHost("this network has token methods already: give all of them in one call, or fast.restore() it")
    for place in HOSTS:
        family = load(place)
        if family.accepts(net):
            return family(net)
    if isinstance(net, str):
        raise NotAHost(f"{net!r} is a name: build the network first, such as timm.create_model({net!r})")
    kind = type(net)
    if isinstance(net, nn.Module) and unwrap(net) is not net:
        raise NotAHost(f"{kind.__name__} wraps a network: give the network itself, and wrap what comes back")
    raise NotAHost(
        f"{kind.__module__}.{kind.__name__} is not a host; known are timm's VisionTransformer and Eva, torchvision's, "
        "those of transformers that docs/hosts.md names, and the SWAG networks"
    )


def make_method(name: str, settings: Mapping[str, Any]) -> Method:
    """A method by name; ``preset="swag"`` gives the settings of the published rows on SWAG where others are missing.

    Raises:
        PlanError: naming what is valid and the nearest.
    """
    kind = method_class(name)
    if kind is None:
        raise PlanError(f"there is no method {name!r}{_nearest(name, METHODS)}; the methods are {', '.join(METHODS)}")
    fields = [field.name for field in dataclasses.fields(kind)]
    settings = dict(settings)
    if (preset := settings.pop("preset", None)) is not None:
        if preset != "swag":
            raise PlanError(f"preset must be 'swag', the published rows' settings, or left out; got {preset!r}")
        settings = {**kind.swag, **settings}
    for key in settings:
        if key not in fields:
            raise PlanError(f"{name} has no setting {key!r}{_nearest(key, fields)}; it has {', '.join(fields)}")
    return kind(**settings)


def method_class(name: str) -> Any:
    """The class of a method by its name; None if there is none."""
    place = METHODS.get(name) or TRAINED.get(name)
    return place and load(place)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from the network itself, of the largest value, by precision."""


def check(host: Host) -> None:
    """Run the network and its opened blocks on a small random image and compare.

    Raises:
        NotAHost: if they differ by more than ``TOLERANCES``.
    """
    parameter = floating(host.net)
    if parameter.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    shape = (1, host.facts.channels, *host.facts.image_size)
    images = torch.randn(shape, generator=generator, device="cpu").to(parameter)
    with torch.no_grad(), evaluating(host.net), torch.autocast(parameter.device.type, enabled=False):
        try:
            dense = tree_leaves(host.net(images))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise NotAHost(
                f"{host.facts.name} fails on an image of its own size, {shape[2]}x{shape[3]}: {error}"
            ) from error
        if not all(leaf.isfinite().all() for leaf in dense):
            wrong = [name for name, value in host.net.named_parameters() if not value.isfinite().all()]
            raise NotAHost(
                f"{host.facts.name} gives values that are not finite on a random image"
                + (f": {wrong[0]} holds some, with {len(wrong) - 1} other weights" if wrong else "")
            )
        if not any(leaf.any() for leaf in dense) and (probe := _with_a_head(host.net)) is not None:
            check(type(host)(probe))  # zeros would equal zeros
            return
        opened = tree_leaves(make_lean(host.net, Plan(host, (), opened=True))(images))
    for found, expected in zip(opened, dense, strict=True):
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if not difference <= TOLERANCES[parameter.dtype]:
            raise NotAHost(
                f"{host.facts.name} computes something else than its blocks say: the outputs differ by "
                f"{float(difference):.1e} of the largest value in {parameter.dtype}"
            )


def _with_a_head(net: nn.Module) -> nn.Module | None:
    """A copy whose matrices of zeros, such as those of a fresh head, are random; None if there are none."""
    probe, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    empty = [parameter for parameter in probe.parameters() if parameter.dim() > 1 and not parameter.any()]
    for parameter in empty:
        values = torch.randn(parameter.shape, generator=generator, device="cpu")
        parameter.data.copy_(values * parameter.shape[1] ** -0.5)
    return probe if empty else None


def floating(net: Any) -> Tensor:
    """The first parameter that says the precision of images: whole numbers are those of a quantized layer."""
    return next(parameter for parameter in net.parameters() if parameter.dtype in TOLERANCES)


def lean(net: nn.Module, *methods: str | Method, verify: bool = True, **settings: Any) -> Any:
    """A network that computes what ``net`` does, on fewer tokens.

    Args:
        net: a Vision Transformer of a known family.
        methods: a name, whose settings may follow as keywords; or methods with their settings, several to combine.
        verify: compare the network with its opened blocks on one random image first.

    Returns:
        A network of the host's class that shares its modules: what is called on it works as before; see ``Lean``.

    Raises:
        NotAHost: if the network is not known, or computes something else than its blocks say.
        PlanError: if a method or a setting is not known or cannot work here, alone or with the others.
    """
    if settings and (len(methods) != 1 or not isinstance(methods[0], str)):
        raise PlanError("settings as keywords belong to one method given by name; give several as objects")
    host = find_host(net)
    chosen = [make_method(method, settings) if isinstance(method, str) else method for method in methods]
    plan = Plan(host, chosen)
    if verify:
        check(host)
    return make_lean(net, plan)


def make_lean(net: nn.Module, plan: Plan) -> Any:
    """The lean network of a checked plan: a shallow copy of the host with a class of its own, and what methods learned.

    Raises:
        PlanError: if a module that a method has learned has a name that is taken.
    """
    fast = _empty(plan.host.lean_class, type(net))
    own = {key: copy.copy(value) for key, value in net.__dict__.items() if "_hooks" in key}
    modules = {**vars(net)["_modules"], "plan": plan}
    for method in plan.methods:
        if taken := sorted(set(method.weights) & set(modules)):
            raise PlanError(f"{method.name} brings a module {taken[0]!r}, and the network has one of this name")
        modules |= method.weights
    fast.__dict__ |= {**net.__dict__, **own, "_modules": modules}
    plan.host.graft(fast)
    return fast


def explain(net: nn.Module) -> dict[str, str]:
    """Which methods a network can have with their default settings: name -> the settings, or why not.

    A method that must be learned says how.

    Raises:
        NotAHost: if it can have none.
    """
    host = find_host(net)
    check(host)

    def answers() -> Iterator[tuple[str, str]]:
        for name in (*METHODS, *TRAINED):
            try:
                yield name, f"possible: {Plan(host, [make_method(name, {})]).methods[0]}"
            except UsageError as error:
                yield name, f"not possible: {error}"

    return dict(answers())

"""One width of a sliced network as a network of its own: weights, constructor arguments, and how to build it again.

A slice of width r of a ViT is a ViT of width d = r D with the same number of heads, but its attention still scales by
the full head dimension: sqrt(D/H) where a network of its own has sqrt(d/H). Multiplying the query rows of the fused
projection by sqrt(d/D) makes the two equal. The normalisation's eps stays 1e-5. So timm's own VisionTransformer runs a
slice with the same logits; :func:`slice_width` gives it.

Slices of the other backbones are networks of the same class, at ratio 1.

Legend: D full width, d sliced width, H heads, r width ratio.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.measure.benchmark import random_images
from common.run.checkpoint import build_described, load_strict, naming, read_described, save_described
from common.run.errors import CheckpointError, UsageError
from common.run.export import difference, export_onnx, export_program
from common.run.files import write_atomic
from common.run.program import get_logger
from scala.engine_scala import AtRatio
from scala.layers import NORM_EPS, SlicedNetwork, sliced_state_dict
from scala.models_mobilenet import MobileNetV2_scala
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala
from scala.models_timm import TIMM_NETWORK, TimmViT_scala, create, query_weights, scale_queries
from scala.models_uniformer import UniFormer_scala
from scala.narrowing import NarrowedNetwork
from scala.sweep import costs

logger = get_logger(__name__)

METADATA_KEY = "leanvit_standalone"


def _from_registry(model_name: str, **arguments: Any) -> nn.Module:
    return TIMM_NETWORK(model_name, arguments)


CLASSES: Mapping[str, Callable[..., nn.Module]] = {
    "timm.create_model": _from_registry,
    "scala.models_timm.TimmViT_scala": create,
} | {
    f"{cls.__module__}.{cls.__name__}": cls
    for cls in (
        VisionTransformer,
        VisionTransformerDistilled,
        VisionTransformer_scala,
        DistilledVisionTransformer_scala,
        MobileNetV2_scala,
        UniFormer_scala,
    )
}


@dataclass(frozen=True)
class Standalone:
    """What it takes to build a slice again; JSON round-trips it.

    Attributes:
        ours, timm: class and constructor arguments in this package (called with ratio 1) and in timm; ``timm`` is None
            where timm has no such network. timm's ``norm_layer`` is nn.LayerNorm with ``norm_eps``.
        norm_eps: of every layer normalisation; None where the class knows it, or has none.
        source: where it comes from: network, ratio, slicing bound.
        input_size: side of the images in pixels.
    """

    ours: Mapping[str, Any]
    timm: Mapping[str, Any] | None
    norm_eps: float | None
    source: Mapping[str, Any]
    input_size: int

    def build_timm(self) -> nn.Module:
        """timm's network, with random weights.

        Raises:
            ValueError: if timm has none.
        """
        if self.timm is None:
            raise ValueError(f"timm has no class for a slice of {self.ours['class']}; build ours")
        norm = {} if self.norm_eps is None else {"norm_layer": partial(nn.LayerNorm, eps=self.norm_eps)}
        return CLASSES[self.timm["class"]](**self.timm["arguments"], **norm)

    def build_ours(self) -> AtRatio:
        """This package's network at ratio 1, called with images only; random weights."""
        return AtRatio(CLASSES[self.ours["class"]](**self.ours["arguments"]), 1.0)

    def load(self, state: Mapping[str, Tensor], *, source: str = "slice") -> nn.Module:
        """timm's network where there is one, else ours, with weights, in their precision, and in evaluation mode."""
        build = self.build_timm if self.timm is not None else self.build_ours
        model: nn.Module = build_described(build, asdict(self), state)
        weight = next(value for value in state.values() if value.is_floating_point())
        model.to(weight.device, weight.dtype)
        load_strict(model.model if isinstance(model, AtRatio) else model, state, source=source)
        return model.eval()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Standalone:
        return Standalone(**json.loads(text))


def describe(model: SlicedNetwork, ratio: float) -> Standalone:
    """What a slice of ``model`` is as a network of its own.

    Raises:
        ValueError: an invalid ratio, or a ViT with options that timm's class does not have.
    """
    shared, alone = model.slice_arguments(model.check_ratio(ratio))
    theirs, name = None, "{0.__module__}.{0.__name__}".format
    if isinstance(model, VisionTransformer_scala):
        if model.patch_embed.norm is not None:
            raise ValueError(
                "timm's VisionTransformer has no normalisation after the patch embedding; nothing to export to"
            )
        distilled = isinstance(model, DistilledVisionTransformer_scala)
        theirs = name(VisionTransformerDistilled if distilled else VisionTransformer)
    elif isinstance(model, TimmViT_scala):
        theirs = "timm.create_model"
    bound = {"smallest_ratio": model.smallest_ratio, "largest_ratio": model.largest_ratio}
    return Standalone(
        ours={"class": name(type(model)), "arguments": {**shared, **alone}},
        timm={"class": theirs, "arguments": shared} if theirs is not None else None,
        norm_eps=None if isinstance(model, (MobileNetV2_scala, TimmViT_scala)) else NORM_EPS,
        source={"network": type(model).__name__, "ratio": ratio, **bound},
        input_size=max(model.input_shape[1:]),
    )


@torch.no_grad()
def standalone_state(model: Any, ratio: float) -> dict[str, Tensor]:
    """Weights of a slice as a network of its own, copies; for the names see :func:`describe`.

    Raises:
        ValueError: an invalid ratio, or one without batch statistics.
    """
    width = model.check_ratio(ratio)
    state = scale_queries(query_weights(model), sliced_state_dict(model, ratio), width.steps / width.of)
    state = {name: value.detach().clone().contiguous() for name, value in state.items()}
    for name, module in model.named_modules():
        if getattr(module, "official", False):  # a LayerScale that does nothing
            state.pop(f"{name}.gamma", None)
    if isinstance(model, NarrowedNetwork):
        state |= {name: value.clone() for name, value in model.statistics(ratio).items()}
    return state


def slice_width(
    model: nn.Module, width: float, *, smallest_ratio: float | None = None, largest_ratio: float | None = None
) -> nn.Module:
    """One width of a network as a plain network of its own, of timm's class wherever timm has one.

    Args:
        model: a plain ViT of timm, with weights that Scala trained or any other; or a network of this package, such as
            ``scala.loading.load_trained`` gives.
        width: the ratio r in (0, 1].
        smallest_ratio, largest_ratio: the slicing bound that a ViT of timm was trained with, which decides the end that
            a width is cut from (default: 0.25 and 1); a network of this package knows its own.

    Returns:
        A network (B, 3, height, width) to logits (B, C) in the mode of ``model``, with copies of its weights, that
        shares nothing with it.

    Raises:
        NotAHost: a network that cannot be sliced, naming the module.
        WidthError: a ratio that the heads cannot share, naming those that they can.
        UsageError: a bound for a network that has its own.
    """
    bound = {"smallest_ratio": smallest_ratio, "largest_ratio": largest_ratio}
    given: dict[str, Any] = {name: value for name, value in bound.items() if value is not None}
    if not isinstance(model, SlicedNetwork):
        model = TimmViT_scala(model, **given)
    elif given:
        raise UsageError(f"{', '.join(given)} cannot be given: {type(model).__name__} has its own slicing bound")
    if isinstance(model, TimmViT_scala):
        return model.alone(model.check_ratio(width))
    return describe(model, width).load(standalone_state(model, width)).train(model.training)


def save_standalone(path: Path, state: Mapping[str, Tensor], standalone: Standalone) -> None:
    """Write weights and description into one safetensors file, whole or not at all, and the description beside it."""
    text = standalone.to_json()
    save_described(path, state, METADATA_KEY, text)
    write_atomic(path.with_suffix(".json"), text + "\n")


def load_standalone(path: str | Path) -> nn.Module:
    """The network of a file of :func:`save_standalone`: timm's where there is one, in evaluation mode.

    Raises:
        CheckpointError: a file that is none of ours.
    """
    content, state = read_described(path, METADATA_KEY)
    if content is None:
        raise CheckpointError(f"{path}: holds no description of a slice; export it with scala/export.py")
    with naming(path, "its description is damaged"):
        return Standalone(**content).load(state, source=str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Writing a slice, each file read back and compared


@torch.no_grad()
def export_slice(
    model: Any, ratio: float, output: Path, *, torch_export: bool = False, onnx: bool = False
) -> dict[str, float]:
    """Write one width of a network: safetensors and a description, and on request two more forms.

    Returns:
        Each file's largest relative difference of the logits, ``params_m`` and ``gmacs``.

    Raises:
        ExportError: a file that computes something else, or packages that are missing.
        ValueError: a width that is none, or a network without a stand-alone form.
    """
    standalone = describe(model, ratio)
    images = random_images(3, standalone.input_size)
    expected = AtRatio(model, ratio)(images)
    save_standalone(output, standalone_state(model, ratio), standalone)
    alone = load_standalone(output)
    results = {output.name: difference(alone, images, expected, output.name)}
    for wanted, suffix, write in ((torch_export, ".pt2", export_program), (onnx, ".onnx", export_onnx)):
        if wanted:
            path = output.with_suffix(suffix)
            results[path.name] = write(alone, images, path, expected=expected)
    for name, value in results.items():
        logger.info("%s: largest difference of the logits %.2g of the largest", name, value)
    return results | costs(model, ratio)

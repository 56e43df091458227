"""From a word to a network with weights and the images that it wants: timm, torchvision, transformers, SWAG, a file.

    vit_small_patch14_dinov2          a name of timm
    torchvision:vit_l_16              a name of torchvision
    hf:facebook/dinov2-small          a network of transformers that is in its cache, or hf:FOLDER
    swag:vit_l16_in1k                 a name of hourglass_swag/hubconf.py
    file.py:function                  whatever the function returns

Weights are those of ``--weights``; or the published ones where the library has them on this machine already; or random.
Nothing is downloaded.
"""

import contextlib
import difflib
import importlib.util
import re
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision import models as vision

from common.data.images import load_image
from common.data.transforms import Transform
from common.hosts.host import Facts
from common.hosts.huggingface import check_config
from common.hosts.network import find_host, floating, load
from common.hosts.resizing import resized
from common.run.checkpoint import (
    CheckpointError,
    KeyDifferences,
    hub_folder,
    list_key_differences,
    load_strict,
    read_checkpoint,
    select_state,
)
from common.run.errors import UsageError


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to what a network takes."""

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_ratio: float = 0.875
    crop_mode: str = "center"
    """timm's word: center, squash (no crop, the sides' ratio changes) or border"""
    source: str = "ImageNet's, as nothing else is known of this network"

    def transform(self) -> Transform:
        """From a Pillow image to (3, H, W)."""
        made: Any = timm.data.create_transform(  # pyright: ignore[reportAttributeAccessIssue]
            (3, *self.size), mean=self.mean, std=self.std, interpolation=self.interpolation,
            crop_pct=self.crop_ratio, crop_mode=self.crop_mode,
        )  # fmt: skip
        return made

    def pixels(self, images: Tensor) -> Tensor:
        """The way back, (..., 3, H, W) in [0, 1], float32."""
        images = images.float()
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def __str__(self) -> str:
        cut = {"center": f"centre crop of {self.crop_ratio:.3g}", "squash": "squashed, not cropped"}
        numbers = " ".join(f"{value:.3g}" for value in (*self.mean, *self.std))
        return (
            f"{self.size[0]} x {self.size[1]} pixels, {cut.get(self.crop_mode, self.crop_mode)}, {self.interpolation}, "
            f"mean and deviation {numbers}: {self.source}"
        )


@dataclass(frozen=True)
class Model:
    """A network and what belongs to it."""

    spec: str
    net: Any
    """in evaluation mode"""
    weights: str
    """which these are, as a sentence"""
    trained: bool
    """False where they are random"""
    preprocessing: Preprocessing
    facts: Facts
    options: Mapping[str, Any]
    """of ``open_model``, where they are not the defaults"""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the images that the network takes."""
        return floating(self.net).dtype

    def read(self, files: Iterable[str | Path]) -> Tensor:
        """Images as the network takes them, (B, 3, H, W)."""
        transform = self.preprocessing.transform()
        return torch.stack([transform(load_image(file)) for file in files]).to(self.dtype)


@dataclass(frozen=True)
class _Found:
    """What the opener of a library gives."""

    net: Any
    weights: str
    trained: bool = True
    preprocessing: Mapping[str, Any] | None = None
    """fields of ``Preprocessing``; a ``size`` among them is what the library feeds"""


def open_model(spec: str, *, image_size: int | None = None, weights: str | Path | None = None) -> Model:
    """Open a network by its word; see the top of this file.

    Args:
        spec: the word.
        image_size: pixels of a side; the position embedding is resampled as the network's library does it.
        weights: checkpoint, safetensors or of ``torch.save``; it must fit, and what does not is listed.

    Raises:
        UsageError: a name, a size or a file that is not known; ``NotAHost`` for a network that is none.
        CheckpointError: weights that cannot be read, or do not fit.
    """
    library, colon, name = spec.partition(":")
    if re.search(r"\.py:", spec):
        opener, name = _open_function, spec
    elif not colon:
        opener, name = _open_timm, spec
    elif library in OPENERS and name:
        opener = OPENERS[library]
    else:
        known = ", ".join(f"{key}:NAME" for key in OPENERS)
        raise UsageError(f"cannot open {spec!r}: expected a name of timm, {known} or FILE.py:FUNCTION")
    torch.manual_seed(0)
    file = None if weights is None else Path(weights)
    found = opener(name, image_size, file)
    net, said = found.net.eval(), dict(found.preprocessing or {})
    fed = said.pop("size", None)
    wanted = fed if image_size is None else (image_size, image_size)
    facts = find_host(net).facts
    if facts.channels != 3:
        raise UsageError(f"{facts.name} takes images of {facts.channels} channels, and images here have three")
    if wanted is not None and wanted != facts.image_size:
        net = resized(net, wanted)
        facts = find_host(net).facts
    options = {"image_size": image_size, "weights": None if file is None else str(file)}
    given = {key: value for key, value in options.items() if value is not None}
    preprocessing = Preprocessing(facts.image_size, **said)
    return Model(spec, net, found.weights, found.trained, preprocessing, facts, given)


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"; near are {', '.join(near)}" if near else ""


def _random(why: str) -> str:
    return f"random, as {why}: features, cosines and accuracies say nothing about a trained network"


# ---------------------------------------------------------------------------------------------------------------- timm


def known_timm(name: str) -> str:
    """The name, if timm has such a network.

    Raises:
        UsageError: naming near ones.
    """
    if not timm.is_model(name):
        raise UsageError(f"timm has no network {name!r}{_near(name, timm.list_models(pretrained=False))}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # of NAME.TAG
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UsageError(f"timm has no weights {name!r}{_near(name, tags)}") from error
    return name


def create_timm(name: str, **options: Any) -> Any:
    """``timm.create_model``, and its errors in a sentence: a name or an option that timm does not know.

    Raises:
        UsageError: saying which.
    """
    try:
        return timm.create_model(known_timm(name), **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UsageError(f"timm cannot build {name} with {given}: {error}") from error


def _open_timm(name: str, image_size: int | None, weights: Path | None) -> _Found:
    if not timm.is_model(name) and name.endswith(".py"):
        raise UsageError(f"cannot open {name!r}: expected {name}:FUNCTION, a function that returns a network")
    known_timm(name)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    text, trained = f"{weights}", True
    state = None if weights is None else select_state(read_checkpoint(weights), source=str(weights))
    if state is None and (cached := _cached_by_timm(name)):
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(cached)}}
        text = f"timm's, from its cache: {cached}"
    elif state is None:
        text, trained = _random("timm has none of this network on this machine, and --weights names none"), False
    try:
        net: Any = timm.create_model(name, **options)
        if state is not None and (classes := _classes(state, net.pretrained_cfg.get("classifier"), net.num_classes)):
            net = timm.create_model(name, num_classes=classes[0], **options)
            text += classes[1]
    except (AssertionError, RuntimeError, TypeError) as error:
        raise UsageError(f"{name} cannot be built with --img-size {image_size}: {error}") from error
    if state is not None:
        load_strict(net, timm_state(name, net, state), source=str(weights))
    config = timm.data.resolve_model_data_config(net)  # pyright: ignore[reportAttributeAccessIssue]
    return _Found(net, text, trained, _of_timm(config))


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    same = {key: config[key] for key in ("mean", "std", "interpolation", "crop_mode")}
    return {**same, "crop_ratio": config["crop_pct"], "source": "timm's configuration of the network"}


def _cached_by_timm(name: str) -> Path | None:
    """The file with the published weights that a library has fetched before."""
    from huggingface_hub import try_to_load_from_cache

    config: Any = timm.models.get_pretrained_cfg(name)
    if config is None:
        return None
    if config.url and (file := hub_folder() / Path(urlparse(config.url).path).name).is_file():
        return file
    if config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        usual = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
        for file in (config.hf_hub_filename,) if config.hf_hub_filename else usual:
            found = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    return None


def timm_state(name: str, net: nn.Module, state: dict[str, Any]) -> Mapping[str, Any]:
    """The state as it is if it fits the network of this name, otherwise as timm translates it: names and sizes."""
    return _fitted(net, state, _timm_filter(name))


def _timm_filter(name: str) -> Any:
    """timm's own translation of checkpoints of this network: names, and the size of the position embedding."""
    module = sys.modules[timm.model_entrypoint(name).__module__]
    return getattr(module, "checkpoint_filter_fn", None)


def _fitted(net: nn.Module, state: dict[str, Any], translate: Any) -> Mapping[str, Any]:
    """The state as it is if it fits, otherwise translated."""
    if translate is None or not list_key_differences(net, state):
        return state
    try:
        return translate(dict(state), net)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return state  # of another network: loading lists all differences


def _classes(state: Mapping[str, Any], head: Any, classes: int) -> tuple[int, str] | None:
    """Classes of the network that a file holds and what to say of it; None where they are the usual."""
    weight = state.get(f"{head}.weight") if isinstance(head, str) else None
    if weight is None:
        none = isinstance(head, str) and classes and not any(key.startswith(f"{head}.") for key in state)
        return (0, ", which has no head") if none else None
    return None if len(weight) == classes else (len(weight), f", which has {len(weight)} classes")


# --------------------------------------------------------------------------------------------------------- torchvision


def _open_torchvision(name: str, image_size: int | None, weights: Path | None) -> _Found:
    known = [each for each in vision.list_models(module=vision) if each.startswith("vit_")]
    if name not in known:
        raise UsageError(f"torchvision has no Vision Transformer {name!r}; it has {', '.join(known)}")
    published: Any = vision.get_model_weights(name)
    preset: Any = published.DEFAULT
    if weights is not None:
        state = select_state(read_checkpoint(weights), source=str(weights))
        net = _torchvision_like(name, state)
        load_strict(net, state, source=str(weights))
        return _Found(net, str(weights), True, _of_torchvision(preset))
    for each in (preset, *published):
        if (file := hub_folder() / Path(urlparse(each.url).path).name).is_file():
            return _Found(vision.get_model(name, weights=each), f"torchvision's {each}: {file}", True,
                          _of_torchvision(each))  # fmt: skip
    why = f"torchvision has none of {name} on this machine, and --weights names none"
    return _Found(vision.get_model(name), _random(why), False, _of_torchvision(preset))


def _torchvision_like(name: str, state: Mapping[str, Any]) -> nn.Module:
    """The network whose size and number of classes a file has, if these can be read off it."""
    options: dict[str, Any] = {}
    if isinstance(head := state.get("heads.head.weight"), Tensor):
        options["num_classes"] = len(head)
    if isinstance(table := state.get("encoder.pos_embedding"), Tensor) and table.dim() == 3:
        patch = int(name.rpartition("_")[2])
        options["image_size"] = round((table.shape[1] - 1) ** 0.5) * patch
    return vision.get_model(name, **options)


def _of_torchvision(weights: Any) -> dict[str, Any]:
    preset = weights.transforms()
    return {
        "mean": tuple(preset.mean), "std": tuple(preset.std), "interpolation": preset.interpolation.value,
        "crop_ratio": preset.crop_size[0] / preset.resize_size[0], "source": f"torchvision's of {weights}",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- transformers

IMAGE_HALVES = {"CLIPModel": "CLIPVisionModel", "SiglipModel": "SiglipVisionModel"}
"""Networks of images and text -> the part that takes images."""


def _open_huggingface(name: str, image_size: int | None, weights: Path | None) -> _Found:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"hf:{name} needs transformers: pip install 'leanvit[huggingface]'") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        check_config(transformers.PreTrainedConfig.get_config_dict(name, local_files_only=True)[0])
        config: Any = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except UsageError:
        raise
    except Exception as error:  # transformers has its own kinds
        raise UsageError(
            f"hf:{name}: no folder with a config.json that transformers knows, and its cache has none of this name; "
            f"fetch it once with `hf download {name}`, or give a folder ({str(error).splitlines()[0]})"
        ) from error
    declared = str(config.architectures[0]) if isinstance(config.architectures, list) and config.architectures else ""
    named = getattr(transformers, IMAGE_HALVES.get(declared, declared), None)
    is_network = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    kind: Any = named if is_network else transformers.AutoModel
    if hasattr(config, "vision_config") and declared in IMAGE_HALVES:
        config = config.vision_config
    preprocessing = _of_huggingface(transformers, name)
    if weights is not None:
        state = select_state(read_checkpoint(weights), source=str(weights))
        with _quiet(transformers):
            net, info = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True,
                                             ignore_mismatched_sizes=True)  # fmt: skip
        if differences := _differences(info):
            lines = "\n".join(differences.lines())
            raise CheckpointError(f"{weights} does not fit {type(net).__name__}:\n{lines}")
        return _Found(net, str(weights), True, preprocessing)
    try:
        with _quiet(transformers):
            net, info = kind.from_pretrained(
                name, config=config, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except OSError:
        try:
            made = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
        except Exception as error:  # as many kinds as there are constructors
            raise UsageError(
                f"hf:{name} cannot be built by its config.json ({type(error).__name__}: {error})"
            ) from error
        return _Found(made, _random(f"{name} holds none, and --weights names none"), False, preprocessing)
    fresh = ", ".join(sorted(_differences(info).missing))
    text = f"those of {name}" + (f", which lacks {fresh}: these are random" if fresh else "")
    return _Found(net, text, True, preprocessing)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Generator[None]:
    """Without its report of loading: what does not fit is said here."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def _differences(info: Mapping[str, Any]) -> KeyDifferences:
    """What transformers tells of loading."""
    wrong = [(key, tuple(model), tuple(file)) for key, file, model in info.get("mismatched_keys", ())]
    missing, unexpected = (tuple(sorted(info.get(key, ()))) for key in ("missing_keys", "unexpected_keys"))
    return KeyDifferences(missing, unexpected, tuple(sorted(wrong)))


def _of_huggingface(transformers: Any, name: str) -> dict[str, Any]:
    """What the image processor beside the network says; nothing where there is none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError):
        return {}
    found: dict[str, Any] = {"source": f"the image processor of {name}"}
    if getattr(processor, "do_normalize", True):
        found |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    else:
        found |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    size, crop = processor.size, getattr(processor, "crop_size", None)
    edge = size.get("shortest_edge")
    if getattr(processor, "do_center_crop", False) and crop:
        side = (crop["height"], crop["width"])
        found |= {"size": side, "crop_ratio": min(1.0, side[0] / (edge or size["height"]))}
    elif edge is not None:
        found |= {"size": (edge, edge), "crop_ratio": 1.0}
    else:
        found |= {"size": (size["height"], size["width"]), "crop_ratio": 1.0, "crop_mode": "squash"}
    if (number := getattr(processor, "resample", None)) is not None:
        found["interpolation"] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(int(number), "bicubic")
    return found


# ----------------------------------------------------------------------------------------------------- SWAG and a file


def _open_swag(name: str, image_size: int | None, weights: Path | None) -> _Found:
    registry: Any = load("hourglass_swag.models:REGISTRY")
    dense = [
        key for key, entry in registry.items() if entry.method is None and entry.size in ("b16", "l16", "h14", "desk")
    ]
    if name not in dense:
        near = "has token methods already" if name in registry else f"is none of {', '.join(dense)}"
        raise UsageError(f"swag:{name} {near}; methods go to a dense network, such as swag:{dense[0]}")
    options = {} if image_size is None else {"image_size": image_size}
    create, file = load("hourglass_swag.models:create"), registry[name].weights
    said = {"crop_ratio": 1.0, "source": "SWAG's own"}
    converted = load("hourglass_swag.models.weights:TORCHVISION_FILES").get(file)
    cached = [hub_folder() / each for each in (file, converted) if each and (hub_folder() / each).is_file()]
    try:
        if weights is not None:
            return _Found(create(name, weights=weights, **options), str(weights), True, said)
        if cached:
            return _Found(create(name, pretrained=True, **options), f"SWAG's: {cached[0]}", True, said)
        text = _random(f"the cache has no {file or 'file'} ({hub_folder()}), and --weights names none")
        return _Found(create(name, **options), text, False, said)
    except ValueError as error:
        raise UsageError(f"swag:{name} cannot be built with --img-size {image_size}: {error}") from error


def _open_function(spec: str, image_size: int | None, weights: Path | None) -> _Found:
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"{spec}: there is no file {place}; expected FILE.py:FUNCTION that returns a network")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent.resolve()))  # as if the file were run
    try:
        found.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            near = _near(name, [key for key, value in vars(module).items() if callable(value)])
            raise UsageError(f"{spec}: {place} has no function {name!r}{near}")
        net = function()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file of the user raises
        raise UsageError(f"{spec} failed with {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(net, nn.Module):
        raise UsageError(f"{spec} returned a {type(net).__name__}, expected a network (torch.nn.Module)")
    if any(parameter.is_meta for parameter in find_host(net).net.parameters()):
        raise UsageError(f"{spec} returned a network without weights (on the meta device): expected one with them")
    text = f"as {spec} made them"
    if weights is not None:
        load_strict(net, select_state(read_checkpoint(weights), source=str(weights)), source=str(weights))
        text = str(weights)
    of_timm = hasattr(net, "pretrained_cfg")
    config = timm.data.resolve_model_data_config(net) if of_timm else None  # pyright: ignore[reportAttributeAccessIssue]
    return _Found(net, text, True, _of_timm(config) if config else None)


OPENERS = {"timm": _open_timm, "torchvision": _open_torchvision, "hf": _open_huggingface, "swag": _open_swag}

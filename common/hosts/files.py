"""A lean network in one safetensors file: the weights and, in the header, all that builds it again. No pickle.

    leanvit.save(fast, "fast.safetensors")
    fast = leanvit.load("fast.safetensors")

The header names what built the network (timm, torchvision, transformers or the SWAG registry, by its own words) and the
methods with their settings. ``save`` builds it anew from these words and compares every module, so that what cannot be
built is known then: such a file is opened with ``network=``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.hosts.host import Host, channels_of
from common.hosts.huggingface import ATTENTION, FAMILIES, check_config, dense_form
from common.hosts.network import METHODS, TOLERANCES, TRAINED, Lean, lean, make_method, method_class
from common.hosts.network import load as load_object
from common.hosts.runner import Method
from common.run.checkpoint import build_described, load_strict, read_described, save_described
from common.run.errors import CheckpointError, UsageError
from common.run.launch import choose_device
from common.run.program import get_logger

logger = get_logger(__name__)

KEY = "leanvit"
FORMAT = "leanvit lean network 1"
PARTS = {"format": str, "source": dict, "methods": list, "facts": dict, "dtype": str, "versions": dict}
"""What the header says, and in which type."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
DATA = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""Of timm's configuration of weights: how images become tensors."""
HEADS = (
    *(f"{name}ForImageClassification" for name in ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIP", "Siglip")),
    *("DeiTForImageClassificationWithTeacher", "CLIPVisionModelWithProjection"),
    *("ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"),
)
"""Classes of transformers that a file may name, besides the trunks."""
SWAG_OPTIONS = ("image_size", "num_classes", "classifier", "dropout_rate", "attention_dropout_rate")
OPTIONS = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}
"""Arguments of their constructors -> the part that is there if they are true."""


class Unknown(Exception):
    """Why it cannot be known how a network is built."""


# How a network is built, in words: each library reads them off a network and builds one of them


def _timm_words(net: Any) -> tuple[str, dict[str, Any]]:
    cfg = getattr(net, "pretrained_cfg", None) or {}
    if not cfg.get("architecture"):
        raise Unknown("it was not made by timm.create_model")
    arguments = dict(getattr(net, "_model_args", {}))  # timm keeps those of create_model since 1.0.31
    head = getattr(net, "head", None)
    arguments |= {
        "img_size": list(net.patch_embed.img_size),
        "in_chans": channels_of(net),
        "num_classes": head.out_features if isinstance(head, nn.Linear) else net.num_classes,
        "global_pool": net.global_pool,
    }
    arguments["pretrained_cfg_overlay"] = {key: cfg[key] for key in DATA if key in cfg}
    return cfg["architecture"], arguments


def _timm_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    if forbidden := {"pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg"} & set(arguments):
        raise UsageError(f"{min(forbidden)} is no argument of an architecture")
    if unknown := set(arguments.get("pretrained_cfg_overlay", {})) - set(DATA):
        raise UsageError(f"pretrained_cfg_overlay.{min(unknown)} is not known")
    if not timm.is_model(name):
        raise UsageError(f"timm {timm.__version__} has no network {name!r}")
    return timm.create_model(name, **_tuples(arguments))


def _tuples(value: Any) -> Any:
    """What JSON made lists of, as timm writes it."""
    if isinstance(value, Mapping):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _torchvision_words(net: Any) -> tuple[str, dict[str, Any]]:
    names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "dropout", "attention_dropout", "representation_size")
    head = getattr(net.heads, "head", None)
    layers = net.encoder.layers
    return "VisionTransformer", {
        **{name: getattr(net, name) for name in names},
        "num_layers": len(layers),
        "num_heads": layers[0].num_heads,
        "num_classes": head.out_features if isinstance(head, nn.Linear) else net.num_classes,
    }


def _torchvision_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import VisionTransformer

    if name != "VisionTransformer":
        raise UsageError(f"torchvision's class must be VisionTransformer, got {name!r}")
    return VisionTransformer(**arguments)


def _transformers_words(net: Any) -> tuple[str, dict[str, Any]]:
    known = inspect.signature(type(net).__init__).parameters
    parts = {name: module for name, module in OPTIONS.items() if name in known}
    options = {name: _part(net, path) is not None for name, path in parts.items()}
    return type(net).__name__, {
        "config": json.loads(net.config.to_json_string(use_diff=False)),
        "attention": net.config._attn_implementation,
        "options": options,
    }


def _part(net: Any, path: str) -> Any:
    for name in path.split("."):
        net = getattr(net, name, None)
    return net


def _transformers_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if name not in (*FAMILIES, *HEADS):
        raise UsageError(f"{name!r} is none of the classes that a file may name: {', '.join((*FAMILIES, *HEADS))}")
    attention, options = arguments["attention"], arguments["options"]
    if attention not in ATTENTION:
        raise UsageError(f"attention must be {' or '.join(ATTENTION)}, got {attention!r}")
    check_config(arguments["config"])
    if unknown := set(options) - set(OPTIONS):
        raise UsageError(f"options.{min(unknown)} is not known")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UsageError("it is a network of transformers: pip install 'leanvit[huggingface]'") from error
    kind: Any = getattr(transformers, name)
    config = kind.config_class.from_dict(dict(arguments["config"]), attn_implementation=attention)
    return kind(config, **options)


def _swag_words(net: Any) -> tuple[str, dict[str, Any]]:
    registry = load_object("hourglass_swag.models:REGISTRY")
    sizes = load_object("hourglass_swag.models.vision_transformer:SIZES")
    for name, entry in registry.items():
        shape = sizes[entry.size].kwargs() if entry.method is None and entry.size in sizes else {}
        shape.pop("conv_stem_layers", None)
        if shape and all(getattr(net, key) == value for key, value in shape.items()):
            return name, {key: getattr(net, key) for key in SWAG_OPTIONS}
    raise Unknown("its size is none of the registry's")


def _swag_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if unknown := set(arguments) - set(SWAG_OPTIONS):
        raise UsageError(f"{min(unknown)} is no argument of an architecture")
    return load_object("hourglass_swag.models:create")(name, **arguments)


LIBRARIES: Mapping[str, tuple[Callable[..., tuple[str, dict[str, Any]]], Callable[..., nn.Module]]] = {
    "timm": (_timm_words, _timm_network),
    "torchvision": (_torchvision_words, _torchvision_network),
    "transformers": (_transformers_words, _transformers_network),
    "hourglass_swag": (_swag_words, _swag_network),
}
"""Package that a network's class is in -> words of a network, network of the words."""


def _build(library: str, name: str, arguments: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The network of these words, with random weights; random numbers of others stay what they are."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return LIBRARIES[library][1](name, arguments).to(dtype).eval()


def _describe_source(net: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """What builds a network, and nothing but it; the reason under ``unknown`` where that cannot be said."""
    kind = f"{type(net).__module__}.{type(net).__qualname__}"
    library = next((base.__module__.partition(".")[0] for base in type(net).__mro__
                    if base.__module__.partition(".")[0] in LIBRARIES), None)  # fmt: skip
    try:
        if library is None:
            raise Unknown("its class belongs to no library that is known")
        name, arguments = LIBRARIES[library][0](net)
        try:
            arguments = json.loads(json.dumps(arguments))
            again = _build(library, name, arguments, dtype)
        except Exception as error:  # as many kinds as there are constructors
            raise Unknown(f"{library}'s {name} cannot be built with its arguments: {error}") from error
        for (place, one), (_, other) in zip(_anatomy(net), _anatomy(again), strict=False):
            if not _equal(one, other):
                raise Unknown(f"{library}'s {name} is built otherwise: {place}")
        if len(list(_anatomy(net))) != len(list(_anatomy(again))):
            raise Unknown(f"{library}'s {name} is built with other parts")
    except Unknown as reason:
        return {"library": None, "name": kind, "unknown": str(reason)}
    return {"library": library, "name": name, "arguments": arguments}


def _anatomy(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that tells a network from another but its weights: classes, plain attributes, shapes, other buffers."""
    kept = net.state_dict().keys()
    for name, module in net.named_modules(remove_duplicate=False):
        yield f"{name or 'the network'} is a {type(module).__name__}", type(module)
        for key in sorted(vars(module)):
            value = vars(module)[key]
            plain = isinstance(value, (bool, int, float, str, type(None)))
            if plain and not key.startswith("_") and key not in ("training", "num_classes"):
                yield f"{name}.{key} is {value!r}".removeprefix("."), value
    for name, parameter in net.named_parameters(remove_duplicate=False):
        yield f"{name} is {list(parameter.shape)}", (name, parameter.shape)
    for name, buffer in net.named_buffers(remove_duplicate=False):
        yield f"{name} has other values", (name, buffer.shape if name in kept else buffer.detach().cpu())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return all(map(_equal, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


# The file


def save(fast: Any, path: str | os.PathLike[str]) -> Path:
    """Write a lean network; the file is at every moment the old one or the whole new one.

    Args:
        fast: what ``lean`` gave, in whatever way its weights came to be.
        path: of the file; ``.safetensors`` is added where it lacks.

    Returns:
        The file. A warning says where it can only be opened with ``load(file, network=...)``.

    Raises:
        UsageError: if this is no lean network, or a method is not one of ``leanvit``.
        CheckpointError: naming a weight that is not finite or of another precision than the others.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    if not isinstance(fast, Lean):
        raise UsageError(f"expected a network of leanvit.lean, got a {type(fast).__name__}")
    if not fast.plan.restores:
        raise UsageError("a published network, or one patched in place, is not written: take leanvit.lean of the dense")
    host: Host = fast.plan.host
    methods = [_describe_method(method, host) for method in fast.methods]
    dense: nn.Module = dense_form(fast)
    learned = nn.ModuleDict({name: module for method in fast.methods for name, module in method.weights.items()})
    state = {  # clones: some may share memory, which safetensors refuses
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in {**dense.state_dict(), **learned.state_dict()}.items()
    }
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    _check_tensors(path, state, dtype)
    source = _describe_source(dense, dtype)
    packages = ("torch", *([] if source["library"] in (None, "hourglass_swag") else [source["library"]]))
    description = {
        "format": FORMAT,
        "source": source,
        "methods": methods,
        "facts": _facts(host),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    if source["library"] is None:
        logger.warning(
            "%s: how a %s is built cannot be written (%s): build it yourself, and open the file with "
            "leanvit.load(%r, network=net)", path, source["name"], source["unknown"], str(path),
        )  # fmt: skip
    save_described(path, state, KEY, json.dumps(description))
    return path


def load(
    path: str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> Any:
    """The lean network of a file of ``save``, in evaluation mode.

    Args:
        path: of the file.
        network: takes the weights in place of one that is built anew; for networks that no library builds.
        device: where it goes.
        verify: as in ``lean``.

    Raises:
        CheckpointError: naming the file, and the key of its header or the weight that is missing, unknown or damaged.
        UsageError: for a network that is none.
        LaunchError: for a device that is not there.
    """
    path, device = Path(path), choose_device(str(device))
    if network is not None and not isinstance(network, nn.Module):
        raise UsageError(f"network: expected a network (torch.nn.Module), got {network!r}")
    content, state = read_described(path, KEY)
    if content is None:
        raise CheckpointError(f"{path}: its header has no {KEY!r}: expected a file of leanvit.save")
    _check_parts(path, content, PARTS)
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format: expected {FORMAT!r}, got {content['format']!r}")
    if content["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: dtype: expected one of {', '.join(DTYPES)}, got {content['dtype']!r}")
    dtype, source = DTYPES[content["dtype"]], content["source"]
    methods = [_read_method(path, index, each) for index, each in enumerate(content["methods"])]
    if network is None:
        network = _read_source(path, source, dtype, state)
    _check_tensors(path, state, dtype)
    try:
        methods = [_with_weights(path, method, state, dtype, device) for method in methods]
        load_strict(network.to(dtype), state, source=path)
        fast = lean(network.to(device).eval(), *methods, verify=verify)
    except (CheckpointError, UsageError) as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path} ')}{_other_versions(content)}") from error
    for key, value in _facts(fast.plan.host).items():
        if key not in content["facts"] or content["facts"][key] != value:
            raise CheckpointError(
                f"{path}: facts.{key}: the file was written of {content['facts'].get(key)!r}, the network built of it "
                f"has {value!r}{_other_versions(content)}"
            )
    _check_names(path, "facts", content["facts"], _facts(fast.plan.host))
    return fast


def _read_source(path: Path, source: Mapping[str, Any], dtype: torch.dtype, state: Mapping[str, Tensor]) -> nn.Module:
    """The network that a file names, with random weights."""
    if "unknown" in source:
        _check_names(path, "source", source, ("library", "name", "unknown"))
        raise CheckpointError(
            f"{path}: source: how the {source['name']} is built is not in the file ({source['unknown']}): build it, "
            f"and open the file with leanvit.load({str(path)!r}, network=net)"
        )
    _check_names(path, "source", source, ("library", "name", "arguments"))
    library, name, arguments = (source[key] for key in ("library", "name", "arguments"))
    if not isinstance(library, str) or library not in LIBRARIES:
        raise CheckpointError(f"{path}: source.library: expected one of {', '.join(LIBRARIES)}, got {library!r}")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: source: expected a name and arguments, got {name!r} and {arguments!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            network = build_described(lambda: LIBRARIES[library][1](name, arguments), arguments, state)
        return network.to(dtype).eval()
    except Exception as error:  # as many kinds as there are constructors
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: source: {library}'s {name} cannot be built: {found}") from error


def _describe_method(method: Method, host: Host) -> dict[str, Any]:
    """A resolved method as its name and Python literals."""
    fields = dataclasses.fields(cast(Any, method))
    description = {
        "name": method.name,
        "settings": {field.name: repr(getattr(method, field.name)) for field in fields},
    }
    if method_class(method.name) is not type(method):
        known = ", ".join((*METHODS, *TRAINED))
        raise UsageError(f"{type(method).__name__} is none of the methods that a file can name: {known}")
    again = _read_method(Path(), 0, description).with_weights(method.weights).resolve(host.facts)
    assert again == method, f"{again} is not {method}"
    return description


def _read_method(path: Path, index: int, content: Any) -> Method:
    where = f"{path}: methods[{index}]"
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a name and settings, got {content!r}")
    _check_names(path, f"methods[{index}]", content, ("name", "settings"))
    try:
        settings = {key: ast.literal_eval(value) for key, value in content["settings"].items()}
        return make_method(content["name"], settings)
    except (AttributeError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _with_weights(
    path: Path, method: Method, state: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Method:
    """The method with what it has learned, which is taken out of the state."""
    own = {key: state.pop(key) for key in list(state) if key.partition(".")[0] in method.learned}
    if not method.learned:
        return method
    try:
        modules = nn.ModuleDict(dict(method.build_weights(own)))
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]}, a weight of {method.name}, is missing") from error
    load_strict(modules.to(dtype), own, source=path)
    return method.with_weights(dict(modules.to(device).eval().items()))


def _facts(host: Host) -> dict[str, Any]:
    """What methods know of the host, as JSON has it."""
    facts = dataclasses.asdict(host.facts)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def _check_parts(path: Path, content: Mapping[str, Any], parts: Mapping[str, type]) -> None:
    for key, kind in parts.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(f"{path}: {key}: expected a {kind.__name__}, got {content.get(key)!r}")
    _check_names(path, "", content, parts)


def _check_names(path: Path, where: str, content: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> None:
    where = f"{where}." if where else ""
    for key in content:
        if key not in known:
            raise CheckpointError(f"{path}: {where}{key} is not known: was the file written by a later version?")
    for key in known:
        if key not in content:
            raise CheckpointError(f"{path}: {where}{key} is missing: the file is damaged, write it anew")


def _check_tensors(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        if value.dtype != dtype:
            raise CheckpointError(f"{path}: {key} is {value.dtype}, expected {dtype}: a file has one precision")
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds a value that is not finite")


def _other_versions(content: Mapping[str, Any]) -> str:
    """A remark on the libraries' versions where they are not those of the file."""
    changed = []
    for name, written in content["versions"].items():
        try:
            here = importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError):  # the latter for no name at all
            here = "none"
        if here != written:
            changed.append(f"{name} {written}, here is {here}")
    return f" (written with {'; '.join(changed)})" if changed else ""

"""Filling, noise and forward passes of the reference vectors."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor

from common.tests import reference
from common.tests.reference import Case, Checks, NotCovered
from uvc.models import MODELS, create
from uvc.models.deit import GatedDeiT
from uvc.models.gates import GatedTransformer
from uvc.models.t2t_vit import GatedT2TViT
from uvc.tests.plain_vit import PlainViT


@contextlib.contextmanager
def replay(seed: int) -> Iterator[list[tuple[int, ...]]]:
    """Answer every ``Tensor.exponential_`` in order with -log(Phi(n)), n = array("noise-<k>", shape, seed).

    Gives the list of shapes asked for so far.
    """
    draws: list[tuple[int, ...]] = []
    original = torch.Tensor.exponential_

    def scripted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = tuple(self.shape)
        normal = torch.from_numpy(np.asarray(reference.array(f"noise-{len(draws)}", shape, seed)))
        draws.append(shape)
        with torch.no_grad():
            return self.copy_(-torch.log(torch.special.ndtr(normal)).to(self.dtype))

    torch.Tensor.exponential_ = scripted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield draws
    finally:
        torch.Tensor.exponential_ = original  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Double precision for everything built inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The named normal numbers as a tensor."""
    return torch.from_numpy(np.asarray(reference.array(name, shape, seed)))


def images_of(case: Case) -> Tensor:
    """The images that the text of a case draws, by ``fill.image`` or ``fill.array``."""
    return torch.as_tensor(case.read())


NUMBER = r"\d*\.?\d+(?:e[+-]?\d+)?"
"""A number in a text; a full stop behind it is not of it."""


# Models

_TAKEN = {
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "num_classes",
    "mlp_ratio",
    "qkv_bias",
}
_SETTINGS = {"factory", "norm_layer", "drop_rate", "attn_drop_rate", "drop_path_rate", "gumbel_hard", "enable_dist"}
_T2T_TAKEN = (_TAKEN - {"patch_size"}) | {"token_dim"}
_T2T_SETTINGS = (_SETTINGS - {"enable_dist"}) | {"tokens_type", "qk_scale"}
_NEUTRAL = (None, False, 0, "GELU", "GELU()")


def options_of(made: dict[str, Any], taken: set[str], settings: set[str]) -> dict[str, Any]:
    """Arguments of a network out of a build; one that it knows nothing of must be without effect."""
    strange = sorted(key for key in made.keys() - taken - settings if made[key] not in _NEUTRAL)
    if strange:
        raise NotCovered(f"build arguments {', '.join(strange)}")
    if any(made.get(name) for name in ("drop_rate", "attn_drop_rate")):
        raise NotCovered("dropout in the backbone")
    options = {key: value for key, value in made.items() if key in taken}
    if isinstance(options.get("img_size"), list):
        options["img_size"] = tuple(options["img_size"])
    if found := re.search(rf"eps=({NUMBER})", str(made.get("norm_layer", ""))):
        options["norm_eps"] = float(found[1])
    return options


def build_model(case: Case, *, seed: int | None = None) -> GatedTransformer:
    """The gated DeiT or T2T-ViT of a case: filled, with its gates set."""
    made = dict(case.build)
    seed = case.seed if seed is None else seed
    factory = made.pop("factory", None)
    if factory == "T2T_ViT":
        if made.get("tokens_type", "performer") != "performer":
            raise NotCovered("token stages other than the Performer")
        options = options_of(made, _T2T_TAKEN, _T2T_SETTINGS)
        model = reference.build(GatedT2TViT, seed, scale=made.get("qk_scale"), **options)
    elif factory == "DistilledVisionTransformer":
        options = options_of(made, _TAKEN, _SETTINGS)
        model = reference.build(GatedDeiT, seed, distilled=bool(made.get("enable_dist")), **options)
    elif factory in MODELS:
        model = reference.build(create, seed, name=factory)
    else:
        raise NotCovered(f"the model {factory}")
    assert isinstance(model, GatedTransformer)
    model.gates.hard = bool(made.get("gumbel_hard", False))
    set_gates(model, case.raw.get("gates"))
    return model


def set_gates(model: GatedTransformer, gates: list[list[float]] | None) -> None:
    """The gates of a case, or those that the folder's rules give for none."""
    depth = len(model.blocks)
    rows = gates if gates is not None else [[-0.6 - 0.1 * i, 0.6 + 0.1 * i] for i in range(depth)]
    with torch.no_grad():
        model.block_skip_gating.copy_(torch.tensor(rows, dtype=torch.float64))


def mac_rows(model: GatedTransformer, batch: int) -> np.ndarray:
    """(L, 6), rows of -1 where a block is skipped."""
    runs = [True] * len(model.blocks) if model.gates.block_gating else model.runs()
    return np.array([model.block_macs(batch) if run else (-1,) * 6 for run in runs])


def draw_rows(draws: list[tuple[int, ...]]) -> np.ndarray:
    """Shapes of the draws as an array, padded with zeros."""
    width = max((len(shape) for shape in draws), default=0)
    return np.array([[*shape, *[0] * (width - len(shape))] for shape in draws])


def run_model(case: Case, checks: Checks) -> None:
    """A forward pass in the gate, patch and token mode that the case's name and text say."""
    model, raw, what = build_model(case), case.raw, str(case.raw.get("what", ""))
    images = images_of(case)
    t2t = isinstance(model, GatedT2TViT)
    settings = model.gates
    train = bool(re.search(r"train(ing)? (mode|forward)", what)) or case.name.endswith("_train")
    if re.search(r"enable_warmup\s*=\s*1", what) or "warmup" in case.name:
        settings.block_gating, settings.warmup = True, True
    elif re.search(r"use_gumbel\s*=\s*0", what) or "softl0" in case.name:
        settings.block_gating, settings.mode = True, "soft_l0"
        settings.eps = float(raw.get("eps", settings.eps))
    elif "use_gumbel false" in what or "softmax" in case.name:
        settings.block_gating, settings.mode = True, "softmax"
    elif re.search(r"use_gumbel\s*=\s*1", what) or "gumbel" in case.name or "soft Gumbel gates" in what:
        settings.block_gating, settings.mode = True, "gumbel"
    settings.jumping = "jumping" in case.name or bool(re.search(r"enable_jumping\s*=\s*1", what))
    if "patch_hard" in raw:
        model.add_patch_gates()
        assert model.patch_gating is not None
        shape = tuple(model.patch_gating.shape)
        with torch.no_grad():
            model.patch_gating.copy_(1.5 * tensor("patch_gating", shape, case.seed))
        settings.patch = "hard" if raw["patch_hard"] else "soft"
    tau, ratio = float(raw.get("tau", -1.0)), float(raw.get("ratio", 0.9))
    if found := re.search(rf"token selection \(tau ({NUMBER}), ratio ({NUMBER})\)", what):
        tau, ratio = float(found[1]), float(found[2])
    model.train(train)
    gradients = any(name.startswith("grad") for name in case.outputs)
    noise = replay(int(raw["noise_seed"])) if "noise_seed" in raw else contextlib.nullcontext([])
    with torch.set_grad_enabled(gradients), noise as draws:
        features = model.forward_features(images, tau, ratio) if not gradients else None
        if features is not None and draws:  # the same noise again for the pass that is compared
            draws.clear()
        result = model(images, tau, ratio)
    outputs = {"draws": draw_rows(draws), "macs_embed": np.array(model.embed_macs(len(images)))}
    outputs["macs_blocks"] = mac_rows(model, len(images))
    if features is not None:
        outputs |= {f"feature_token{index}": features[:, index] for index in range(features.shape[1])}
    if isinstance(result, tuple):
        outputs |= {"logits": result[0], "logits_dist": result[1]}
        if t2t:
            outputs["logits_dist"] = result[1]
    else:
        outputs["logits"] = result
    if gradients:
        logits = result[0] if isinstance(result, tuple) else result
        target = tensor("targets", tuple(logits.shape), case.seed).softmax(-1)
        loss = SoftTargetCrossEntropy()(logits, target)
        loss.backward()
        weights = dict(model.named_parameters())
        outputs |= {"loss": loss, "grad_gates": model.block_skip_gating.grad}
        outputs |= {f"grad:{name}": weight.grad for name, weight in weights.items()}
        if "gumbel.weight" in weights:
            outputs["grad_gumbel"] = weights["gumbel.weight"].grad
    for name in case.outputs:
        if name not in outputs:
            raise NotCovered(f"output {name} of a model")
        checks.output(name, outputs[name])


def run_plain_vit(case: Case, checks: Checks) -> None:
    """The ViT-* family; its sizes are in the text of the case."""
    what = str(case.raw.get("what", ""))

    def number(pattern: str) -> int:
        found = re.search(pattern, what)
        if not found:
            raise NotCovered(f"a ViT-* whose text lacks {pattern!r}")
        return int(found[1])

    images = images_of(case)
    classes = checks.stored[f"{case.name}/logits"].shape[-1]
    model = reference.build(
        PlainViT, case.seed, img_size=tuple(images.shape[-2:]), patch_size=number(r"patch (\d+)"),
        hidden_size=number(r"hidden (\d+)"), num_layers=number(r"(\d+) layers?"), num_heads=number(r"(\d+) heads?"),
        mlp_dim=number(r"mlp (\d+)"), num_classes=classes,
    )  # fmt: skip
    with torch.no_grad():
        logits, attention = model(images)
    for name in case.outputs:
        found = re.fullmatch(r"attn_(last|\d+)", name)
        if name != "logits" and not found:
            raise NotCovered(f"output {name} of a ViT-*")
        checks.output(name, attention[-1 if found[1] == "last" else int(found[1])] if found else logits)

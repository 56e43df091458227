"""Run a folder of reference vectors of this paper: ``python -m scala.tests.cases DIR``.

A case says what it builds; :func:`find_runner` chooses the function by that. Each reads configuration, input and
outputs from the case, so that other sizes, ratios and seeds run as well.
"""

import ast
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import reference
from common.flops import CONVENTIONS, OpCounts, count_executed_macs, count_parameters
from common.reference import Case, Checks, NotCovered, Runner
from scala import models_scala
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "VisionTransformer_scala": VisionTransformer_scala,
    "DistilledVisionTransformer_scala": DistilledVisionTransformer_scala,
}
MODULES: dict[str, Callable[..., nn.Module]] = {
    name: getattr(models_scala, name) for name in ("Attention", "Mlp", "Block", "LayerScale", "PatchEmbed")
}


def is_official(case: Case) -> bool:
    """Whether the case holds what the official code does against the paper."""
    return case.raw.get("variant") == "official quirk"


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of what the case builds."""
    kwargs = dict(case.build["kwargs"])
    if isinstance(kwargs.get("img_size"), list):
        kwargs["img_size"] = tuple(kwargs["img_size"])
    if isinstance(text := kwargs.get("norm_layer"), str):
        eps = re.fullmatch(r"LayerNorm(?:\(eps=([\d.e-]+)\))?", text)
        if not eps:
            raise NotCovered(f"norm_layer {text}")
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=float(eps[1])) if eps[1] else nn.LayerNorm
    return kwargs


def build_network(case: Case, **more: Any) -> Any:
    """The network of a case, float64, evaluation mode, filled with its seed."""
    kwargs = options(case) | more
    if "factory" in case.build:
        return reference.build(models_scala.FACTORIES[case.build["factory"]], case.seed, **kwargs)
    name = case.build["cls"]
    if is_official(case):
        kwargs["official_layer_scale"] = True
        if name.startswith("Distilled"):
            kwargs["official_anchors"] = True
    return reference.build(NETWORKS[name], case.seed, **kwargs)


def read_images(case: Case) -> Tensor:
    """The pictures that a case describes."""
    images = case.read()
    return images if isinstance(images, Tensor) else torch.from_numpy(images)


def split_name(name: str) -> tuple[str, float]:
    """``logits@0.25`` to ``logits`` and 0.25."""
    kind, _, ratio = name.partition("@")
    return kind, float(ratio)


@torch.no_grad()
def run_network(case: Case, checks: Checks) -> None:
    """A whole network at every width: logits, both logits, features."""
    model = build_network(case)
    training = case.raw.get("mode") == "train"
    model.train(training)
    images = read_images(case)
    for ratio in case.raw["ratios"]:
        features = model.forward_features(images, ratio)
        known: dict[str, Any] = {}
        if isinstance(model, DistilledVisionTransformer_scala):
            known = {"feat_cls": features[0], "feat_dist": features[1]}
        else:
            known["features"] = features
        result = model(images, ratio)
        known |= {"cls": result[0], "dist": result[1]} if training and len(result) == 2 else {"logits": result}
        for name in case.outputs:
            kind, at = split_name(name)
            if at == ratio:
                if kind not in known:
                    raise NotCovered(f"output {name} of a network")
                checks.output(name, known[kind])


@torch.no_grad()
def run_module(case: Case, checks: Checks) -> None:
    """A single sliced module."""
    kwargs = options(case)
    if case.build["cls"] == "LayerScale":
        kwargs["official"] = is_official(case)
    module = reference.build(MODULES[case.build["cls"]], case.seed, **kwargs)
    drawn = re.search(r"fill\.array\('(\w+)', shape(?:, seed=(\d+))?\)", case.text)
    listed = re.search(r"shapes (\{.*\})", case.text)
    if not drawn or not listed:
        raise NotCovered(f"an input described as {case.text!r}")
    shapes: dict[float, list[int]] = ast.literal_eval(listed[1])
    seed = int(drawn[2]) if drawn[2] else case.seed
    for name in case.outputs:
        _, ratio = split_name(name)
        x = torch.from_numpy(reference.array(drawn[1], shapes[ratio], seed))
        checks.output(name, module(x, ratio))


def run_gradients(case: Case, checks: Checks) -> None:
    """Which entries each width touches."""
    model = build_network(case).train()
    images = read_images(case)
    for ratio in sorted({split_name(name)[1] for name in case.outputs}):
        model.zero_grad()
        result = model(images, ratio)
        first, second = result if isinstance(result, tuple) else (result, torch.zeros(()))
        (first.square().sum() + 2 * second.square().sum()).backward()
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in model.named_parameters()
        }
        rows, columns = gradients["blocks.0.attn.qkv.weight"].nonzero().T
        known = {
            "nonzero": np.asarray([int(value.count_nonzero()) for value in gradients.values()]),
            "grad_norm": torch.stack([value.norm() for value in gradients.values()]),
            "qkv_rows": np.asarray([int(side) for at in (rows, columns) for side in (at.min(), at.max() + 1)]),
        }
        for name in case.outputs:
            kind, at = split_name(name)
            if at == ratio and kind == "nonzero":
                compare_support(case, checks, name, dict(zip(gradients, known[kind].tolist(), strict=True)))
            elif at == ratio:
                checks.output(name, known[kind])


def compare_support(case: Case, checks: Checks, name: str, found: dict[str, int]) -> None:
    """Non-zero entries per parameter. Of the fused bias only two thirds are certain.

    A bias of the keys shifts all scores of a query alike, so that its gradient is zero but for rounding, and how many
    of those d entries round to exactly zero depends on the order of additions.
    """
    checks.compared.add(name)
    stored = checks.stored[f"{case.name}/{name}"].tolist()
    checks.equal(f"number of parameters in {name}", len(found), len(stored))
    for (weight, count), want in zip(found.items(), stored, strict=False):
        if weight.endswith("attn.qkv.bias"):
            width = found[weight.replace("qkv", "proj")]
            if not 2 * width <= count <= 3 * width:
                checks.fail(f"{name} of {weight} is {count}, expected {2 * width} to {3 * width}")
        else:
            checks.equal(f"{name} of {weight}", count, want)


def run_cost(case: Case, checks: Checks) -> None:
    """Cost of every width: the analytic count, and multiply-accumulates equal to those executed."""
    with torch.device("meta"):
        model: Any = models_scala.FACTORIES[case.build["factory"]](**options(case)).eval()
    checks.equal("params", count_parameters(model), case.raw["params"])
    by_operator = {"conv": "conv", "layer_norm": "layer_norm", "linear": "linear", "matmul": "matmul"}
    for ratio, width, total, active in case.raw["rows"]:
        counts: OpCounts = model.count_ops(ratio)
        checks.equal(f"width at {ratio}", int(ratio * model.embed_dim), width)
        checks.equal(f"FLOPs at {ratio}", CONVENTIONS["fvcore"].total(counts), total)
        checks.equal(f"active parameters at {ratio}", model.count_parameters(ratio), active)
    full = CONVENTIONS["fvcore"].by_kind(model.count_ops(1.0))
    for name, value in case.raw.get("flops_by_operator_at_full_width", {}).items():
        checks.equal(f"{name} at full width", full[by_operator[name]], value)
    ratio = case.raw["rows"][0][0]
    images = torch.empty(1, 3, *model.patch_embed.img_size, device="meta")
    checks.equal("executed MACs", count_executed_macs(AtRatio(model, ratio), images), model.count_ops(ratio).macs)


class AtRatio(nn.Module):
    """A network at a fixed width."""

    def __init__(self, model: nn.Module, ratio: float) -> None:
        super().__init__()
        self.model, self.ratio = model, ratio

    def forward(self, images: Tensor) -> Any:
        return self.model(images, self.ratio)


def find_runner(case: Case) -> Runner:
    """The function that runs a case.

    Raises:
        NotCovered: nothing here is meant to run it.
    """
    build, raw = case.build, case.raw
    if build.get("cls") in MODULES:
        return run_module
    if "factory" in build and "rows" in raw:
        return run_cost
    if build.get("cls") in NETWORKS or build.get("factory") in models_scala.MODELS:
        if any(name.startswith("nonzero@") for name in case.outputs):
            return run_gradients
        if "ratios" in raw:
            return run_network
    raise NotCovered(f"no runner for {build.get('cls') or build.get('factory') or sorted(build)}")


def main(argv: list[str] | None = None) -> int:
    """Command line; see ``common.reference.main``."""
    return reference.main(find_runner, argv, program="python -m scala.tests.cases")


if __name__ == "__main__":
    sys.exit(main())

"""Run a folder of reference vectors of this paper: ``python -m scala.tests.cases DIR``.

A case says what it builds; :func:`find_runner` chooses the function by that. Each reads configuration, input and
outputs from the case, so that other sizes, ratios and seeds run as well.
"""

import ast
import operator
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common.data.loaders import RepeatedSampler, eval_transform
from common.losses import DistillationLoss
from common.measure.flops import CONVENTIONS, OpCounts, count_parameters
from common.run.build import build_optimizer
from common.run.engine import Optimization
from common.run.settings import OptimizerSettings
from common.tests import reference
from common.tests.reference import Case, Checks, NotCovered, Runner
from scala import models_scala
from scala.arguments import TOKENS, CosineSettings
from scala.engine_scala import LaggingSchedule, ScaleCoordination, draw_widths, evaluate_width
from scala.losses import ScalaLosses
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala
from scala.slicing import make_grid
from scala.weights import load_for_finetuning

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
    """The images that a case describes."""
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
    model.train(case.raw.get("mode") == "train")
    images = read_images(case)
    for ratio in case.raw["ratios"]:
        features = model.forward_features(images, ratio)
        known: dict[str, Any] = {}
        if isinstance(model, DistilledVisionTransformer_scala):
            known = {"feat_cls": features[0], "feat_dist": features[1]}
        else:
            known["features"] = features
        result = model(images, ratio)
        known |= {"cls": result[0], "dist": result[1]} if isinstance(result, tuple) else {"logits": result}
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
    """Cost of every width: operations and parameters."""
    with torch.device("meta"):
        make = models_scala.FACTORIES[name] if (name := case.build.get("factory")) else NETWORKS[case.build["cls"]]
        model: Any = make(**options(case)).eval()
    checks.equal("params", count_parameters(model), case.raw["params"])
    by_operator = {"conv": "conv", "layer_norm": "layer_norm", "linear": "linear", "matmul": "matmul"}
    for ratio, width, total, active in case.raw["rows"]:
        counts: OpCounts = model.count_ops(ratio)
        checks.equal(f"width at {ratio}", int(ratio * model.embed_dim), width)
        checks.equal(f"FLOPs at {ratio}", CONVENTIONS["fvcore"].total(counts), total)
        checks.equal(f"active parameters at {ratio}", model.count_parameters(ratio), active)
    full = CONVENTIONS["fvcore"].by_kind(model.count_ops(1.0))
    for name, value in case.raw.get("flops_by_operator_at_full_width", {}).items():
        if name not in by_operator:
            raise NotCovered(f"operator {name} of a cost")
        checks.equal(f"{name} at full width", full[by_operator[name]], value)


def run_distillation(case: Case, checks: Checks) -> None:
    """DeiT's loss of given logits."""
    drawn = {
        name: torch.from_numpy(reference.array(name, read_shape(case.text), case.seed))
        for name in ("cls", "dist", "teacher", "target")
    }
    build = case.build

    factor = re.search(r"teacher=([\d.]+)\*", case.text)

    class Teacher(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (float(factor[1]) if factor else 1.0) * drawn["teacher"]

    base = SoftTargetCrossEntropy()
    loss = DistillationLoss(base, Teacher(), build["distillation_type"], build["alpha"], build["tau"])
    outputs = (drawn["cls"], drawn["dist"])
    checks.output("loss", loss(torch.zeros(1), outputs, drawn["target"].softmax(1)))


def read_shape(text: str) -> tuple[int, ...]:
    """The shape of the first array that a text draws."""
    found = re.search(r"fill\.array\('\w+',\s*(\([\d, ]+\))", text)
    if not found:
        raise NotCovered(f"an input described as {text!r}")
    return ast.literal_eval(found[1])


CRITERIA: dict[str, Callable[[], nn.Module]] = {
    "soft-target CE": SoftTargetCrossEntropy,
    "CE": nn.CrossEntropyLoss,
    "BCE with logits": nn.BCEWithLogitsLoss,
}


def build_teacher(case: Case, text: str | None, pixels: int) -> nn.Module | None:
    """The external teacher of a step: one linear layer of the pixels."""
    if text is None:
        return None
    found = re.search(r"Linear named (\w+); fill_ with seed (\d+)", text)
    if not found:
        raise NotCovered(f"a teacher described as {text!r}")
    inner = nn.Sequential()
    inner.add_module(found[1], nn.Linear(pixels, case.build["kwargs"]["num_classes"], dtype=torch.float64))
    reference.fill_(inner, int(found[2]))
    return nn.Sequential(nn.Flatten(1), inner).eval()


def build_criterion(case: Case, settings: dict[str, Any], pixels: int) -> nn.Module:
    """Loss of the largest width."""
    teacher = build_teacher(case, case.build.get("teacher"), pixels)
    base = CRITERIA[case.build["criterion"]]()
    kind = settings.get("distillation_type", "none")
    return DistillationLoss(base, teacher, kind, settings.get("alpha", 0.5), settings.get("tau", 1.0))


def step_batch(case: Case, index: int) -> tuple[Tensor, Tensor]:
    """Images and targets of one step."""
    described = case.raw["input"]
    shape = re.search(r"batch (\d+), size (\d+|\(\d+, \d+\)), seed=([^,)]+)", described["images"])
    target = re.search(
        r"(?:(softmax)\(([\d.]+)\*)?fill\.array\('(\w+)', (\([\d, ]+\)), seed=([^)]+)\)", described["targets"]
    )
    if not shape or not target:
        raise NotCovered(f"an input described as {described}")
    seed, image_seed = (reference.evaluate_text(text, {"i": index}) for text in (target[5], shape[3]))
    images = reference.image(int(shape[1]), ast.literal_eval(shape[2]), image_seed)
    numbers = torch.from_numpy(reference.array(target[3], ast.literal_eval(target[4]), seed))
    return images, (float(target[2]) * numbers).softmax(1) if target[1] else numbers.argmax(1)


def case_optimizer(model: nn.Module, described: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimiser of a step; AdamW as the command line builds it."""
    if described["kind"] == "sgd":
        given = {name: described[name] for name in ("momentum", "weight_decay", "nesterov") if name in described}
        return torch.optim.SGD(model.parameters(), lr=described["lr"], **given)
    settings = OptimizerSettings(
        lr=described["lr"], opt=described["kind"], weight_decay=described.get("weight_decay", 0.05),
        opt_eps=described.get("eps", 1e-8), opt_betas=described.get("betas"),
    )  # fmt: skip
    return build_optimizer(model, settings)


def run_step(case: Case, checks: Checks) -> None:
    """Training steps: losses, widths, gradients, updated weights, average."""
    model = build_network(case).train()
    settings: dict[str, Any] = case.raw["options"]
    pixels = step_batch(case, 0)[0][0].numel()
    grid = make_grid(model.smallest_ratio, model.largest_ratio, settings["granularity"])
    widths: list[float] = []
    model.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[1]))
    step = ScaleCoordination(
        model,
        ScalaLosses(
            build_criterion(case, settings, pixels),
            kind=settings.get("distill_type", "soft"),
            token=TOKENS[settings.get("token_type", "cls_token")],
            ce_coefficient=settings.get("ce_coefficient", 1.0),
            ce_type=settings.get("ce_type", "one_hot"),
        ),
        grid,
        lambda: case.raw["epoch"],
        full_warm_epoch=settings.get("full_warm_epoch", 0),
        transfer_type=settings.get("transfer_type", "progressive"),
        multi_hot=settings.get("bce_loss", False),
    )
    optimization = Optimization(case_optimizer(model, case.build["optimizer"]))
    decay = case.build.get("ema_decay")
    ema = ModelEmaV3(model, decay) if decay is not None else None
    random.seed(case.raw["input"]["random_seed"])
    rows = []
    for index in range(case.raw["steps"]):
        optimization.zero_grad()
        terms = step(step_batch(case, index), optimization)
        optimization.step()
        if ema is not None:
            ema.update(model)
        rows.append([float(terms[name]) for name in case.raw["loss_order"]])
    named = dict(model.named_parameters())
    checks.equal("parameters", list(named), case.raw["parameters"])
    gradients = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named.items()}
    known: dict[str, Any] = {
        "losses": np.mean(rows, axis=0),
        "widths": np.asarray(widths),
        "grad_norms": torch.stack([value.norm() for value in gradients.values()]),
        "param_norms": torch.stack([value.norm() for value in named.values()]),
        "param_sums": torch.stack([value.sum() for value in named.values()]),
    }
    known |= {f"grad:{name}": value for name, value in gradients.items()}
    known |= {f"after:{name}": value for name, value in named.items()}
    if ema is not None:
        average = dict(ema.module.named_parameters())
        known["ema_sums"] = torch.stack([average[name].sum() for name in named])
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name} of a step")
        checks.output(name, known[name])


def run_draw(case: Case, checks: Checks) -> None:
    """Pairs of widths from Python's generator."""
    build = case.build
    grid = make_grid(build["smallest_ratio"], build["largest_ratio"], build["granularity"])
    seed = re.search(r"random\.seed\((\d+)\)", case.text)
    random.seed(int(seed[1]) if seed else case.seed)
    count = len(checks.stored[f"{case.name}/widths"])
    checks.output("widths", np.asarray([draw_widths(grid) for _ in range(count)]))


def run_schedule(case: Case, checks: Checks) -> None:
    """Learning rate in force in every epoch."""
    build = case.build
    if build["sched"] != "cosine":
        raise NotCovered(f"schedule {build['sched']}")
    noise = build["lr_noise"]
    settings = CosineSettings(
        epochs=build["epochs"], warmup_epochs=build["warmup_epochs"], warmup_lr=build["warmup_lr"],
        min_lr=build["min_lr"], lr_noise=noise if noise is None or isinstance(noise, list) else [noise],
        lr_noise_pct=build["lr_noise_pct"],
    )  # fmt: skip
    found = re.search(r"start_epoch (\d+)", case.text)
    start = int(found[1]) if found else 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=build["base_lr"])
    schedule = LaggingSchedule(optimizer, settings, seed=build["seed"], start_epoch=start)
    rates = []
    for epoch in range(start, build["epochs"]):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch + 1)
    checks.output("lr", np.asarray(rates))


def run_sampler(case: Case, checks: Checks) -> None:
    """Images of one rank under repeated augmentation."""
    build = case.build
    data = torch.utils.data.TensorDataset(torch.zeros(build["length"]))
    sampler = RepeatedSampler(data, num_replicas=build["num_replicas"], rank=build["rank"])
    sampler.set_epoch(build["epoch"])
    checks.output("indices", np.asarray([index for index, _ in sampler]))
    checks.output("length", np.asarray(len(sampler)))


def run_groups(case: Case, checks: Checks) -> None:
    """Which parameters the optimiser decays."""
    model = build_network(case)
    names = {weight: name for name, weight in model.named_parameters()}
    groups = build_optimizer(model, OptimizerSettings(1.0)).param_groups
    found = [{"weight_decay": g["weight_decay"], "names": sorted(names[w] for w in g["params"])} for g in groups]
    key = operator.itemgetter("weight_decay")
    checks.equal("groups", sorted(found, key=key), sorted(case.raw["groups"], key=key))


def run_positions(case: Case, checks: Checks) -> None:
    """Position embedding of a checkpoint of another image size."""
    source = build_network(case, img_size=case.build["from_img"])
    model = build_network(case, img_size=case.build["to_img"])
    load_for_finetuning(model, source.state_dict(), source=case.name)
    checks.output("pos_embed", model.pos_embed)


def run_evaluation(case: Case, checks: Checks) -> None:
    """Loss (mean over batches) and accuracies (mean over images)."""
    model = build_network(case)
    described, size = case.raw["input"], options(case).get("img_size", 224)
    images = re.search(r"seed=(\d+)\+i", described["images"])
    labels = re.search(r"fill\.array\('(\w+)', \(n, classes\), seed=(\d+)\+i\)", described["labels"])
    if not images or not labels:
        raise NotCovered(f"an input described as {described}")
    batches = [
        (
            reference.image(n, size, int(images[1]) + i),
            torch.from_numpy(reference.array(labels[1], (n, model.num_classes), int(labels[2]) + i)).argmax(1),
        )
        for i, n in enumerate(described["batches"])
    ]
    for name in case.outputs:
        _, ratio = split_name(name)
        run = partial(evaluate_width, model, ratio=ratio, device=torch.device("cpu"), show_progress=False)
        found = run(batches)
        numbers = [found[key] for key in ("batch_loss", "top1_percent", "top5_percent")]
        checks.output(name, np.asarray(numbers), tolerance=1e-6)


def run_transform(case: Case, checks: Checks) -> None:
    """The evaluation transform of a blocky image."""
    build = case.build
    found = re.search(
        r"fill\.array\('(\w+)',\s*(\([\d, ]+\)),\s*(\d+)\)\*(\d+)\+(\d+)"
        r".*?(\d+)x(\d+) \(kron\), cropped to (\d+)x(\d+)",
        case.text,
    )
    if not found:
        raise NotCovered(f"an input described as {case.text!r}")
    numbers = reference.array(found[1], ast.literal_eval(found[2]), int(found[3]))
    pixels = np.clip(numbers * int(found[4]) + int(found[5]), 0, 255).astype(np.uint8)
    pixels = np.kron(pixels, np.ones((int(found[6]), int(found[7]), 1), dtype=np.uint8))
    image = Image.fromarray(pixels[: int(found[8]), : int(found[9])])
    tensor = eval_transform(build["input_size"], crop_ratio=build["eval_crop_ratio"])(image)
    points = checks.stored[f"{case.name}/grid"].shape[1]
    step = 32 if -(-build["input_size"] // 32) == points else build["input_size"] // points  # every 32nd as a rule
    known = {"mean": tensor.mean((1, 2)), "std": tensor.std((1, 2)), "grid": tensor[:, ::step, ::step]}
    for name in case.outputs:
        checks.output(name, known[name], tolerance=1e-3)


BY_KEY: dict[str, Runner] = {
    "rows": run_cost,
    "loss_order": run_step,
    "groups": run_groups,
    "from_img": run_positions,
    "distillation_type": run_distillation,
    "base_lr": run_schedule,
    "num_replicas": run_sampler,
    "eval_crop_ratio": run_transform,
}
"""Key of a case, or of what it builds -> runner."""


def find_runner(case: Case) -> Runner:
    """The function that runs a case.

    Raises:
        NotCovered: nothing here is meant to run it.
    """
    build, raw = case.build, case.raw
    for key, runner in BY_KEY.items():
        if key in build or key in raw:
            return runner
    if build.get("cls") in MODULES:
        return run_module
    if build.get("cls") in NETWORKS or build.get("factory") in models_scala.MODELS:
        if any(name.startswith("nonzero@") for name in case.outputs):
            return run_gradients
        if isinstance(raw.get("input"), dict) and "batches" in raw["input"]:
            return run_evaluation
        if "ratios" in raw:
            return run_network
    if "granularity" in build:
        return run_draw
    raise NotCovered(f"no runner for {build.get('cls') or build.get('factory') or sorted(build)}")


def main(argv: list[str] | None = None) -> int:
    """Command line; see ``common.tests.reference.main``."""
    return reference.main(find_runner, argv, program="python -m scala.tests.cases")


if __name__ == "__main__":
    sys.exit(main())

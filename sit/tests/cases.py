"""Run a folder of reference vectors of this paper: ``python -m sit.tests.cases DIR``.

Three tables say which function runs a case: by the class it builds, by the part of its name where it trains a step,
and by the list of ``facts.json`` it comes from. Each reads the rest from the case.
"""

import json
import math
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models._factory import create_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.data.loaders import DataError, RepeatedSampler, build_dataset, eval_transform, train_loader
from common.measure.flops import count_parameters
from common.run.build import scaled_lr
from common.run.checkpoint import list_key_differences
from common.run.cli import dataset_name
from common.tests import reference
from common.tests.reference import Case, CaseError, Checks, NotCovered, Runner
from sit import engine, models
from sit.losses import DistillationLoss
from sit.meters import MetricLogger, SmoothedValue
from sit.models import LVViT, TokenSlimmingModule, count_published_parameters, get_dpr

PARTS: dict[str, Callable[..., nn.Module]] = {
    name: getattr(models, name)
    for name in (
        "PatchEmbed4CG", "PatchEmbed6CG", "PatchEmbedNaive", "Mlp", "Attention", "Block", "TokenSlimmingModule",
        "ReverseTSM",
    )
}  # fmt: skip
FLOAT32 = 1e-6  # relative tolerance of what is computed or stored in float32
FLOAT32_NETWORK = 1e-4  # of what a network of less than double precision gives, as the vectors' README says


def precision(case: Case) -> torch.dtype:
    return getattr(torch, case.build.get("dtype", "float64"))


def build(case: Case) -> nn.Module:
    """The module of a case, filled, in its precision and mode."""
    made = case.build
    dtype = precision(case)
    if "factory" in made:
        module = reference.build(create_model, case.seed, dtype=dtype, model_name=made["factory"], **made["kwargs"])
    else:
        make = LVViT if made["cls"] == "LVViT" else PARTS[made["cls"]]
        module = reference.build(make, case.seed, dtype=dtype, **made["kwargs"])
    return module.train(made.get("mode") == "train")


def read_input(case: Case, module: nn.Module) -> Tensor:
    value = case.read()
    return torch.as_tensor(value).to(next(module.parameters()).dtype)


def batch_norms(module: nn.Module) -> dict[str, Tensor]:
    """``bn<i>_running_mean`` and the like of a stem, wherever it is."""
    stem = getattr(module, "patch_embed", module)
    return {name.replace(".", "_"): value for name, value in stem.named_buffers()}


def compare(case: Case, checks: Checks, known: Mapping[str, Any]) -> None:
    """All outputs of a case against what is known by name."""
    loose = precision(case) != torch.float64 and "tolerance" not in case.raw
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name}")
        checks.output(name, known[name], tolerance=FLOAT32_NETWORK if loose else None)


def run_part(case: Case, checks: Checks) -> None:
    """A module alone: its output, the mixing matrix, running averages."""
    module = build(case)
    tokens = read_input(case, module)
    with torch.no_grad():
        known: dict[str, Any] = {"out": module(tokens)}
        known |= batch_norms(module)
        if isinstance(module, TokenSlimmingModule):
            known["weights"] = module.mixing_weights(tokens)
    compare(case, checks, known)


def token_stats(tokens: Sequence[Tensor]) -> Tensor:
    """Mean, population standard deviation, first and last element of each block's tokens, (L, 4)."""
    rows = [torch.stack([t.mean(), t.std(correction=0), t[0, 0, 0], t[-1, -1, -1]]) for t in tokens]
    return torch.stack(rows)


def run_model(case: Case, checks: Checks) -> None:
    """A whole network: logits, tokens of the blocks, running averages, stages."""
    model = build(case)
    assert isinstance(model, LVViT)
    with torch.no_grad():
        logits, *distilled, tokens = model(read_input(case, model))
    known: dict[str, Any] = {"logits": logits, "token_stats": token_stats(tokens)}
    if distilled:
        known["dist_logits"] = distilled[0]
    known |= {f"tokens_{index}": value for index, value in enumerate(tokens)} | batch_norms(model)
    compare(case, checks, known)
    check_stages(checks, model, case.raw.get("expect", {}))
    if shapes := case.raw.get("token_shapes"):
        checks.equal("token_shapes", [list(value.shape) for value in tokens], shapes)


def check_stages(checks: Checks, model: LVViT, expected: Mapping[str, Any]) -> None:
    """Stages of a network, by the published names."""
    facts: dict[str, Any] = {name: getattr(model, name) for name in ("keeped_patches", "layer_patches", "num_patches")}
    if model.slimmed:
        facts["slim_index"] = model.slim_index
        facts["rtsm"] = [type(part).__name__ for part in model.rtsm]
    for name, value in expected.items():
        if name not in facts:
            raise NotCovered(f"fact {name} of a network")
        checks.equal(name, facts[name], value)


def base_criterion(base: str, smoothing: float | None) -> nn.Module:
    """``soft`` targets, or ``hard`` ones smoothed or not."""
    if base == "soft":
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def read_labels(text: str, batch: int, classes: int, seed: int) -> Tensor:
    """Soft targets, the softmax of drawn numbers, or hard ones, ``(3*i) mod K``, as a text says."""
    if "softmax" in text or "soft targets" in text:
        stated = re.search(r"seed\s*=\s*(\d+)", text)
        return drawn("labels", (batch, classes), int(stated.group(1)) if stated else seed).softmax(dim=1)
    factor = re.search(r"(\d+)\s*\*\s*i\b", text)
    return torch.arange(batch) * (int(factor.group(1)) if factor else 1) % classes


def drawn(name: str, shape: Sequence[int], seed: int) -> Tensor:
    return torch.from_numpy(np.asarray(reference.array(name, shape, seed)))


def run_loss(case: Case, checks: Checks) -> None:
    """The five values of the criterion; teachers are functions that return the named arrays."""
    options, given = dict(case.build["kwargs"]), case.raw["input"]

    def logits(name: str) -> Tensor:
        shape = given[name] if isinstance(given[name], list) else json.loads(given[name].translate(ROUND_TO_SQUARE))
        return drawn(name, shape, case.seed)

    def tokens(who: str) -> list[Tensor]:
        return [drawn(f"{who}_tokens_{i}", shape, case.seed) for i, shape in enumerate(given["tokens"])]

    student = logits("student_logits")
    batch, classes = student.shape
    labels = read_labels(given["labels"], batch, classes, case.seed)
    base = base_criterion(options.pop("base"), options.pop("smoothing", None))
    has_cnn = options.pop("cnn_teacher", False)
    criterion = DistillationLoss(
        base,
        lambda images: (logits("teacher_logits"), tokens("teacher")),
        (lambda images: logits("cnn_logits")) if has_cnn else None,
        **options,
    )
    losses = criterion(torch.zeros(batch, 3, 8, 8), (student, logits("student_dist"), tokens("student")), labels)
    checks.output("losses", torch.stack(list(losses)))


ROUND_TO_SQUARE = str.maketrans("()", "[]")


def run_step(case: Case, checks: Checks) -> None:
    """One training step with the published groups and rates, parameter by parameter."""
    made, dtype = case.build, precision(case)

    def make(role: Mapping[str, Any]) -> nn.Module:
        options = {**made["kwargs"], **{key: value for key, value in role.items() if key not in ("seed", "mode")}}
        if options["distillation_type"] in (None, "none"):
            options.pop("conv_distillation", None)  # a teacher has no token for another
        model = reference.build(LVViT, role["seed"], dtype=dtype, **options)
        return model.train(role["mode"] == "train")

    student = make(made["student"])
    teacher = make(made["teacher"]) if made.get("teacher") else None
    images = torch.as_tensor(case_input(case, "image")).to(dtype)
    labels = read_labels(case.raw["input"]["labels"], len(images), student.num_classes, case.seed)  # pyright: ignore
    soft = labels.is_floating_point()
    criterion = DistillationLoss(
        base_criterion("soft" if soft else "hard", None), teacher, None, made["student"]["distillation_type"],
        made["lambda_token"], made["lambda_logits"], 1.0, made["tau"],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        engine.get_param_groups(student, made["weight_decay"]), betas=tuple(made["betas"]), eps=made["eps"]
    )
    rates = engine.adjust_learning_rate(
        optimizer.param_groups, made["init_lr"], made["min_lr"], made["epoch"], made["max_epoch"]
    )
    if "printed" in case.raw:
        checks.equal("printed", engine.rates_line(*rates), case.raw["printed"])
    group_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    for name, rate in case.raw.get("group_lr", {}).items():
        checks.number(f"rate of {name}", group_rates[name], rate)
    terms = engine.training_step((images, labels.to(dtype) if soft else labels), network=student, criterion=criterion)
    terms["loss"].backward()
    named = {name: value for name, value in student.named_parameters() if value.requires_grad}
    checks.equal("parameters", list(named), case.raw["parameters"])
    parameters = list(named.values())
    before = [value.detach().clone() for value in parameters]
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad.clone() for value in parameters]
    optimizer.step()
    with torch.no_grad():
        known = {
            "losses": torch.stack(list(terms.values())),
            "grad_norm": torch.stack([value.norm() for value in gradients]),
            "grad_sum": torch.stack([value.sum() for value in gradients]),
            "param_sum": torch.stack([value.sum() for value in parameters]),
            "param_norm": torch.stack([value.norm() for value in parameters]),
            "delta_norm": torch.stack([(now - then).norm() for now, then in zip(parameters, before, strict=True)]),
        }
    compare(case, checks, known | batch_norms(student))


def case_input(case: Case, key: str) -> Any:
    names = case.names()
    return reference.evaluate_text(reference.find_expression(case.raw["input"][key], names), names)


def run_transform(case: Case, checks: Checks) -> None:
    """The evaluation transform of an image of noise: a strided sample, mean and deviation."""
    options = case.build["kwargs"]
    if options["is_train"]:
        raise NotCovered("training transforms draw random numbers")
    noise = re.search(r"RandomState\((\d+)\)\.randint\(0, 256, \(([\d, ]+)\)", case.text)
    if noise is None:
        raise NotCovered(f"an image that is no noise: {case.text}")
    shape = [int(number) for number in noise.group(2).split(",") if number.strip()]
    pixels = np.random.RandomState(int(noise.group(1))).randint(0, 256, shape).astype(np.uint8)
    image = eval_transform(options["input_size"])(Image.fromarray(pixels))
    checks.equal("full_shape", list(image.shape), case.raw["full_shape"])
    stated = re.search(r"every (\d+)", case.raw.get("what", ""))
    stored = checks.stored[f"{case.name}/sample"].shape[-1]
    stride = int(stated.group(1)) if stated else math.ceil(image.shape[-1] / stored)
    checks.output("sample", image[:, ::stride, ::stride], tolerance=1e-5)
    moments = torch.stack([image.double().mean(), image.double().std()])
    checks.output("mean_std", moments, tolerance=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# facts.json


def fact_lr_schedule(fact: Mapping[str, Any], checks: Checks) -> None:
    given = fact["args"]
    peak = scaled_lr(given["lr"], batch_size=given["batch"], world_size=given["world"])
    checks.number("linear_scaled_lr", peak, fact["linear_scaled_lr"])
    groups = [{"name": "rtsm"}, {"name": "base_decay"}]
    rates = [
        engine.adjust_learning_rate(groups, peak, given["min_lr"], epoch, given["epochs"])
        for epoch in range(given["epochs"] + given["cooldown"])
    ]
    for epoch, backbone, reverse in fact["rows_epoch_backbone_rtsm"]:
        checks.number(f"backbone rate of epoch {epoch}", rates[epoch][0], backbone)
        checks.number(f"rate of the reverse modules, epoch {epoch}", rates[epoch][1], reverse)
    checks.number("sum_backbone", sum(rate for rate, _ in rates), fact["sum_backbone"])
    checks.number("sum_rtsm", sum(rate for _, rate in rates), fact["sum_rtsm"])
    checks.equal("group rates", [group["lr"] for group in groups], [rates[-1][1], rates[-1][0]])


def meta(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    with torch.device("meta"):
        return make(**options)


def fact_param_groups(fact: Mapping[str, Any], checks: Checks) -> None:
    model = meta(LVViT, **fact["kwargs"])
    names = {id(value): name for name, value in model.named_parameters()}
    decay = max(group["weight_decay"] for group in fact["groups"])
    found = [
        {
            "name": group["name"],
            "weight_decay": group["weight_decay"],
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in engine.get_param_groups(model, decay)
    ]
    checks.equal("groups", found, fact["groups"])


def fact_stages(fact: Mapping[str, Any], checks: Checks) -> None:
    model = meta(LVViT, **fact["kwargs"])
    assert isinstance(model, LVViT)
    check_stages(checks, model, {key: value for key, value in fact.items() if key != "kwargs"})


def fact_get_dpr(fact: Mapping[str, Any], checks: Checks) -> None:
    checks.close("rates", np.asarray(get_dpr(*fact["args"])), np.asarray(fact["value"]))


def fact_ra_sampler(fact: Mapping[str, Any], checks: Checks) -> None:
    given = fact["args"]
    if given["n"] < 256:  # the sampler yields nothing, and published training dies; here the loader refuses by name
        try:
            train_loader(TensorDataset(torch.zeros(given["n"])), batch_size=1, repeated_aug=True)
        except DataError as error:
            checks.equal("advice", "--no-repeated-aug" in str(error), True)
        else:
            checks.fail("a dataset that gives no batch was accepted")
    sampler = RepeatedSampler(
        range(given["n"]),
        num_replicas=given["replicas"],
        rank=given["rank"],
        shuffle=given["shuffle"],
        num_repeats=given["repeats"],
    )
    sampler.set_epoch(given["epoch"])
    indices = [int(index) for index, _ in sampler]
    known = {
        "length": len(sampler),
        "yielded": len(indices),
        "num_samples": sampler.num_samples,
        "total_size": sampler.total_size,
        "first": indices[: len(fact["first"])],
        "last": indices[len(indices) - len(fact["last"]) :],
        "crc32_of_json": zlib.crc32(json.dumps(indices).encode()),
    }
    for name, value in known.items():
        if name in fact:
            checks.equal(name, value, fact[name])


def fact_smoothed_value(fact: Mapping[str, Any], checks: Checks) -> None:
    given = fact["args"]
    meter = SmoothedValue(given.get("window", 20), given.get("fmt"))
    for value, count in given["updates"]:
        meter.update(value, count)
    checks.equal("string", str(meter), fact["string"])
    for name in ("median", "avg", "global_avg", "max", "value", "count"):
        if name in fact:
            checks.number(name, getattr(meter, name), fact[name], tolerance=FLOAT32)


def fact_metric_logger(fact: Mapping[str, Any], checks: Checks) -> None:
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
    for value in fact["values"]:
        logger.update(lr=value * 1e-4, loss=value, loss_cls=value / 3)
    checks.equal("string", str(logger), fact["string"])


def fact_evaluate(fact: Mapping[str, Any], checks: Checks) -> None:
    given = fact["args"]
    batches = [
        (drawn(f"eval_logits_{i}", (b, given["K"]), given["seed"]), torch.arange(b) * 5 % given["K"])
        for i, b in enumerate(given["batches"])
    ]
    found = engine.evaluate(batches, nn.Identity(), torch.device("cpu"), show_progress=False)
    for name, value in fact["returned"].items():
        checks.number(name, found[name], value, tolerance=FLOAT32)
    checks.equal("last_line", engine.summary_line(found), fact["last_line"])


def fact_inat(fact: Mapping[str, Any], checks: Checks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in fact["files"].items():
            Path(folder, name).write_text(json.dumps(content))
        split = "train" if fact["train"] else "val"
        name = dataset_name({2018: "INAT", 2019: "INAT19"}[fact["year"]])
        dataset: Any = build_dataset(name, folder, split, None, inat_category=fact["category"])
        checks.equal("nb_classes", len(dataset.classes), fact["nb_classes"])
        samples = [[str(Path(path).relative_to(folder)), target] for path, target in dataset.samples]
        checks.equal("samples", samples, fact["samples"])


def fact_finetune(fact: Mapping[str, Any], checks: Checks) -> None:
    student = meta(create_model, model_name=fact["model"], distillation_type="frd")
    teacher = meta(create_model, model_name=fact["model"], distillation_type=None).state_dict()
    found = list_key_differences(student, teacher)
    checks.equal("teacher_keys", len(teacher), fact["teacher_keys"])
    checks.equal("student_keys", len(student.state_dict()), fact["student_keys"])
    checks.equal("missing", len(found.missing), fact["missing"])
    checks.equal("unexpected", len(found.unexpected), fact["unexpected"])
    checks.equal("mismatched", found.mismatched, ())
    checks.equal("prefixes", sorted({key.split(".")[0] for key in found.missing}), sorted(fact["missing_prefixes"]))


def fact_manifest(fact: Mapping[str, Any], checks: Checks) -> None:
    """Keys in their order, shapes, and the three counts of parameters."""
    model = meta(create_model, model_name=fact["model"], distillation_type=fact["distillation_type"])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    checks.equal("state_dict", shapes, {key: list(shape) for key, shape in fact["state_dict"].items()})
    checks.equal("order", list(shapes), list(fact["state_dict"]))
    checks.equal("params", count_parameters(model), fact["params"])
    checks.equal("params_without_rtsm", count_published_parameters(model), fact["params_without_rtsm"])
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    checks.equal("trainable", trainable, fact["trainable"])
    if "buffers" in fact:
        checks.equal("buffers", [name for name, _ in model.named_buffers()], fact["buffers"])


FACTS: dict[str, Callable[[Mapping[str, Any], Checks], None]] = {
    name.removeprefix("fact_"): value for name, value in list(globals().items()) if name.startswith("fact_")
}


def more_cases(folder: Path) -> list[Case]:
    """A case for each entry of ``facts.json`` and for each manifest of the folder."""
    facts: dict[str, list[Any]] = {}
    paths = [*folder.glob("facts.json"), *sorted(folder.glob("manifest_*.json"))]
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise CaseError(f"{path} is not valid JSON: {error}") from error
        facts |= content if path.name == "facts.json" else {path.stem: [{"manifest": True, **content}]}
    return [
        Case(f"{kind}[{index}]", 0, {"fact": "manifest" if "manifest" in fact else kind}, "", (), {}, fact)
        for kind, entries in facts.items()
        for index, fact in enumerate(entries if isinstance(entries, list) else [entries])
    ]


def find_runner(case: Case) -> Runner:
    """The function that runs a case."""
    made = case.build
    if (fact := made.get("fact")) is not None:
        if fact not in FACTS:
            raise NotCovered(f"no runner for facts of {fact}")
        return lambda case, checks: FACTS[fact](case.raw, checks)
    if made.get("fn") == "build_transform":
        return run_transform
    built = made.get("cls")
    if built == "DistillationLoss":
        return run_loss
    if built == "LVViT" and "student" in made:
        return run_step
    if built == "LVViT" or "factory" in made:
        return run_model
    if built in PARTS:
        return run_part
    raise NotCovered(f"no runner for {built or made.get('fn') or 'a case that names nothing'}")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if any case fails."""
    return reference.main(find_runner, argv, program="python -m sit.tests.cases", more_cases=more_cases)


if __name__ == "__main__":
    sys.exit(main())

"""Run a folder of reference vectors of this paper: ``python -m dvt.tests.cases DIR``.

``RUNNERS`` says which function runs a case, by the class it builds or the beginning of its name; each reads
configuration, input and outputs from the case. Manifests in the folder (``manifest_<model>.json``) become cases too.
"""

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import mixup_target
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common.layers import Performer, sinusoid_table
from common.measure.flops import count_parameters
from common.run.build import build_optimizer, build_schedule
from common.run.settings import OptimizerSettings, ScheduleSettings
from common.tests import reference
from common.tests.reference import Case, CaseError, Checks, NotCovered, Runner
from dvt import cifar, exits
from dvt.losses import build_criterion, exit_logits, summed_loss
from dvt.models import STAGE_NAMES, create_model
from dvt.models.backbone import Backbone, StageOutput
from dvt.models.cascade import Cascade, make_cascade
from dvt.models.deit import VisionTransformer
from dvt.models.reuse import resize_tokens, reuse_relations
from dvt.models.t2t_vit import T2T_module, T2T_ViT
from dvt.models.token_transformer import Token_transformer
from dvt.models.transformer_block import Block, drop_path_rates
from dvt.tests.tiny import resize_grid

RELATIVE, ABSOLUTE = 1e-9, 1e-10
"""Tolerance in float64, element by element."""

LOOSE = 1e-6
"""Tolerance of what is computed in float32 and not compared exactly."""


def check(case: Case, checks: Checks, name: str, value: Any, *, tolerance: float = RELATIVE) -> None:
    """Compare an output with what is stored of it: all of it, or every k-th element and two sums.

    Args:
        tolerance: relative, element by element; 0 for equality.
    """
    checks.compared.add(name)
    stated = case.raw["outputs"][name]
    if stated["key"] not in checks.stored:
        checks.fail(f"cases.npz has no array {stated['key']}")
        return
    got = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if list(got.shape) != stated["shape"]:
        checks.fail(f"{name} has shape {list(got.shape)}, expected {stated['shape']}")
        return
    got = got.astype(np.float64).reshape(-1)
    pairs = [(name, got[:: stated["stride"]], checks.stored[stated["key"]].astype(np.float64).reshape(-1))]
    floor = ABSOLUTE if tolerance else 0.0
    for word, total in (("sum", got.sum()), ("abssum", np.abs(got).sum())):
        if word in stated:  # sums of float32 arrays were taken in float32
            slack = RELATIVE if stated["dtype"] == "float64" else LOOSE
            error = abs(total - stated[word]) / max(np.abs(got).sum(), 1e-300)
            if not error <= slack:
                checks.fail(f"{word} of {name} differs by {error:.2e} of the sum of magnitudes")
    for label, one, other in pairs:
        if one.shape != other.shape:
            checks.fail(f"{label} has {one.size} stored elements, expected {other.size}")
            continue
        scale = np.abs(other).max(initial=0.0) or 1.0
        error = float(np.abs(one - other).max(initial=0.0) / scale)
        checks.largest = max(checks.largest, error)
        if not np.all(np.abs(one - other) <= floor + tolerance * np.abs(other)):
            checks.fail(f"{label} differs by {error:.2e} of its largest magnitude")


def check_known(case: Case, checks: Checks, known: dict[str, Any], *, tolerance: float = RELATIVE) -> None:
    """Compare all outputs of a case with values by their names."""
    for name in case.outputs:
        if name not in known:
            raise NotCovered(f"output {name} of {case.name}")
        check(case, checks, name, known[name], tolerance=tolerance)


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Float64, filled by name, in evaluation mode."""
    return reference.fill_(module.double().eval(), seed)


def options(case: Case, *names: str) -> dict[str, Any]:
    """Those settings of a case's build that it states."""
    return {name: case.build[name] for name in names if name in case.build}


def draw(case: Case, name: str) -> Tensor:
    """A tensor that the case's text draws, float64."""
    value = case.read(name)
    return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def run_sinusoid(case: Case, checks: Checks) -> None:
    check_known(
        case,
        checks,
        {f"{n}x{d}": sinusoid_table(n, d) for n, d in case.build["rows"]},
        tolerance=0,
    )


def run_drop_path(case: Case, checks: Checks) -> None:
    for name in case.outputs:
        rate, depth = name.split("_")
        check(case, checks, name, np.array(drop_path_rates(float(rate), int(depth))), tolerance=0)


@torch.no_grad()
def run_performer(case: Case, checks: Checks) -> None:
    module = Performer(case.build["dim"], case.build["in_dim"], **options(case, "kernel_ratio"))
    fill(module, case.seed)
    known: dict[str, Any] = {"y": module(draw(case, "x"))}
    for name in case.outputs:
        if name.startswith("prm_exp"):
            names = case.names()
            text = reference.find_expression(case.text[case.text.index(name) :], names)
            known[name] = module.positive_features(torch.from_numpy(reference.evaluate_text(text, names)))
    check_known(case, checks, known)


@torch.no_grad()
def run_token_transformer(case: Case, checks: Checks) -> None:
    module = Token_transformer(**options(case, "dim", "in_dim", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale"))
    check_known(case, checks, {"y": fill(module, case.seed)(draw(case, "x"))})


@torch.no_grad()
def run_t2t_module(case: Case, checks: Checks) -> None:
    module = T2T_module(**options(case, "img_size", "tokens_type", "in_chans", "embed_dim", "token_dim"))
    fill(module, case.seed)
    check_known(case, checks, {"tokens": module(draw(case, "image"))})
    if "num_patches" in case.raw:
        checks.equal("num_patches", module.num_patches, case.raw["num_patches"])


def run_grid(case: Case, checks: Checks) -> None:
    known = {}
    for name in case.outputs:
        source, target = map(int, name.split("to"))
        drawn = next(
            maps for letter in "abcdefgh" if (maps := _try_draw(case, letter)) is not None and maps.shape[-1] == source
        )
        known[name] = resize_grid(drawn, target)
    check_known(case, checks, known)


def _try_draw(case: Case, name: str) -> Tensor | None:
    try:
        return draw(case, name)
    except CaseError:
        return None


@torch.no_grad()
def run_block(case: Case, checks: Checks) -> None:
    """One block; the grids follow from the numbers of tokens."""
    eps = case.build.get("norm_eps", 1e-6 if "deit" in case.build["class"].lower() else 1e-5)
    module = Block(
        norm_layer=partial(nn.LayerNorm, eps=eps),
        **options(case, "dim", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale", "feature_reuse"),
    )
    fill(module, case.seed)
    x, features = draw(case, "x"), _try_draw(case, "features_to_be_reused")
    matrix = None
    if features is not None:
        sides = (int((tokens.shape[1] - 1) ** 0.5) for tokens in (features, x))
        matrix = resize_tokens(*((side, side) for side in sides))
    out, relation = module(x, features, _try_draw(case, "relations_to_be_reused"), matrix, hand_on=True)
    fused, _ = module(x, features, _try_draw(case, "relations_to_be_reused"), matrix)
    check_known(case, checks, {"x": out, "relation": relation})
    if "x" in case.outputs:
        check(case, checks, "x", fused)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def build_network(case: Case) -> Cascade | Backbone:
    """The network that a case describes, filled."""
    build = case.build
    if factory := build.get("factory"):
        model = create_model(factory, **build.get("kwargs", {}))
    else:
        deit = any(word in build["class"].lower() for word in ("deit", "visiontransformer"))
        settings = options(
            case, "img_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes", "token_dim",
            "qk_scale", "qkv_bias",
        )  # fmt: skip
        if "norm_eps" in build:
            settings["norm_layer"] = partial(nn.LayerNorm, eps=build["norm_eps"])
        make, key = (VisionTransformer, "patch_size") if deit else (T2T_ViT, "tokens_type")
        if isinstance(build.get(key), list):
            stages = [{key: value} for value in build[key]]
            model = make_cascade(make, stages, **settings, **options(case, "feature_reuse", "relation_reuse"))
        else:  # a backbone alone
            model = make(**settings, **options(case, key))
    fill(model, case.seed)
    return model


def run_stages(model: Cascade | Backbone, images: Tensor) -> dict[str, Tensor]:
    """Everything that a cascade computes and hands on, by the names of the vectors; of a backbone without a prefix."""
    known: dict[str, Tensor] = {}
    before: StageOutput | None = None
    stages = dict(zip(STAGE_NAMES, model.stages, strict=True)) if isinstance(model, Cascade) else {"": model}
    for number, (name, stage) in enumerate(stages.items(), 1):
        if stage.relation_reuse and before is not None and before.relations is not None:
            matrix = stage.token_resize(before.relations.dtype)
            reused = reuse_relations(before.relations, stage.relation_reuse_conv, matrix, stage.depth)
            known |= {f"{name}.reused_relation.first": reused[0], f"{name}.reused_relation.last": reused[-1]}
        before = stage.run(images, before, hand_on=True)
        assert before.relations is not None
        maps = before.relations.chunk(stage.depth, dim=1)
        known |= {f"{name}.relation.first": maps[0], f"{name}.relation.last": maps[-1]}
        known |= {f"{name}.features": before.features, f"logits{number}": before.logits}
    return {name.removeprefix("."): value for name, value in known.items()}


@torch.no_grad()
def run_network(case: Case, checks: Checks) -> None:
    """Logits of all exits, as the network gives them and stage by stage, and what the stages hand on."""
    model = build_network(case)
    images = draw(case, "image")
    handed = run_stages(model, images) if any("logits" not in name for name in case.outputs) else {}
    logits = {f"logits{number}": answer for number, answer in enumerate(exit_logits(model(images)), 1)}
    logits["logits"] = logits["logits1"]
    check_known(case, checks, handed | logits)
    for name in case.outputs:
        if name in handed and name in logits:  # stage by stage, attention not fused
            check(case, checks, name, handed[name])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def read_targets(case: Case, count: int, text: str = "") -> Tensor:
    """The class of each image: ``target_i = <expression of i> mod C``."""
    found = re.search(r"target_?i?\s*=\s*(.+?)\s*(?:mod|%)\s*(\d+)", text or case.text)
    if not found:
        raise CaseError(f"{case.text!r} does not say what the targets are")
    numbers = reference.evaluate_text(found[1], {"i": np.arange(count)})
    return torch.from_numpy(np.asarray(numbers) % int(found[2]))


def run_losses(case: Case, checks: Checks) -> None:
    classes, smoothing = case.build["num_classes"], case.build["smoothing"]
    found = re.search(r"fill\.array\('logits\{k\}',\s*\((\d+),\s*(\d+)\)", case.text)
    if not found:
        raise CaseError(f"{case.text!r} does not say what the logits are")
    shape = tuple(map(int, found.groups()))
    logits = [torch.from_numpy(reference.array(f"logits{k}", shape, case.seed)) for k in (1, 2, 3)]
    targets = read_targets(case, shape[0])
    mixed = mixup_target(targets, classes, case.build["lam"], smoothing).double()
    known: dict[str, Any] = {"mixup_target": mixed}
    known["soft"] = summed_loss(build_criterion(True, smoothing), logits, mixed)[0]
    known["smooth"] = summed_loss(build_criterion(False, smoothing), logits, targets)[0]
    known["ce"] = summed_loss(build_criterion(False, 0.0), logits, targets)[0]
    check_known(case, checks, known, tolerance=LOOSE)


def run_step(case: Case, checks: Checks) -> None:
    """Groups of the optimiser, gradients, one step, one update of the average."""
    build = case.build
    model = build_network(case)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    images = draw(case, "image")
    targets = read_targets(case, len(images))
    mixed = mixup_target(targets, build["num_classes"], build["mixup_lam"], build["smoothing"]).double()
    average = ModelEmaV3(model, build["ema_decay"])
    optimizer = build_optimizer(
        model, OptimizerSettings(opt=build.get("opt", "adamw"), lr=build["lr"], weight_decay=build["weight_decay"])
    )
    groups = {
        "no_decay" if group["weight_decay"] == 0 else "decay": [names[id(weight)] for weight in group["params"]]
        for group in optimizer.param_groups
    }
    optimized = {name for group in groups.values() for name in group}
    groups["not_optimized"] = [name for name in names.values() if name not in optimized]
    if "groups" in case.raw:
        checks.equal("groups", groups, case.raw["groups"])
    if "group_weight_decay" in case.raw:
        found = [group["weight_decay"] for group in optimizer.param_groups]
        checks.equal("weight decay of the groups", found, case.raw["group_weight_decay"])
    criterion = build_criterion(True, build["smoothing"])
    known: dict[str, Any] = {}
    parameters = dict(model.named_parameters())
    loss, losses = summed_loss(criterion, exit_logits(model(images)), mixed)
    losses[-1].backward(retain_graph=True)
    known |= {f"grad_exit3_only:{name}": _gradient(weight) for name, weight in parameters.items()}
    optimizer.zero_grad()
    loss.backward()
    known |= {f"grad:{name}": _gradient(weight) for name, weight in parameters.items()}
    optimizer.step()
    average.update(model)
    known |= {f"param:{name}": weight for name, weight in parameters.items()}
    known |= {f"ema:{name}": weight for name, weight in average.module.named_parameters()}
    check_known(case, checks, known | {"loss": loss})


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()


def run_schedule(case: Case, checks: Checks) -> None:
    known = {}
    for number, row in enumerate(case.build["rows"]):
        settings = {key: value for key, value in row.items() if key not in ("lr", "num_epochs")}
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=row["lr"])
        schedule, epochs = build_schedule(optimizer, ScheduleSettings(**settings))
        checks.equal(f"epochs of row {number}", epochs, row["num_epochs"])
        rates = []
        for epoch in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step(epoch + 1)
        known[f"lr{number}"] = np.array(rates)
    check_known(case, checks, known)


def run_transfer_schedule(case: Case, checks: Checks) -> None:
    known = {}
    build, text = case.build, f"{case.raw.get('what', '')} {case.text}"

    def stated(pattern: str, *keys: str) -> float | None:
        """A setting of the build, or of what the case says in words."""
        found = re.search(pattern + r"\s*=?\s*(\d[\d.]*(?:e-?\d+)?)", text)
        return next((build[key] for key in keys if key in build), float(found[1]) if found else None)

    ratio = stated(r"backbone lr\s*=", "ratio", "transfer_ratio")
    epochs, min_lr = stated("T_max", "T_max", "epochs"), stated("eta_min", "eta_min", "min_lr")
    rates_of = {} if ratio is None else {"ratio": ratio}
    cosine = ({} if epochs is None else {"epochs": int(epochs)}) | ({} if min_lr is None else {"min_lr": min_lr})
    for number, lr in enumerate(build["lrs"]):
        parts = nn.ModuleDict({"blocks": nn.Linear(1, 1), "norm": nn.LayerNorm(1), "head": nn.Linear(1, 1)})
        optimizer = cifar.build_optimizer(parts, lr=lr, **rates_of)
        schedule = cifar.build_schedule(optimizer, **cosine)
        rates = []
        for _ in range(case.raw["outputs"][f"lr{number}"]["shape"][0]):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        known[f"lr{number}"] = np.array(rates)
    check_known(case, checks, known)


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds


def run_thresholds(case: Case, checks: Checks) -> None:
    """Shares, thresholds, accuracies and costs of the published budgets."""
    build = case.build
    classes, levels = build["classes"], build.get("levels")
    found = re.search(r"\*\s*\[([\d., ]+)\]\s*per exit", case.text)
    sharpness = np.array([float(number) for number in (found[1] if found else "1,2,3").split(",")])[:, None, None]

    def score(tag: str, count: int) -> Tensor:
        raw = reference.array(tag, (len(sharpness), count, classes), case.seed) * sharpness
        raw = np.exp(raw - raw.max(axis=-1, keepdims=True))
        values = raw / raw.sum(axis=-1, keepdims=True)
        if levels is not None:
            values = np.floor(values * levels) / levels
        if build.get("all_same"):  # every sample has the scores of the first
            values = np.broadcast_to(values[:, :1], values.shape).copy()
        return torch.from_numpy(values.astype(np.float32))

    train, test = score("train", build["n_train"]), score("test", build["n_test"])
    drawn = reference.array("target", (build["n_test"], classes), case.seed) * 0.5
    drawn = drawn + reference.array("test", (len(sharpness), build["n_test"], classes), case.seed)[-1]
    targets = torch.from_numpy(drawn.argmax(axis=-1))
    shares = exits.published_shares(len(sharpness))
    thresholds = exits.find_thresholds(train.amax(dim=-1), shares)
    confidence, answers = test.max(dim=-1)
    correct = answers == targets
    outcome = exits.evaluate_thresholds(confidence, correct, build["flops"], thresholds)
    check(case, checks, "probs", shares, tolerance=LOOSE)
    check(case, checks, "threshold", thresholds, tolerance=0)
    check(case, checks, "acc", outcome.top1_percent)
    check(case, checks, "gflops", outcome.gmacs, tolerance=LOOSE)
    check(case, checks, "anytime", np.array(exits.anytime_top1_percent(correct)))


# ---------------------------------------------------------------------------------------------------------------------
# Which


RUNNERS: dict[str, Runner] = {
    "Token_performer": run_performer,
    "Token_transformer": run_token_transformer,
    "T2T_module": run_t2t_module,
    "Block": run_block,
    "step": run_step,
    "DVT cascade": run_network,
    "T2T_ViT": run_network,
    "VisionTransformer": run_network,
    "DeiT": run_network,
    "sinusoid": run_sinusoid,
    "drop_path": run_drop_path,
    "grid_upsample": run_grid,
    "losses": run_losses,
    "schedule": run_schedule,
    "transfer_schedule": run_transfer_schedule,
    "threshold": run_thresholds,
}
"""Beginning of the class that a case builds, or of its name -> what runs it; the name wins."""


def find_runner(case: Case) -> Runner:
    """The function that runs a case."""
    if "manifest" in case.raw:
        return run_manifest
    built = str(case.build.get("class", ""))
    for text in (case.name, built):
        for beginning, runner in RUNNERS.items():
            if text.startswith(beginning):
                return runner
    if "factory" in case.build:
        return run_network
    raise NotCovered(f"no runner for {built or case.name}")


def run_manifest(case: Case, checks: Checks) -> None:
    """Names, shapes and order of a state dict, parameters, and which of them are frozen."""
    manifest = case.raw["manifest"]
    with torch.device("meta"):
        model = create_model(manifest["model"])
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    checks.equal("state dict", list(shapes.items()), list(manifest["state_dict"].items()))
    checks.equal("params", count_parameters(model), manifest["params"])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    checks.equal("trainable", sum(weight.numel() for weight in trained), manifest["trainable"])
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    checks.equal("frozen", frozen, manifest["frozen"])
    kept = [name for name, _ in model.named_buffers() if name in shapes]
    checks.equal("buffers", kept, manifest["buffers"])


def more_cases(folder: Path) -> Sequence[Case]:
    """A case of each manifest of the folder."""
    made = []
    for path in sorted(folder.glob("manifest_*.json")):
        try:
            manifest = json.loads(path.read_text())
        except ValueError as error:
            raise CaseError(f"{path} is not valid JSON: {error}") from error
        made.append(Case(path.stem, 0, {}, "", (), {}, {"manifest": manifest}))
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if any case fails."""
    return reference.main(find_runner, argv, program="python -m dvt.tests.cases", more_cases=more_cases)


if __name__ == "__main__":
    sys.exit(main())

"""Runners of the vectors of losses, schedules and iterations of both stages."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.losses import DistillationLoss
from common.run.build import build_optimizer, build_schedule
from common.run.engine import Optimization, StepInfo
from common.run.launch import World
from common.run.settings import OptimizerSettings, ScheduleSettings
from common.tests.reference import Case, Checks, NotCovered, image
from uvc.engine import FineTuning, JointTraining
from uvc.loading import freeze_structure
from uvc.losses import objective
from uvc.models.gates import GatedTransformer, register_masks
from uvc.pruning import update_masks_
from uvc.schedules import selection_tau, warmup_factor, zlr_schedule
from uvc.settings import JointSettings
from uvc.tests.model_cases import NUMBER, build_model, replay, tensor
from uvc.tests.optimizer_cases import apply_gate_args, compare, settings_of, stated_numbers, trajectory
from uvc.uvc_optimizer import PrimalDual

ALONE = World(0, 1, 0, torch.device("cpu"), None)
NORMS = (
    "patch_embed.proj.weight", "blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc1.bias",
    "pos_embed", "head.weight",
)  # fmt: skip
"""Weights whose norms the trajectories show, where the text names none."""


class Fixed(nn.Module):
    """A teacher that says the same whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def run_distillation(case: Case, checks: Checks) -> None:
    """Loss and gradients of the two heads."""
    shape = tuple(checks.stored[f"{case.name}/grad_out"].shape)
    out, distilled, taught = (tensor(name, shape, case.seed) for name in ("out", "out_kd", "teacher"))
    targets = tensor("targets", shape, case.seed).softmax(-1)
    out.requires_grad_()
    distilled.requires_grad_()
    raw = case.raw
    criterion = objective(Fixed(taught), kind=raw["type"], alpha=float(raw["alpha"]), tau=float(raw.get("tau", 1.0)))
    loss = criterion.terms(out, distilled, targets, criterion.teach(out))["loss"]
    grads = torch.autograd.grad(loss, [out, distilled], allow_unused=True)
    grad_out, grad_kd = (torch.zeros(shape) if grad is None else grad for grad in grads)
    compare(case, checks, {"loss": loss, "grad_out": grad_out, "grad_kd": grad_kd})


def run_schedules(case: Case, checks: Checks) -> None:
    """Factors of the rate, temperature of selection and eps by step."""
    warmup, total = int(case.build["warmup_steps"]), int(case.build["t_total"])
    what = str(case.raw.get("what", ""))
    values: dict[str, Any] = {}
    for name in case.outputs:
        count = len(checks.stored[f"{case.name}/{name}"])
        if name in ("cosine", "linear", "constant"):
            factor = warmup_factor(name, warmup_steps=warmup, total_steps=total)
            values[name] = np.array([factor(step) for step in range(count)])
        elif name == "tau":
            found = re.search(rf"get_tau\(({NUMBER}),\s*({NUMBER})", what)
            end, start = (float(found[1]), float(found[2])) if found else (10.0, 0.1)
            values[name] = np.array([selection_tau(i, total, end=end, start=start) for i in range(count)])
        elif name == "eps":
            first = checks.stored[f"{case.name}/eps"][0]
            decay = float(case.build.get("eps_decay", case.raw.get("eps_decay", JointSettings().eps_decay)))
            values[name] = np.array([first * decay**i for i in range(count)])
    compare(case, checks, values)


def run_zlr_schedule(case: Case, checks: Checks) -> None:
    """Tables of the rate of z."""
    rows = {}
    for index, (text, epochs) in enumerate(case.build["inputs"]):
        schedule = zlr_schedule([float(part) for part in text.split(",")], int(epochs))
        rows[str(index)] = np.array([[epoch, value] for epoch, value in sorted(schedule.items())])
    compare(case, checks, rows)


def run_stage2_rates(case: Case, checks: Checks) -> None:
    """Rates of stage 2 by epoch."""
    what = str(case.raw.get("what", ""))

    def number(pattern: str, default: float) -> float:
        found = re.search(rf"{pattern}\s*(?:is\s*|=\s*)?({NUMBER})", what)
        return float(found[1]) if found else default

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=float(case.build["base_lr"]))
    settings = ScheduleSettings(
        epochs=int(case.build["epochs"]), min_lr=number("min", 1e-5),
        warmup_epochs=0 if "no warm-up" in what else int(number("warm-up", 5)), warmup_lr=number("epochs from", 1e-6),
    )  # fmt: skip
    scheduler, _ = build_schedule(optimizer, settings)
    rates = []
    for epoch in range(len(checks.stored[f"{case.name}/lr"])):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    compare(case, checks, {"lr": np.array(rates)})


def norms(model: GatedTransformer, what: str) -> Tensor:
    """Norms of the weights that the text names."""
    found = re.search(r"norms of ((?:[\w.]+, )*[\w.]*\w)", what)
    names = found[1].split(", ") if found else NORMS
    return torch.stack([model.get_parameter(name).detach().norm() for name in names])


def batch_of(case: Case, model: GatedTransformer, seed: int) -> tuple[Tensor, Tensor]:
    """Images and class probabilities of a training batch."""
    found = re.search(r"batch(?:es)? of (\d+)", str(case.raw.get("what", "")))
    size = int(case.raw.get("batch", found[1] if found else 2))
    targets = tensor("targets", (size, model.num_classes), seed).softmax(-1)
    return image(size, case.build["img_size"], seed), targets


def keep(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """No mixing."""
    return images, targets


def stated_criterion(case: Case, *, seed_of_teacher: int) -> DistillationLoss:
    """The loss that the text states, with a teacher of the same configuration, all blocks of which run."""
    what = str(case.raw["what"])
    found = re.search(rf"KD (soft|hard)(?: alpha ({NUMBER}))?(?:,? tau ({NUMBER}))?", what)
    if not found:
        return objective(None)
    teacher = build_model(case, seed=seed_of_teacher)
    with torch.no_grad():
        teacher.block_skip_gating.copy_(torch.tensor([-1.0, 1.0]).expand_as(teacher.block_skip_gating))
    return objective(teacher.eval(), kind=found[1], alpha=float(found[2] or 0.5), tau=float(found[3] or 1.0))


def run_stage1(case: Case, checks: Checks) -> None:
    """Epochs of stage 1 by its own hooks, in the order of ``common.run.engine.train``."""
    what, args = str(case.raw["what"]), case.raw["args"]

    def number(pattern: str) -> float:
        found = re.search(pattern, what)
        if not found:
            raise NotCovered(f"a text that lacks {pattern!r}")
        return float(found[1])

    epochs, iterations = int(number(r"(\d+) epochs?")), int(number(r"of (\d+) iterations?"))
    lr, decay = number(rf"AdamW lr ({NUMBER})"), number(rf"wd ({NUMBER})")
    warm = re.search(r"epochs? (?:\d+(?:-|, | and | to ))*(\d+) (?:is|are) warm-up", what)
    warmup_lr = re.search(rf"warmup_lr ({NUMBER})", what)
    patches = int(args.get("enable_patch_gating", 0))
    model = register_masks(build_model(case))
    assert isinstance(model, GatedTransformer)
    apply_gate_args(model, args)
    if patches == 1:
        model.add_patch_gates()
        model.gates.patch = "soft"
    offset = re.search(r"seed\+(\d+), gates", what)
    criterion = stated_criterion(case, seed_of_teacher=case.seed + (int(offset[1]) if offset else 1))
    model.train()
    settings = settings_of(
        args, gating_interval=int(number(r"gating_interval (\d+)")),
        z_grad_clip=float(args.get("z_grad_clip", 0.5)),
    )  # fmt: skip
    state = PrimalDual(model, settings, seed=None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay)
    total = int(number(r"warm-up steps of (\d+)"))
    decay_type = re.search(r"(cosine|linear|constant) with", what)
    factor = warmup_factor(
        decay_type[1] if decay_type else "cosine", warmup_steps=int(number(r"with (\d+) warm-up steps")),
        total_steps=total,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    training = JointTraining(
        model=model, optimizer=optimizer, scheduler=scheduler, primal_dual=state,
        criterion=criterion, mix=keep,
        settings=JointSettings(
            warmup_epochs=int(warm[1]) if warm else 0, warmup_lr=float(warmup_lr[1]) if warmup_lr else 1e-4,
            zlr_schedule={0: state.zlr}, eps_decay=float(args.get("eps_decay", 0.92)), official=True,
            log_interval=10**9, select_ratio=float(args.get("patch_ratio", 0.9)) if patches == 2 else None,
            total_steps=epochs * iterations,
        ),
    )  # fmt: skip
    optimization = Optimization(optimizer, clip_grad=number(rf"grad clip ({NUMBER})"))
    rows: dict[str, list[Tensor]] = {}
    resources: list[Tensor] = []
    step_dual = state.step

    def recorded(rate: float, *, warmup: bool = False) -> Any:
        resources.append(step_dual(rate, warmup=warmup))
        return resources[-1]

    state.step = recorded  # pyright: ignore[reportAttributeAccessIssue] - to see R of each step
    with replay(int(case.raw["noise_seed"])) as draws:
        for epoch in range(epochs):
            training.epoch_start(epoch)
            for iteration in range(iterations):
                step = epoch * iterations + iteration + 1
                optimization.zero_grad()
                batch = batch_of(case, model, case.seed + 10 * (epoch + 1) + iteration)
                terms = training.step(batch, optimization)
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                gnorm = torch.stack([grad.norm() for grad in grads]).norm()
                rate = optimizer.param_groups[0]["lr"]
                optimization.step()
                scheduler.step()
                training.after_step(StepInfo(epoch, iteration, step, (optimizer.param_groups[0]["lr"],)))
                now = trajectory(state, resources[-1])
                now |= {"loss": terms["loss"], "gnorm": gnorm, "lr": torch.tensor(rate), "params": norms(model, what)}
                for name, value in now.items():
                    rows.setdefault(name, []).append(value)
    if "draws" in case.raw:
        checks.equal("draws", [list(shape) for shape in draws], case.raw["draws"])
    compare(case, checks, {name: torch.stack(values) for name, values in rows.items()})


def run_stage2(case: Case, checks: Checks) -> None:
    """Iterations of stage 2 by its own hooks, then logits of the masked network."""
    what = str(case.raw["what"])
    model = register_masks(build_model(case))
    assert isinstance(model, GatedTransformer)
    update_masks_(model, *stated_numbers(case, model), keep_stale=True)
    model.fix_blocks()
    freeze_structure(model)
    model.train()
    rate = re.search(rf"AdamW ({NUMBER})", what)
    decay = re.search(rf"wd ({NUMBER})", what)
    lr, weight_decay = float(rate[1]) if rate else 1e-3, float(decay[1]) if decay else 0.05
    optimizer = build_optimizer(model, OptimizerSettings(lr, weight_decay=weight_decay))
    tuning = FineTuning(model=model, criterion=objective(None), mix=keep)
    clip = re.search(rf"clip ({NUMBER})", what)
    optimization = Optimization(optimizer, clip_grad=float(clip[1]) if clip else None)
    losses, shown = [], []
    for iteration in range(len(checks.stored[f"{case.name}/loss"])):
        optimization.zero_grad()
        losses.append(tuning.step(batch_of(case, model, case.seed + iteration), optimization)["loss"])
        optimization.step()
        shown.append(norms(model, what))
    tuning.apply_masks()
    found = re.search(r"seed\+(\d+) \(batch (\d+)\)", what)
    offset, size = (int(found[1]), int(found[2])) if found else (9, 3)
    with torch.no_grad():
        logits = model.eval()(image(size, case.build["img_size"], case.seed + offset))
    compare(case, checks, {"loss": torch.stack(losses), "params": torch.stack(shown), "final_logits": logits})

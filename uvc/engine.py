"""The training steps of both stages, and what surrounds them: phases, masks, evaluation, records.

UVC, arXiv:2203.08243. ``JointTraining`` (stage 1) learns weights, pruning numbers and
gates together; ``FineTuning`` (stage 2) trains the weights of the architecture found. Their methods are the hooks of
``common.run.engine.Trainer.fit``.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.losses import DistillationLoss
from common.run.engine import Optimization, StepInfo
from common.run.files import write_atomic
from common.run.launch import get_world_size
from common.run.metrics import Record
from common.run.program import get_logger, is_main
from uvc.data import Mix
from uvc.loading import file_stem, save_masked
from uvc.losses import patch_penalty
from uvc.models.gates import GatedTransformer, count_mask_elements, masked_weights
from uvc.pruning import group_scores, update_masks_, with_masks
from uvc.schedules import selection_tau, zlr_at
from uvc.settings import JointSettings
from uvc.uvc_optimizer import PrimalDual

logger = get_logger(__name__)

FEW_BLOCKS = 3


@dataclass(eq=False, kw_only=True)
class Training:
    """What both stages do with a batch.

    Args:
        model: the bare backbone with masks.
        network: the same as the training step calls it; None for the model itself.
        criterion, mix: loss and mixing.
        parts: pieces of a batch whose gradients add up before the optimizer steps; ranks exchange them once.
    """

    model: GatedTransformer
    criterion: DistillationLoss
    mix: Mix
    parts: int = 1
    network: nn.Module | None = None
    steps: int = field(default=0, init=False)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class and of the distillation token, (B, C) each."""
        return (self.network or self.model)(images)

    def loss(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Terms of images with labels or class probabilities; the teacher runs once."""
        images, targets = self.mix(images, targets)
        taught = self.criterion.teach(images)
        return self.criterion.terms(*self.outputs(images), targets, taught)

    def back_propagate(self, batch: tuple[Tensor, Tensor], optimization: Optimization) -> dict[str, Tensor]:
        """Gradients of images (B, 3, height, width) and targets (B, ...); the terms are the means of the pieces'."""
        images, targets = batch
        if len(images) % self.parts:
            raise ValueError(f"a batch of {len(images)} images cannot be taken in {self.parts} equal parts")
        sums: dict[str, Tensor] = {}
        pieces = list(zip(images.chunk(self.parts), targets.chunk(self.parts), strict=True))
        for index, piece in enumerate(pieces):
            last = index + 1 == len(pieces)
            with contextlib.nullcontext() if last else optimization.no_sync():
                terms = self.loss(*piece)
                optimization.backward(terms["loss"] / self.parts)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / self.parts
        return sums


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1


@dataclass(eq=False, kw_only=True)
class JointTraining(Training):
    """Stage 1 on one model.

    Args:
        optimizer, scheduler: of the weights, gates included; the schedule advances by step.
        primal_dual: of the same model.
        settings: see ``JointSettings``.
        record: gets rows of the structure.
        folder: where files go, or None.
        model_type, classes: for the files; the latter are the names of the data's classes, a line each.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    primal_dual: PrimalDual
    settings: JointSettings
    record: Record | None = None
    folder: Path | None = None
    model_type: str = ""
    classes: str | None = None
    epoch: int = field(default=0, init=False)
    dumped: dict[str, dict[int, Any]] = field(default_factory=lambda: {"s": {}, "r": {}, "gating": {}}, init=False)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d-%H:%M:%S"), init=False)

    @property
    def warming_up(self) -> bool:
        """Whether the current epoch belongs to the warm-up."""
        return self.epoch < self.settings.warmup_epochs

    # Hooks of the loop

    def enter(self, epoch: int, steps: int = 0) -> None:
        """Set what depends on the epoch (from 0) alone; for a run that starts or resumes in it."""
        self.epoch, self.steps = epoch, steps
        self.model.gates.warmup = self.warming_up

    def epoch_start(self, epoch: int) -> None:
        """Once at the start of each epoch: phase, rates, masks."""
        settings = self.settings
        self.enter(epoch, self.steps)
        if self.warming_up:
            for group in self.optimizer.param_groups:
                group["lr"] = settings.warmup_lr
        else:
            self.model.gates.eps *= settings.eps_decay
            if settings.warmup_reset and epoch == settings.warmup_epochs > 0:
                self._restart()
        self.primal_dual.epoch_start()
        self.primal_dual.zlr = zlr_at(dict(settings.zlr_schedule), epoch + 1)
        self.share_variables()
        self.update_masks()
        logger.info("Start [Epoch %d] at Stage %s", epoch + 1, "Warm Up" if self.warming_up else "UVC Train")

    def step(self, batch: tuple[Tensor, Tensor], optimization: Optimization, /) -> dict[str, Tensor]:
        """Loss and gradients of a batch; none of the gates while they are frozen in the warm-up."""
        terms = self.back_propagate(batch, optimization)
        if self.warming_up:
            self.model.block_skip_gating.grad = None
        patches = self.primal_dual.patches
        if patches is not None and patches.grad is not None:
            # the optimizer of the weights does not hold it, so that nobody else takes the loss scale of fp16 out
            patches.grad.div_(optimization.scaler.scale(torch.ones((), device=patches.device)))
        return terms

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """With patch tokens selected by image, where that is wanted."""
        if self.settings.select_ratio is None:
            return super().outputs(images)
        tau = selection_tau(self.steps, self.settings.total_steps)
        return (self.network or self.model)(images, tau, self.settings.select_ratio)

    def loss(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The terms, and the penalty on patch gates."""
        terms = super().loss(images, targets)
        if self.settings.patch_l1_weight and self.primal_dual.patches is not None:
            terms["patches"] = patch_penalty(self.primal_dual.patches, self.settings.patch_l1_weight)
            terms["loss"] = terms["loss"] + terms["patches"]
        gates = self.model.block_skip_gating
        if self.warming_up and gates.requires_grad:  # ranks wait for a gradient of every parameter
            terms["loss"] = terms["loss"] + 0.0 * gates.sum()
        return terms

    def after_step(self, info: StepInfo) -> dict[str, float]:
        """The primal-dual step; numbers to log at the interval, which alone waits for the device."""
        self.steps = info.step
        resource = self.primal_dual.step(info.learning_rates[0], warmup=self.warming_up)
        if self.primal_dual.patches is not None:
            self.primal_dual.patches.grad = None  # the optimizer of the weights does not hold it, nor clear it
        if info.step % self.settings.log_interval:
            return {}
        cost = float(resource)
        if is_main():
            row = {"epoch": info.epoch, "step": info.step, "resource": cost, **self.structure_row()}
            if self.record is not None:
                self.record.write("structure", row)
            if self.settings.official and not self.warming_up:
                self.dump(info.step, row)
        return {"resource": cost, "z": float(self.primal_dual.z)}

    def evaluate(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Accuracy (``measure`` takes it) and remaining cost after an epoch, and this epoch's file.

        By default of the network that stage 2 would start from: weights masked, blocks run or not, patches removed. In
        the official form of the noisy soft gates and unmasked weights.
        """
        self.update_masks()
        with contextlib.ExitStack() as stack:
            if not self.settings.official:
                stack.enter_context(with_masks(self.model))
                stack.enter_context(deployed_gates(self.model, remove=self.primal_dual.settings.learn_patches))
            metrics = measure()
        metrics |= self.report(metrics)
        if self.folder is not None and is_main():
            self.save(self.folder / f"{file_stem(self.model_type)}_{self.epoch + 1}.pth.tar", metrics)
        return metrics

    # Parts

    def update_masks(self) -> None:
        """Masks of what s and r remove now."""
        state = self.primal_dual
        update_masks_(self.model, state.s, state.r, keep_stale=self.settings.official)

    def share_variables(self) -> None:
        """Give every rank rank 0's variables; equal noise and gradients keep them equal but for rounding."""
        if get_world_size() > 1:
            state = self.primal_dual
            shared = [state.s, state.r, state.y, state.p, state.z, self.model.block_skip_gating]
            for variable in shared if self.model.patch_gating is None else [*shared, self.model.patch_gating]:
                dist.broadcast(variable.detach(), src=0)

    def _restart(self) -> None:
        self.optimizer.state = defaultdict(dict)
        self.scheduler.last_epoch = -1
        self.scheduler.step()

    def deployed_ratio(self) -> float:
        """Remaining cost of the whole network by the hard gates and the masks to come. Waits for the device."""
        state = self.primal_dual
        run = torch.tensor(self.model.runs()).to(state.s) if state.settings.enable_block_gating else None
        with torch.no_grad():
            return float(state.whole_cost.ratio(state.s, state.r, group_scores(self.model).heads, run, state.patches))

    def structure_row(self) -> dict[str, Any]:
        """Per block and as lists: s, r, gates and duals, and what survives. Waits for the device."""
        state, model = self.primal_dual, self.model
        s = state.s.detach()
        row: dict[str, Any] = {
            "budget": state.settings.budget,
            "remaining": self.deployed_ratio(),
            "blocks_running": sum(model.runs()),
            "heads_kept": (model.num_heads - s[:, 0].ceil()).tolist(),
            "neurons_kept": (model.hidden_dim - s[:, 1].ceil()).tolist(),
            "gates": model.block_skip_gating.tolist(),
            "z_lr": state.zlr,
        }
        if model.patch_gating is not None:
            row["patches_kept"] = len(model.find_kept_patches())
        return row | {name: getattr(state, name).tolist() for name in ("s", "r", "y", "p", "z")}

    def report(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log the sparsity lines of the published logs; returns their numbers in percent."""
        kept, size = count_mask_elements(self.model)
        with torch.no_grad():
            sampled = self.settings.official and self.warming_up  # the published lines then show a hard sample
            expected = float(self.primal_dual.resource(group_scores(self.model), hard=sampled or None))
        remaining, running = self.deployed_ratio(), sum(self.model.runs())
        logger.info("Valid Loss: %.4f\nValid Accuracy: %.3f", metrics["loss"], metrics["top1_percent"])
        logger.info(
            "[Validation Sparsity|Step %d|Epoch %d]\nParameter size: %.2fM / %.2fM = %.2f%%",
            self.steps, self.epoch + 1, float(kept) / 1e6, size / 1e6, 100 * float(kept) / size,
        )  # fmt: skip
        logger.info("Expectation FLOPs: %.2f%% Real FLOPs: %.2f%%", 100 * expected, 100 * remaining)
        if not self.primal_dual.settings.flops_with_mhsa:
            logger.info("(expected: of the output projections, which the budget holds; real: of the whole network)")
        if not self.warming_up and running < FEW_BLOCKS <= len(self.model.blocks):
            logger.warning(
                "only %d of %d blocks run: the budget is met by skipping alone. A lower --gating_weight or --glr, "
                "or smaller numbers first in --zlr_schedule_list, let pruning inside blocks take its part",
                running, len(self.model.blocks),
            )  # fmt: skip
        return {
            "kept_parameters_percent": 100 * float(kept) / size,
            "expected_cost_percent": 100 * expected,
            "remaining_cost_percent": 100 * remaining,
            "blocks_running": running,
        }

    def dump(self, step: int, row: Mapping[str, Any]) -> None:
        """The published JSON files of s, r and gates: {step: nested lists}, named by the time the run started."""
        if self.folder is None:
            return
        for name, content in self.dumped.items():
            content[step] = row["gates" if name == "gating" else name]
            write_atomic(self.folder / f"{name}_{self.started}.json", json.dumps(content))

    def save(self, path: Path, metrics: Mapping[str, float]) -> None:
        """This epoch's file for stage 2."""
        learned = self.primal_dual.settings.learn_patches
        patch_mode = "remove" if learned else "soft" if self.model.patch_gating is not None else "off"
        save_masked(
            path, self.model, model_type=self.model_type, bare=self.settings.official, patch_mode=patch_mode,
            epoch=self.epoch + 1, step=self.steps, metrics=dict(metrics), variables=self.structure_row(),
            data={"classes": self.classes},
        )  # fmt: skip


@contextlib.contextmanager
def deployed_gates(model: GatedTransformer, *, remove: bool) -> Generator[None]:
    """Blocks run or are skipped, patches are removed if ``remove``, inside; as before after."""
    before = model.gates
    model.gates = replace(before, block_gating=False, warmup=False, patch="remove" if remove else before.patch)
    try:
        yield
    finally:
        model.gates = before


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2


@dataclass(eq=False, kw_only=True)
class FineTuning(Training):
    """Stage 2 on one model, masked and fixed (``loading.load_masked``): weights trained, masks and structure fixed.

    Args:
        before_step: called with the number of steps done before each batch, for pruning that goes on; says whether it
            changed masks.
        observe: called after each optimizer step, gradients still there; numbers it returns are logged.
    """

    before_step: Callable[[int], bool] | None = None
    observe: Callable[[StepInfo], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        self.find_masked()

    def find_masked(self) -> None:
        """Look up which weights have masked elements; again after masks changed. Waits for the device."""
        self.masked = [(weight, mask) for weight, mask in masked_weights(self.model) if not bool(mask.all())]

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero the masked weights, which the optimizer's step has moved."""
        for weight, mask in self.masked:
            weight.mul_(mask)

    def step(self, batch: tuple[Tensor, Tensor], optimization: Optimization, /) -> dict[str, Tensor]:
        """Loss and gradients of a batch with masked weights."""
        if self.before_step is not None and self.before_step(self.steps):
            self.find_masked()
        self.apply_masks()
        return self.back_propagate(batch, optimization)

    def after_step(self, info: StepInfo) -> dict[str, float]:
        """Counts steps."""
        self.steps = info.step
        return self.observe(info) if self.observe is not None else {}

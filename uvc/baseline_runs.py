"""Networks and masks of the pruning baselines, at the start of a run and while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.build import open_split
from common.data.datasets import num_classes
from common.data.loaders import train_loader
from common.run.engine import StepInfo
from common.run.errors import UsageError
from common.run.launch import get_world_size
from common.run.program import get_logger
from common.run.settings import DataSettings
from uvc import baseline_scores as scoring
from uvc.data import build_transforms
from uvc.loading import Masked, freeze_structure, load_masked
from uvc.models import create, input_size
from uvc.models.gates import GatedTransformer, register_masks
from uvc.settings import PruningSettings, Run

logger = get_logger(__name__)

SMALL = 0.01
"""A gradient's element is next to nothing below this share of its layer's root mean square."""


def open_dense(data: DataSettings, model_type: str, source: str | None, *, img_size: int | None) -> Masked:
    """The dense network of a checkpoint with masks of ones, or one of random weights without it."""
    if source:
        dense = load_masked(source, model_type)
    else:
        size = img_size or input_size(model_type)
        classes = num_classes(open_split(data, "val", None))
        dense = Masked(register_masks(create(model_type, num_classes=classes, img_size=size)), model_type)
    dense.model.fix_blocks([True] * len(dense.model.blocks))
    return dense


def prepare(model: GatedTransformer, scratch: str | None) -> None:
    """Freeze what masks and gates leave out; with the name of a network, start from random weights of it."""
    if scratch is not None:
        fresh = create(scratch, num_classes=model.num_classes, img_size=model.image_size[0])
        own = {name: value for name, value in fresh.state_dict().items() if not name.endswith("gating")}
        model.load_state_dict(own, strict=False)
    freeze_structure(model)


def scoring_batches(run: Run, model: GatedTransformer, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches up to a number of images; each rank has its own, and rank 0's scores are taken."""
    data, size = run.data, model.image_size[0]
    dataset = open_split(data, "train", build_transforms(run, size)[0])
    device, seen = next(model.parameters()).device, 0
    for inputs, labels in train_loader(dataset, batch_size=data.batch_size, workers=0, seed=data.seed):
        yield inputs.to(device), labels.to(device)
        seen += len(inputs)
        if seen >= images:
            return


def prune(model: GatedTransformer, settings: PruningSettings, run: Run) -> None:
    """Set the masks that hold from the first step on; ``run`` says which images are scored."""
    method, scores = settings.method, None
    model.train()  # as the release scores
    if method == "omp":
        scores = scoring.magnitude_scores(model)
    elif method == "taylor":
        scores = scoring.taylor_scores(model, scoring_batches(run, model, settings.score_images))
    elif method == "synflow":
        scores = scoring.synflow_scores(model)
    elif method == "gradient-sparsity":
        generator = torch.Generator().manual_seed(run.data.seed)
        layers = scoring.magnitude_scores(model)
        scores = {name: torch.rand(value.shape, generator=generator).to(value) for name, value in layers.items()}
    elif method == "structured":
        heads, neurons, _ = scoring.structured_scores(model, *next(scoring_batches(run, model, 1)))
        kept = scoring.best(heads, settings.attention_density), scoring.best(neurons, settings.mlp_density)
        scoring.set_structured_masks_(model, *kept)
    if scores is not None:
        scoring.set_masks_(model, scoring.masks_of(scores, settings.density, scope=settings.scope))
    if get_world_size() > 1:  # ranks may have scored other images
        for name, mask in model.named_buffers():
            if name.endswith("mask"):
                torch.distributed.broadcast(mask, src=0)
    logger.info("%s: %.2f %% of the weights are kept", method, 100 * scoring.density_of(model))


@dataclass
class Gradual:
    """Gradual magnitude pruning: before a step that is one of its events, masks of the sparsity then due."""

    model: GatedTransformer
    settings: PruningSettings

    def __call__(self, steps: int) -> bool:
        """Called with the number of steps done; whether masks changed."""
        start, interval, times = self.settings.t_start, self.settings.delta_t, self.settings.pruning_times
        event, rest = divmod(steps - start, interval)
        if rest or not 1 <= event <= times:
            return False
        final = 1 - self.settings.density
        sparsity = scoring.gmp_sparsity(steps, start=start, interval=interval, times=times, final=final)
        scores = scoring.magnitude_scores(self.model)
        scoring.set_masks_(self.model, scoring.masks_of(scores, 1 - sparsity, scope=self.settings.scope))
        logger.info("gmp at step %d: sparsity %.2f %%", steps, 100 * sparsity)
        return True

    def check(self, steps: int) -> None:
        """Whether a run of so many steps reaches the last event.

        Raises:
            UsageError: it does not, and would end above its density.
        """
        last = self.settings.t_start + self.settings.pruning_times * self.settings.delta_t
        if last >= steps:
            raise UsageError(
                f"gmp would not reach its density: its last event is before step {last + 1}, the run has {steps} "
                "steps. Give a smaller --t_start, --delta_t or --pruning_times, or more --epochs"
            )


def gradient_observer(model: GatedTransformer, interval: int) -> Callable[[StepInfo], dict[str, float]]:
    """``gradient_sparsity`` every so many steps, the last values in between."""
    observed: dict[str, float] = {}

    def observe(info: StepInfo) -> dict[str, float]:
        if info.step % interval == 0 or not observed:
            observed.update(gradient_sparsity(model))
        return observed

    return observe


@torch.no_grad()
def gradient_sparsity(model: GatedTransformer) -> dict[str, float]:
    """Percent of the kept weights' gradients that are zero, or next to nothing in their layer. Waits for the device."""
    zero = small = total = 0.0
    for layer in scoring.prunable(model).values():
        weight, mask = layer.get_parameter("weight"), layer.get_buffer("mask") != 0
        if weight.grad is not None and mask.any():
            kept = weight.grad[mask].abs()
            zero += float((kept == 0).sum())
            small += float((kept <= SMALL * kept.square().mean().sqrt()).sum())
            total += kept.numel()
    return {"gradient_zero_percent": 100 * zero / max(total, 1), "gradient_small_percent": 100 * small / max(total, 1)}

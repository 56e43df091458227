"""From settings to the objects of Scala's runs: network, teacher, losses."""

from __future__ import annotations

from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.hosts.opening import timm_state
from common.losses import DistillationLoss, label_criterion
from common.run.checkpoint import load_strict, read_checkpoint, select_state
from common.run.errors import CheckpointError, UsageError
from common.run.launch import main_process_first
from common.run.program import get_logger
from common.sizes import TIMM
from scala import models_mobilenet, models_scala, models_timm, models_uniformer
from scala.arguments import TOKENS, LossSettings, NetworkSettings
from scala.losses import CosubLoss, ScalaLosses
from scala.slicing import WidthGrid, check_sampling
from scala.weights import load_for_finetuning

logger = get_logger(__name__)

BATCH_NORM_MODELS = (*models_mobilenet.MODELS, *models_uniformer.MODELS)
"""Models with batch statistics per trained width, which therefore know the granularity."""
NAMES = (*models_scala.FACTORIES, *BATCH_NORM_MODELS)
"""Every ``--model`` of this package."""


def build_model(settings: NetworkSettings, classes: int) -> Any:
    """The network of ``--model``, with random weights or those of ``--finetune``.

    Raises:
        UsageError: an unknown name, an override that the model does not take, or a network of timm that cannot be
            sliced, naming the module.
    """
    name = settings.model
    timm_name = name.removeprefix(TIMM) if name.startswith(TIMM) else None
    if timm_name is None and name not in NAMES:
        raise UsageError(
            f"no sliceable network {name!r}: it is no model of this package; they are {', '.join(NAMES)}, and "
            f"{TIMM}NAME for any plain ViT of timm"
        )
    options: dict[str, Any] = {
        "img_size": settings.input_size, "drop_rate": settings.drop, "drop_path_rate": settings.drop_path,
        "official_layer_scale": settings.official_layer_scale or None,
        "official_anchors": settings.official_anchors or None,
        "isolated_activation": None if settings.isolated_activation in (None, True) else False,
        "granularity": settings.granularity if name in BATCH_NORM_MODELS else None,
    }  # fmt: skip
    for key in ("smallest_ratio", "largest_ratio", "embed_dim", "depth", "num_heads", "patch_size", "init_values"):
        options[key] = getattr(settings, key)
    try:
        given = {key: value for key, value in options.items() if value is not None}
        if timm_name is None:
            model: Any = timm.create_model(name, num_classes=classes, **given)
        else:
            model = build_timm(timm_name, settings.finetune, num_classes=classes, **given)
    except TypeError as error:
        raise UsageError(f"--model {name} does not take one of the flags given: {error}") from error
    if settings.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"--model {name} has no gradient checkpointing")
        model.set_grad_checkpointing()
    if not settings.train_mode and hasattr(model, "pair_outputs"):
        model.pair_outputs = True  # the losses need both heads, in whatever mode
    if settings.finetune and timm_name is None:
        load_for_finetuning(model, select_state(read_checkpoint(settings.finetune)), source=settings.finetune)
    if settings.attn_only:
        for key, weight in model.named_parameters():
            weight.requires_grad_(".attn." in key or key in ("head.weight", "head.bias", "pos_embed"))
    return model


def build_timm(
    name: str, weights: str, *, smallest_ratio: float, largest_ratio: float, isolated_activation: bool = True,
    **options: Any,
) -> models_timm.TimmViT_scala:  # fmt: skip
    """A plain ViT of timm at any width.

    Args:
        weights: to start from: path, URL, ``timm`` for timm's own, or empty for random ones. A head of other classes
            is replaced.
        options: of timm's factory.

    Raises:
        UsageError: an unknown name, or a network that cannot be sliced.
        CheckpointError: weights that do not fit.
        TypeError: an option that it does not take.
    """
    trained_on = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic"}
    net = models_timm.make_timm(name, pretrained_cfg_overlay=trained_on, **options)
    if weights == "timm":
        own = {key: value for key, value in options.items() if key != "num_classes"}
        published = create_timm(name, pretrained=True, flags=("--model", "--weights"), **own)
        load_for_finetuning(net, published.state_dict(), source=weights)
    elif weights:
        state = select_state(read_checkpoint(weights), source=weights)
        load_for_finetuning(net, timm_state(name, net, state), source=weights)
    return models_timm.TimmViT_scala(net, smallest_ratio, largest_ratio, isolated_activation=isolated_activation)


def create_timm(
    name: str, *, pretrained: bool, flags: tuple[str, str] = ("--teacher-model", "--teacher-path"), **options: Any
) -> Any:
    """A network of timm, with timm's own weights if ``pretrained``, which one process downloads for all.

    Args:
        flags: that give the name and the weights.

    Raises:
        CheckpointError: no such network, an option that it does not take, or a download that failed; says what to do.
    """
    if not timm.is_model(name):
        raise CheckpointError(f"{flags[0]} {name!r} is not a network of timm")
    try:
        with main_process_first():
            return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise CheckpointError(f"{flags[0]} {name} takes no image size ({error}): give a ViT of timm") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"timm could not load the weights of {flags[0]} {name} ({error}); get its file elsewhere and give "
            f"{flags[1]} FILE"
        ) from error


def build_teacher(name: str, path: str, classes: int, *, input_size: int) -> nn.Module:
    """The external teacher: a timm model in evaluation mode, its weights loaded strictly.

    Args:
        path: checkpoint or URL; ``timm`` for timm's own weights.

    Raises:
        CheckpointError: timm has no such model, or the weights do not fit it.
    """
    options: dict[str, Any] = {"pretrained": path == "timm", "num_classes": classes}
    teacher = create_timm(name, **options)
    side = teacher.default_cfg["input_size"][-1]
    if input_size != side and isinstance(teacher, VisionTransformer):
        logger.info("the teacher was built for %d pixels: its position embedding is resized in each pass", side)
        teacher = create_timm(name, **options, dynamic_img_size=True)
    if path != "timm":
        load_strict(teacher, select_state(read_checkpoint(path), source=path), source=path)
    return teacher.eval().requires_grad_(False)


def build_losses(settings: LossSettings, teacher: nn.Module | None, *, mixing: bool) -> ScalaLosses:
    """The losses of the four passes; the labels' criterion is DeiT's choice."""
    base = nn.BCEWithLogitsLoss() if settings.bce_loss else label_criterion(mixed=mixing, smoothing=settings.smoothing)
    criterion: nn.Module = CosubLoss()
    if not settings.cosub:
        kind, alpha = settings.distillation_type, settings.distillation_alpha
        criterion = DistillationLoss(base, teacher, kind, alpha, settings.distillation_tau)
    return ScalaLosses(
        criterion, kind=settings.distill_type, token=TOKENS[settings.token_type],
        ce_coefficient=settings.ce_coefficient, ce_type=settings.ce_type,
    )  # fmt: skip


def check_training(grid: WidthGrid, model: Any, *, alone: bool) -> list[float]:
    """The widths that will have been trained: the largest ``alone``, or all of the grid.

    Raises:
        WidthError: no middle widths to draw, or a width that the model cannot have.
    """
    if not alone:
        check_sampling(grid)
    ratios = [grid.largest] if alone else grid.ratios
    for ratio in ratios:
        model.check_ratio(ratio)
    return ratios

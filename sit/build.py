"""From settings to the objects of a run: student, teachers, criterion, training step.

Everything that a wrong flag could spoil is checked here, before the first image is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.models._factory import create_model
from torch import Tensor, nn

from common.data.build import build_mixup, build_train_transform, open_split
from common.data.loaders import Loader, train_loader
from common.hosts.network import Lean
from common.losses import label_criterion
from common.run.checkpoint import load_strict
from common.run.errors import UsageError
from common.run.launch import World
from common.run.precision import amp_dtype
from common.run.program import get_logger
from common.run.settings import AugmentationSettings, DataSettings, RunSettings
from common.run.wrapping import shard
from common.sizes import TIMM
from sit.arguments import Job, SiTSettings
from sit.engine import store_for_autocast, training_step
from sit.loading import (
    WeightsFile,
    check_teacher_fits,
    check_timm_teacher_fits,
    load_for_evaluation,
    load_for_training,
    load_timm,
    read_weights,
)
from sit.losses import DistillationLoss
from sit.models import LVViT, timm_vit
from sit.models.lvvit import build_lvvit
from sit.token_labeling import DenseNetwork, LabelledImages, make_step

logger = get_logger(__name__)


def check_flags(job: Job) -> None:
    """What can be said before anything is read.

    Raises:
        UsageError: naming the flags.
    """
    own, mixes, odd = job.own, job.augmentation.mixes, job.data.batch_size % 2
    if own.extra_teacher_model and own.distillation_type == "none":
        raise UsageError("--extra-teacher-model needs --distillation-type frd: only slimmed networks have its token")
    for flag, given in (("extra-teacher-model", own.extra_teacher_model), ("token-label-data", own.token_label_data)):
        if own.of_timm and given:
            raise UsageError(f"--{flag} belongs to LV-ViT, and --model {own.model} has no place for its tokens")
    if own.teacher_model and bool(own.of_timm) != own.teacher_model.startswith(TIMM):
        raise UsageError(
            f"--teacher-model {own.teacher_model} and --model {own.model} are of two kinds: the token loss compares "
            f"LV-ViT with LV-ViT, and {TIMM}NAME with {TIMM}NAME"
        )
    if own.token_label_data and own.distillation_type != "none":
        raise UsageError("--token-label-data trains a teacher: give --distillation-type none")
    if job.run.eval:
        if not own.finetune:
            raise UsageError("--eval needs weights: --finetune FILE, or --resume FILE of a training run")
        return
    if own.teaches and not own.teacher_path:
        raise UsageError(
            "training with --distillation-type frd needs the teacher's weights: --teacher-path FILE. Without any, "
            "train a teacher first: sit/exp/teacher/train.sh"
        )
    if own.extra_teacher_model and not own.extra_teacher_path:
        raise UsageError(
            f"--extra-teacher-model {own.extra_teacher_model} needs its weights: --extra-teacher-path FILE"
        )
    if mixes and odd:
        raise UsageError(
            f"mixup and CutMix pair the images of a batch: --batch-size {job.data.batch_size} must be even"
        )
    if own.token_label_data and (odd or mixes):
        raise UsageError("token labeling mixes tokens by itself: give an even --batch-size, --mixup 0 and --cutmix 0")
    if job.optimizer.lr < job.schedule.min_lr:
        logger.warning(
            "the scaled rate %.3g (--lr %.3g) is below --min-lr %.3g: the rate will rise over the epochs; raise --lr "
            "or lower --min-lr",
            job.optimizer.lr, job.arguments["lr"], job.schedule.min_lr,
        )  # fmt: skip


def label_loader(maps: str, data: DataSettings, augmentation: AugmentationSettings) -> Loader:
    """Images to train on with label maps."""
    transform = build_train_transform(data.input_size, augmentation)
    dataset = LabelledImages(open_split(data, "train", None), data.data_path, maps, data.input_size, transform)
    return train_loader(
        dataset, batch_size=data.batch_size, workers=data.workers, seed=data.seed, pin_memory=data.pin_mem,
        repeated_aug=augmentation.repeated_aug,
    )  # fmt: skip


def make_network(name: str, **options: Any) -> LVViT:
    """A size of ``sit.models``.

    Raises:
        UsageError: options that do not go together.
    """
    try:
        return build_lvvit(name, **options)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def build_student(own: SiTSettings, classes: int, file: WeightsFile | None, *, evaluates: bool) -> Any:
    """The network of --model, with the weights of a file if there is one: LV-ViT, or a lean network of timm's.

    Raises:
        UsageError: a network that cannot be, naming the module where it is timm's.
        CheckpointError: a file that does not fit.
    """
    if own.of_timm:
        return build_timm_student(own, classes, file, evaluates=evaluates)
    options = {**own.options, "num_classes": classes, "distillation_type": own.distillation_type}
    make = partial(
        make_network, own.model, drop_rate=own.drop, drop_path_rate=own.drop_path,
        conv_distillation=bool(own.extra_teacher_model),
    )  # fmt: skip
    model = make(**options)
    if evaluates and file is not None:
        if file.slimmed and file.patches not in (None, model.num_patches):
            # of another size: its own tokens per stage, no reverse modules
            model = make(**options, keeped_patches=file.stage_patches, logits_only=True)
        load_for_evaluation(model, file, allow_stripped=own.allow_stripped)
    elif file is not None:
        load_for_training(model, file)
    if own.lambda_token == 0 and model.recover:  # nothing would train the reverse modules
        model.recover = False
        model.rtsm.requires_grad_(False)
    if own.token_label_data:
        model.aux_head.requires_grad_(True)
    return model


def build_timm_student(own: SiTSettings, classes: int, file: WeightsFile | None, *, evaluates: bool) -> Any:
    """A plain network of timm, slimmed unless there is nothing to distil; evaluation takes the file's tokens."""
    assert own.of_timm
    plain_options = {name: own.options[name] for name in ("img_size", "patch_size") if name in own.options}
    net = timm_vit.make_plain(own.of_timm, num_classes=classes, drop=own.drop, drop_path=own.drop_path, **plain_options)
    kernel = file.state.get("patch_embed.proj.weight") if file is not None and evaluates else None
    if file is not None and kernel is not None and kernel.dim() == 4 and "patch_size" not in own.options:
        side = kernel.shape[-1]
        if kernel.shape[2:] != net.patch_embed.patch_size:  # it would be resampled, for other patches than in training
            raise UsageError(f"{file.source}: its patches are of {side} pixels: give --patch-size {side}")
    stages: Any = {name: own.options.get(name) for name in ("stage_blocks", "keeping_ratio")}
    if own.distillation_type == "none":
        stages = {"stage_blocks": [len(net.blocks)]}
    elif evaluates and file is not None and file.slimmed:
        stages["tokens"] = file.stage_patches
    recover = bool(own.lambda_token)
    if evaluates:
        recover = file is not None and file.recovered_patches == net.patch_embed.num_patches
    try:
        model = timm_vit.slim(net, recover=recover, **stages)
    except ValueError as error:
        raise UsageError(f"--model {TIMM}{own.of_timm}: {error}") from error
    if file is not None:
        load_timm(model, own.of_timm, file, evaluates=evaluates)
    return model


def deployed(model: Any, *, fold_batch_norm: bool = True) -> Any:
    """A student for inference: logits alone, see ``LVViT.deployed`` and ``timm_vit.deployed``."""
    return timm_vit.deployed(model) if isinstance(model, Lean) else model.deployed(fold_batch_norm=fold_batch_norm)


def build_teacher(own: SiTSettings, student: Any, run: RunSettings, world: World) -> nn.Module | None:
    """The network without slimming, in evaluation mode for good, its weights in the precision it runs in.

    None where no loss needs it.
    """
    if not own.teaches:
        return None
    device = world.device
    teacher = build_timm_teacher(own, student) if own.of_timm else build_lvvit_teacher(own, student)
    teacher = teacher.to(device).eval().requires_grad_(False)
    store_for_autocast(teacher, amp_dtype(run.amp, device))
    if run.fsdp:
        shard(teacher, world)
    return teacher


def build_lvvit_teacher(own: SiTSettings, student: LVViT) -> LVViT:
    teacher = make_network(
        own.teacher_model or own.model,
        num_classes=student.num_classes,
        distillation_type=None,
        img_size=student.img_size,
    )
    check_teacher_fits(student, teacher)
    load_for_evaluation(teacher, read_weights(own.teacher_path))
    teacher.with_cp = False
    return teacher


def build_timm_teacher(own: SiTSettings, student: Any) -> timm_vit.Teacher:
    """Of any depth; where the logits have no weight, its head may be for other classes."""
    name = (own.teacher_model or own.model).removeprefix(TIMM)
    sizes = {"img_size": own.options["img_size"], "patch_size": student.patch_embed.patch_size}
    net = timm_vit.make_plain(name, num_classes=student.num_classes, **sizes)
    teacher = timm_vit.Teacher(net, len(student.blocks))
    check_timm_teacher_fits(student.plan.host.facts, teacher.net.plan.host.facts)
    if len(net.blocks) != len(student.blocks):
        logger.info("the teacher lends the tokens of its blocks %s", [index + 1 for index in teacher.chosen])
    file = read_weights(own.teacher_path)
    if own.lambda_logits and file.classes not in (None, student.num_classes):
        raise UsageError(
            f"{file.source}: the teacher's head is for {file.classes} classes, the data has {student.num_classes}: "
            "fine-tune it first (--distillation-type none), or give --lambda-logits 0 to learn from its tokens alone"
        )
    load_timm(teacher.net, name, file, evaluates=True, own_head=not own.lambda_logits)
    return teacher


def build_cnn_teacher(own: SiTSettings, classes: int, run: RunSettings, world: World) -> nn.Module | None:
    """The network of --extra-teacher-model, in evaluation mode for good."""
    if not own.extra_teacher_model:
        return None
    try:
        cnn = create_model(own.extra_teacher_model, num_classes=classes, global_pool="avg")
    except RuntimeError as error:
        raise UsageError(f"--extra-teacher-model: {error}; timm.list_models() has the names") from error
    file = read_weights(own.extra_teacher_path)
    load_strict(cnn, file.state, source=file.source)
    cnn = cnn.to(world.device).eval().requires_grad_(False)
    if run.fsdp:
        shard(cnn, world, whole=True)
    return cnn


def build_step(job: Job, model: Any, network: nn.Module, world: World) -> Callable[[Any], Mapping[str, Tensor]]:
    """The training step of ``network``: the model, or ``DenseNetwork`` around it, under the gradient exchange."""
    own, augmentation = job.own, job.augmentation
    if own.token_label_data:
        options = {"smoothing": augmentation.smoothing, "dense_weight": own.dense_weight}
        return make_step(network, model.grid[0], model.num_classes, **options)
    criterion = DistillationLoss(
        label_criterion(mixed=augmentation.mixes, smoothing=augmentation.smoothing),
        build_teacher(own, model, job.run, world), build_cnn_teacher(own, model.num_classes, job.run, world),
        own.distillation_type, own.lambda_token, own.lambda_logits, own.lambda_cnn, own.distillation_tau,
        weigh_cnn=True,
    )  # fmt: skip
    return partial(
        training_step, network=network, criterion=criterion, mixup=build_mixup(augmentation, model.num_classes)
    )


def wrapped(own: SiTSettings, model: Any) -> nn.Module | None:
    """What the step calls, where it is not the model itself."""
    if own.of_timm:
        return timm_vit.Recovering(model)
    return DenseNetwork(model) if own.token_label_data else None

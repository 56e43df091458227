"""Files of weights: what a file holds, whether it fits, and what to do where it does not.

Three kinds go around under similar names: slimmed checkpoints (``tsm.*``, and ``rtsm.*`` unless stripped), unslimmed
teachers of this paper, and the public LV-ViT of token labeling, which is another network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.hosts.host import Facts
from common.hosts.opening import timm_state
from common.run.checkpoint import (
    CheckpointError,
    keep_own_heads,
    list_key_differences,
    load_strict,
    read_checkpoint,
    resize_pos_embed,
    save_atomic,
    select_state,
)
from common.run.errors import UsageError
from common.run.program import get_logger
from sit.models.lvvit import FACTORIES, LVViT
from sit.sizes import SIZES

logger = get_logger(__name__)

TRAINING_ONLY = ("rtsm.*", "aux_head.*")
"""What evaluation does not use, and a stripped file lacks."""

LEARNED = ("tsm", "rtsm")
"""What slimming adds to a network of timm."""

_HEADS = ("head", "head_dist", "aux_head")
_DISTILLATION_TOKEN = ("dist_token", "dist_pos_embed", "head_dist.")


@dataclass(frozen=True)
class WeightsFile:
    """Weights by name, where they are from, and whether their writer says that training-only parts were removed."""

    state: dict[str, Tensor]
    source: str
    stripped: bool = False
    data: Mapping[str, Any] | None = None
    """what a training file of ours says of its images"""

    @property
    def slimmed(self) -> bool:
        return any(key.startswith("tsm.") for key in self.state)

    @property
    def recovers(self) -> bool:
        """Whether the reverse modules are in it."""
        return any(key.startswith("rtsm.") for key in self.state)

    @property
    def classes(self) -> int | None:
        """Classes of its head, None if it has none."""
        head = self.state.get("head.weight")
        return None if head is None else len(head)

    @property
    def stage_patches(self) -> list[int]:
        """Tokens that its slimming modules put out, in order."""
        biases = {
            key.split(".")[1]: value
            for key, value in self.state.items()
            if key.startswith("tsm.") and key.endswith(".3.bias")
        }
        return [len(biases[index]) for index in sorted(biases, key=int)]

    @property
    def recovered_patches(self) -> int | None:
        """Tokens that its reverse modules recover, None if it has none."""
        ends = [value for key, value in self.state.items() if key.startswith("rtsm.") and key.endswith("mlp1.fc2.bias")]
        return len(ends[0]) if ends else None

    @property
    def patches(self) -> int | None:
        """Patch tokens of its position embedding, None if it has none."""
        embedding = self.state.get("pos_embed")
        return embedding.shape[1] - 1 if embedding is not None and embedding.ndim == 3 else None


def read_weights(source: str | os.PathLike[str], *, key: str = "model") -> WeightsFile:
    """A file of weights, local or at a URL whose file name carries the hash; nothing in it is run.

    Args:
        key: under which a training file's weights are looked for, ``model`` or ``model_ema``; a flat file has none.

    Raises:
        CheckpointError: missing, damaged, no weights, or a training file without that key.
    """
    content = read_checkpoint(source)
    if key != "model" and not isinstance(content.get(key) if isinstance(content, Mapping) else None, Mapping):
        raise CheckpointError(f"{source}: holds no weights under {key!r}; was it trained with --model-ema?")
    state = select_state(content, (key,), source=str(source))
    said = content if isinstance(content, Mapping) else {}
    return WeightsFile(state, str(source), bool(said.get("stripped")), said.get("data"))


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a file


def check_fits(model: LVViT, file: WeightsFile, *, evaluates: bool = False, stripped: bool = False) -> None:
    """Whether a file is one for this model; evaluation needs more of it than training, which starts from teachers, too.

    Args:
        stripped: the file may lack what only training uses.

    Raises:
        CheckpointError: why it is not, what to do, and the keys that differ.
    """
    state = file.state
    first = state.get("patch_embed.conv1.weight")
    blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
    if first is not None and first.ndim == 4 and first.shape[-1] != 3:
        reason = (
            f"it begins with a {first.shape[-1]}x{first.shape[-2]} convolution of {len(first)} channels: this is the "
            "public LV-ViT of the token-labeling repository, another network of the same name, which cannot be used "
            "here. Get the teacher that the SiT README links, or train one: sit/exp/teacher/train.sh"
        )
    elif "pos_embed" not in state or not blocks:
        reason = "it holds no LV-ViT weights (pos_embed and blocks.*)"
    elif (size := (state["pos_embed"].shape[-1], 1 + max(blocks))) != (model.embed_dim, model.depth):
        reason = (
            f"it is of width {size[0]} with {size[1]} blocks, the model of width {model.embed_dim} with {model.depth}: "
            "name the file's size with --model (or, of a teacher, --teacher-model)"
        )
    elif file.slimmed and not model.slimmed:
        reason = (
            "it is a slimmed checkpoint (tsm.*), expected an unslimmed one, such as a teacher; to evaluate or train a "
            "slimmed network give --distillation-type frd"
        )
    elif file.slimmed and file.stage_patches != model.keeped_patches[1:]:
        reason = (
            f"its slimming modules put out {file.stage_patches} tokens, those of the model {model.keeped_patches[1:]}: "
            "another --keeping-ratio, --stage-blocks, --model, or --input-size"
        )
    elif evaluates and model.slimmed and not file.slimmed:
        reason = (
            "it holds no slimming modules (tsm.*): this looks like a teacher. Evaluating a slimmed network needs the "
            "checkpoint that its training wrote; to evaluate a teacher give --distillation-type none"
        )
    elif evaluates and model.num_classes and file.classes not in (None, model.num_classes):
        reason = (
            f"its head is for {file.classes} classes, the network for {model.num_classes}: give its own data, or, "
            f"where the labels are numbers of its classes, --num-classes {file.classes}"
        )
    elif evaluates and model.recover and not (file.recovers or stripped):
        reason = (
            "it holds no reverse modules (rtsm.*), which a checkpoint of training does. Evaluation does not use them: "
            "if it was stripped on purpose, give --allow-stripped"
        )
    else:
        return
    raise _refuse(file, model, reason)


def _refuse(file: WeightsFile, model: LVViT, reason: str) -> CheckpointError:
    found = list_key_differences(model, file.state).lines()
    return CheckpointError("\n".join([f"{file.source}: {reason}", *found]))


def _fit_positions(model: LVViT, file: WeightsFile) -> dict[str, Tensor]:
    """The file's weights, positions resized if the model has another number of patches and that is legal."""
    state = dict(file.state)
    if file.patches is None or file.patches == model.num_patches:
        return state
    if model.recover and file.recovers:
        raise _refuse(
            file,
            model,
            f"it was trained for {file.patches} patches, the model is for {model.num_patches}: the widths of the "
            "reverse modules depend on that number, so a slimmed network cannot train on at another --input-size",
        )
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], model.grid, source=file.source)
    logger.warning("%s: position embedding resized from %d to %d patches", file.source, file.patches, model.num_patches)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_for_evaluation(model: LVViT, file: WeightsFile, *, allow_stripped: bool = False) -> None:
    """Strictly, as published: a slimmed model's file must hold the reverse modules too, unless it was stripped.

    Args:
        allow_stripped: take a file without ``rtsm.*`` and ``aux_head.*`` although it does not say that it was stripped.

    Raises:
        CheckpointError: what does not fit, and what to do.
    """
    stripped = file.stripped or allow_stripped
    check_fits(model, file, evaluates=True, stripped=stripped)
    state = _fit_positions(model, file)
    load_strict(
        model,
        state,
        allow_missing=TRAINING_ONLY if stripped else (),
        allow_unexpected=TRAINING_ONLY if model.logits_only else (),
        source=file.source,
    )


def load_for_training(model: LVViT, file: WeightsFile) -> tuple[str, ...]:
    """Start from a teacher, or from any file of the same network; what is new is listed in the log.

    Heads of another number of classes are left out with a warning, ``aux_head`` among them, and so is a distillation
    token that the model has not. What a file may lack: slimming and reverse modules, heads, distillation token.

    Returns:
        Keys that the file did not give.

    Raises:
        CheckpointError: what does not fit, and what to do.
    """
    check_fits(model, file)
    state = _fit_positions(model, file)
    own = model.state_dict()
    for head in _HEADS:
        for key in (f"{head}.weight", f"{head}.bias"):
            if key in state and (key not in own or state[key].shape != own[key].shape):
                logger.info("Removing key %s from pretrained checkpoint", key)
                del state[key]
    if "head.weight" in file.state and "head.weight" not in state:
        logger.warning(
            "%s: its head is for %d classes, the network for %d: the head was replaced and starts from random weights",
            file.source, file.classes, model.num_classes,
        )  # fmt: skip
    if not model.conv_distillation:
        state = {key: value for key, value in state.items() if not key.startswith(_DISTILLATION_TOKEN)}
    may_lack = [f"{head}.*" for head in _HEADS] + ["tsm.*", "rtsm.*", "dist_token", "dist_pos_embed"]
    return load_strict(model, state, allow_missing=may_lack, source=file.source).tolerated


def load_timm(model: Any, name: str, file: WeightsFile, *, evaluates: bool, own_head: bool = False) -> None:
    """A file of a plain network of timm, or of its student, into a lean one of ``sit.models.timm_vit``.

    Names, kernels of patches and positions are translated as timm does it.

    Args:
        name: of timm's.
        evaluates: the file must hold all that the model has; in training slimming modules may be new, reverse modules
            may be left out, and a head of other classes is replaced, which is said.
        own_head: leave the model's head where the file's is for other classes, also in evaluation.

    Raises:
        CheckpointError: what does not fit, and what to do.
    """
    dense: nn.Module = model.restore()
    kept = [module.keeped_patches for method in model.methods for module in method.modules]
    if file.slimmed and file.stage_patches != kept:
        raise CheckpointError(
            f"{file.source}: its slimming modules put out {file.stage_patches} tokens, those of the network {kept}: "
            + ("another --keeping-ratio, --stage-blocks or --input-size" if kept else "give --distillation-type frd")
        )
    if evaluates and kept and not file.slimmed:
        raise CheckpointError(
            f"{file.source}: it holds no slimming modules (tsm.*): evaluating a slimmed network needs the checkpoint "
            "that its training wrote; to evaluate a plain network give --distillation-type none"
        )
    learned = {key: value for key, value in file.state.items() if key.partition(".")[0] in LEARNED}
    plain = {key: value for key, value in file.state.items() if key not in learned}
    state = dict(timm_state(name, dense, plain))
    before, after = plain.get("pos_embed"), state.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        logger.warning("%s: position embedding resized from %s to %s", file.source, [*before.shape], [*after.shape])
    if own_head or not evaluates:
        state = keep_own_heads(dense, state, source=file.source)
    load_strict(
        model, state | learned, source=file.source,
        allow_missing=() if evaluates else ("tsm.*", "rtsm.*", "head.*"),
        allow_unexpected=() if hasattr(model, "rtsm") else ("rtsm.*",),
    )  # fmt: skip


def check_teacher_fits(student: LVViT, teacher: LVViT) -> None:
    """Whether the tokens and logits of the two can be compared.

    Raises:
        UsageError: naming what differs.
    """
    for name, word in (
        ("embed_dim", "width"), ("depth", "blocks"), ("num_patches", "patches"), ("num_classes", "classes"),
    ):  # fmt: skip
        own, other = getattr(student, name), getattr(teacher, name)
        if own != other:
            raise UsageError(
                f"--teacher-model has {other} {word}, --model has {own}: the token loss compares them block by block, "
                "so the teacher must be the same network without slimming"
            )


def check_timm_teacher_fits(student: Facts, teacher: Facts) -> None:
    """Whether the tokens of the two can be compared, whatever their depths.

    Raises:
        UsageError: naming what differs.
    """
    for name in ("width", "patches"):
        own, other = getattr(student, name), getattr(teacher, name)
        if own != other:
            raise UsageError(
                f"--teacher-model has {other} for {name}, --model has {own}: the token loss compares their patches, so "
                "the teacher must be of the same width, with patches of the same size"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Stripping


def strip(file: WeightsFile, path: str | os.PathLike[str], *, half: bool = False) -> dict[str, Any]:
    """Write a file for deployment: without ``rtsm.*`` and ``aux_head.*``, and saying so.

    Args:
        half: store floating-point weights in float16.

    Returns:
        ``removed`` (keys), ``parameters`` left, ``bytes`` of the new file.

    Raises:
        CheckpointError: if there is nothing to remove, or the file cannot be written.
    """
    prefixes = tuple(pattern.removesuffix("*") for pattern in TRAINING_ONLY)
    removed = [key for key in file.state if key.startswith(prefixes)]
    if not removed:
        raise CheckpointError(f"{file.source}: holds neither rtsm.* nor aux_head.*, so there is nothing to remove")
    kept = {key: value for key, value in file.state.items() if key not in removed}
    if half:
        kept = {key: value.half() if value.is_floating_point() else value for key, value in kept.items()}
        if large := [key for key, value in kept.items() if not value.isfinite().all()]:
            raise CheckpointError(
                f"{file.source}: {large[0]} has values that are too large for float16: leave out --half"
            )
    written = save_atomic({"model": kept, "stripped": list(TRAINING_ONLY)}, Path(path))
    parameters = sum(value.numel() for value in kept.values() if value.is_floating_point())
    return {"removed": removed, "parameters": parameters, "bytes": written.stat().st_size}


# ---------------------------------------------------------------------------------------------------------------------
# torch.hub


def _hub_entry(name: str) -> Callable[..., LVViT]:
    """The torch.hub entry of a size."""

    def entry(
        pretrained: bool = False,
        *,
        weights: str | os.PathLike[str] | None = None,
        distillation_type: str | None = "frd",
        deployed: bool = False,
        **options: Any,
    ) -> LVViT:
        made = FACTORIES[name](pretrained and weights is None, distillation_type=distillation_type, **options)
        model = made.eval()
        if weights is not None:
            load_for_evaluation(model, read_weights(weights))
        return model.deployed() if deployed else model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""{name}: {SIZES[name]["depth"]} blocks of width {SIZES[name]["embed_dim"]}, in evaluation mode.

    Args:
        weights: a file or URL, as ``sit/main.py --finetune`` takes; without it the weights are random.
        distillation_type: ``frd`` for the slimmed network, None for its teacher.
        deployed: logits alone, batch norm folded; otherwise (logits, tokens of every block).
        options: of ``LVViT``, such as num_classes and img_size.
    """
    return entry


HUB: dict[str, Callable[..., LVViT]] = {name: _hub_entry(name) for name in SIZES}
"""Entry points of ``hubconf.py`` by name."""

"""Distillation of features, without cross entropy, from a teacher such as DINOv2 (design: the release has none).

The README of Scala names the ingredients: a DINOv2 teacher, Proteus's losses, no cross entropy. Proteus
(arXiv:2407.10366) compares normalised features of student and teacher after a projection P = LayerNorm + Linear, by
mean squared errors of weight 1::

    token    MSE(P1(class token), class token of the teacher)
    feature  MSE([P1(class token); P2(patches)], [class token; patches] of the teacher)
    patch    MSE(P3(patches of a masked pass), patches of the teacher) at the masked positions

Here every pass of scale coordination uses them. Projections are sliced on their input side, so all targets live in the
teacher's space: the largest width learns from the teacher, a slim width from the detached *projected* features of the
width that teaches it (progressive: the pass before). With a classifier in the teacher (``lambda_logit``) the logits are
transferred in the same way, as in the paper's own step.

Legend: B batch, N patches, D student's width, T teacher's width, C classes, r width ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from common.run.checkpoint import load_strict, read_checkpoint, select_state
from common.run.errors import CheckpointError
from scala.build import create_timm
from scala.layers import Sliced, SlicedLayerNorm, SlicedLinear
from scala.losses import transfer_loss
from scala.models_scala import DistilledVisionTransformer_scala, VisionTransformer_scala, create
from scala.slicing import Ratio, SliceRule, Width


class Projection(nn.Module):
    """P of Proteus: layer normalisation and a linear layer to the teacher's width, sliced on the input side."""

    def __init__(self, rule: SliceRule, width: int, teacher_width: int) -> None:
        super().__init__()
        self.norm = SlicedLayerNorm(rule, width)
        self.linear = SlicedLinear(rule, width, teacher_width, rows=False)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, ratio: Ratio) -> Tensor:
        """(..., d) to (..., T)."""
        return self.linear(self.norm(x, ratio), ratio)


class FeatureStudent(Sliced, nn.Module):
    """A plain sliced ViT with the projections that the losses need.

    Args:
        backbone: plain, with a class token; its normalised tokens are compared.
        teacher_width: T.
        masked: also pass masked images: half of the batch, half of its patches replaced by a learned token.
        logits: also give class logits, for which the backbone needs classes.

    ``forward`` gives a tuple: features (B, 1 + N, T) with the projected class token first; with ``masked`` the
    projected patches (B/2, N, T) of the first half of the batch and its mask (B/2, N); with ``logits`` these (B, C).

    Raises:
        TypeError: a distilled network, whose tokens have no counterpart in the teacher.
        ValueError: no class token, or ``logits`` without classes.
    """

    def __init__(
        self, backbone: VisionTransformer_scala, teacher_width: int, *, masked: bool = False, logits: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer_scala) or isinstance(backbone, DistilledVisionTransformer_scala):
            raise TypeError(f"features are distilled into a plain sliced ViT, not into {type(backbone).__name__}")
        if backbone.num_prefix_tokens != 1 or backbone.norm is None:
            raise ValueError("the student needs a class token and a final normalisation: global_pool='token'")
        if logits and backbone.head is None:
            raise ValueError("logits are distilled into a network with classes: give --num-classes")
        if not logits and backbone.head is not None:
            raise ValueError("without logits to distil the head would never train: build the student without classes")
        width, rule = backbone.embed_dim, backbone.rule
        self.rule, self.dims = rule, {"mask_token": {2: 1}}
        self.backbone, self.masked, self.logits = backbone, masked, logits
        self.project_token = Projection(rule, width, teacher_width)
        self.project_patches = Projection(rule, width, teacher_width)
        self.project_masked = Projection(rule, width, teacher_width) if masked else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if masked else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {"mask_token"}

    def check_ratio(self, ratio: Ratio) -> Width:
        return self.backbone.check_ratio(ratio)

    def forward(self, images: Tensor, ratio: Ratio) -> tuple[Tensor, ...]:
        ratio = self.check_ratio(ratio)
        tokens = self.backbone.forward_features(images, ratio)  # (B, 1 + N, d)
        cls, patches = tokens[:, :1], tokens[:, 1:]
        features = torch.cat([self.project_token(cls, ratio), self.project_patches(patches, ratio)], dim=1)
        outputs = (features,)
        if self.masked:
            outputs += self._masked_pass(images[: max(1, len(images) // 2)], ratio)
        return (*outputs, self.backbone.forward_head(tokens, ratio)) if self.logits else outputs

    def _masked_pass(self, images: Tensor, ratio: Ratio) -> tuple[Tensor, Tensor]:
        assert self.project_masked is not None
        assert self.backbone.norm is not None
        patches = self.backbone.patch_embed(images, ratio)
        order = torch.rand(patches.shape[:2], device=images.device).argsort(dim=1)
        mask = order < patches.shape[1] // 2  # exactly half of each image
        patches = torch.where(mask[..., None], self.sliced(ratio)["mask_token"].to(patches.dtype), patches)
        x = self.backbone.run_blocks(self.backbone.place(patches, ratio), ratio)
        return self.project_masked(self.backbone.norm(x, ratio)[:, 1:], ratio), mask


# ---------------------------------------------------------------------------------------------------------------------
# Teacher


class FeatureTeacher(nn.Module):
    """A frozen timm ViT: images to (normalised class token and patches (B, 1 + N, T), logits or None)."""

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.network.embed_dim

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = self.network.forward_features(images)
        prefix = self.network.num_prefix_tokens  # DINOv2 with registers has five
        features = torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)
        return features, self.network.forward_head(tokens) if self.num_classes else None


def load_teacher(name: str, path: str, *, img_size: int, num_classes: int | None = None) -> FeatureTeacher:
    """A teacher from timm, for images of another size if need be: its positions are interpolated, as timm does.

    Args:
        name: timm's name of a plain ViT with a class token, such as ``vit_base_patch14_dinov2.lvd142m``.
        path: checkpoint or URL, timm's own or the official DINOv2 file; ``""`` lets timm download its weights.
        num_classes: of a classifier in the checkpoint; None for the network's own, which is none for DINOv2.

    Raises:
        CheckpointError: no such network or file, or a download that failed; says what to do.
    """
    options: dict[str, Any] = {"img_size": img_size} | ({} if num_classes is None else {"num_classes": num_classes})
    network = create_timm(name, pretrained=not path, **options)
    if not isinstance(network, VisionTransformer) or not network.has_class_token:
        raise CheckpointError(f"--teacher-model {name} is a {type(network).__name__}, not a plain ViT with class token")
    if path:
        state = select_state(read_checkpoint(path), source=path)
        try:
            state = checkpoint_filter_fn(state, network)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: no weights of {name} ({type(error).__name__}: {error})") from error
        spare = () if network.num_classes else ("head.*",)
        load_strict(network, state, source=path, allow_unexpected=spare)
    return FeatureTeacher(network)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@dataclass(frozen=True)
class FeatureWeights:
    """Weights of the terms; Proteus has 1 for its three. A term of weight 0 is not computed."""

    token: float = 1.0
    feature: float = 1.0
    patch: float = 0.0
    logit: float = 0.0

    def __post_init__(self) -> None:
        values = vars(self)
        if bad := [f"--lambda_{name} {value:g}" for name, value in values.items() if not value >= 0]:
            raise ValueError(f"weights of losses must be at least 0, got {', '.join(bad)}")
        if not any(values.values()):
            raise ValueError("at least one of --lambda_token, --lambda_fea, --lambda_patch, --lambda_logit must be > 0")


def feature_loss(
    outputs: tuple[Tensor, ...], target: Tensor, logits: Tensor | None, weights: FeatureWeights
) -> dict[str, Tensor]:
    """The weighted terms of one pass, scalars by name.

    Args:
        outputs: of :class:`FeatureStudent`.
        target: features (B, 1 + N, T) of the teacher, or projected ones of a wider pass; gets no gradient.
        logits: (B, C) of the same, where ``weights.logit`` is above 0.

    Raises:
        ValueError: another number of patches.

    Source: Proteus, arXiv:2407.10366, the three levels of its objective.
    """
    features, target = outputs[0].float(), target.detach().float()
    if features.shape != target.shape:
        raise ValueError(
            f"student and teacher must see the same grid of patches: {tuple(features.shape)} against "
            f"{tuple(target.shape)}; give a student of the teacher's patch size"
        )
    terms: dict[str, Tensor] = {}
    if weights.token:
        terms["token"] = weights.token * F.mse_loss(features[:, 0], target[:, 0])
    if weights.feature:
        terms["feature"] = weights.feature * F.mse_loss(features, target)
    if weights.patch:
        patches, mask = outputs[1].float(), outputs[2]
        squares = (patches - target[: len(patches), 1:]).square().mean(dim=2)  # (B/2, N)
        terms["patch"] = weights.patch * (squares * mask).sum() / mask.sum()
    if weights.logit:
        if logits is None:
            raise ValueError("--lambda_logit needs a teacher with a classifier")
        terms["logit"] = weights.logit * transfer_loss(outputs[-1].float(), logits.float())
    return terms


@dataclass(frozen=True)
class FeatureLosses:
    """The losses of the four passes, in place of ``scala.losses.ScalaLosses``; there is no cross entropy."""

    teacher: FeatureTeacher
    weights: FeatureWeights

    def full(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        """The largest width learns from the teacher."""
        del targets
        features, logits = self.teacher(images)
        return _sum(feature_loss(outputs, features, logits, self.weights))

    def slim(self, outputs: Any, teacher: Any, largest: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A slim width learns from the projected features of the width that teaches it."""
        del largest, targets
        logits = teacher[-1] if self.weights.logit else None
        transfer = _sum(feature_loss(outputs, teacher[0], logits, self.weights))
        return transfer, transfer.new_zeros(())


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def build_student(name: str, teacher: FeatureTeacher, weights: FeatureWeights, **options: Any) -> FeatureStudent:
    """A registered plain network with projections for a teacher and the terms in use.

    Raises:
        ValueError: ``weights.logit`` with a teacher that has no classifier, or an unknown name.
    """
    if weights.logit and not teacher.num_classes:
        raise ValueError("--lambda_logit needs a teacher with a classifier: this one gives features only")
    classes = teacher.num_classes if weights.logit else 0
    backbone = create(name, num_classes=classes, **options)
    return FeatureStudent(backbone, teacher.width, masked=weights.patch > 0, logits=weights.logit > 0)

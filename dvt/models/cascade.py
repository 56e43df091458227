"""The cascade: backbones at growing token grids, each with an exit, run in order.

Paper: Not All Images are Worth 16x16 Words, arXiv:2105.15075, Section 3.1.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from dvt.models import stage_names
from dvt.models.backbone import Stage, StageOutput


class Exits(nn.Module):
    """Networks over one image, run in order, each with an exit."""

    stages: Sequence[nn.Module]
    """in the order in which they run"""
    num_classes: int | None
    """None where no network says it"""

    def run_exit(self, exit: int, images: Tensor, before: StageOutput | None = None) -> StageOutput:
        """Run one stage.

        Args:
            exit: from 0.
            images: (B, 3, size, size).
            before: output of exit ``exit - 1`` for the same images; None for exit 0.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Class logits of all exits, each (B, C); every stage runs, in training and in evaluation."""
        logits: list[Tensor] = []
        output: StageOutput | None = None
        for exit in range(len(self.stages)):
            output = self.run_exit(exit, images, output)
            logits.append(output.logits)
        return tuple(logits)


class Cascade(Exits):
    """Exits over one image, three of them in the published cascades.

    Args:
        stages: in the order in which they run; the first without reuse. Build them with :func:`make_cascade`.

    Raises:
        ValueError: if a stage does not fit the one before it.

    Source: arXiv:2105.15075, Section 3.1: the transformers are run in the order of their numbers of tokens.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        if len(stages) < 2:
            raise ValueError(f"a cascade has at least two stages, got {len(stages)}")
        if stages[0].feature_reuse or stages[0].relation_reuse:
            raise ValueError("the first stage has nothing to reuse")
        for before, stage in pairwise(stages):
            reuses = stage.feature_reuse or stage.relation_reuse
            alike = all(getattr(before, name) == getattr(stage, name) for name in ("embed_dim", "depth", "num_heads"))
            if reuses and not (alike and stage.source_grid == before.grid):
                raise ValueError(
                    "stages that reuse each other's features or relations need the same width, depth and heads, and "
                    f"source_grid {before.grid}, the grid of the stage before"
                )
        self.names = stage_names(len(stages))
        for name, stage in zip(self.names, stages, strict=True):
            self.add_module(name, stage)
        self.num_classes: int | None = stages[0].num_classes

    @property
    def stages(self) -> tuple[Stage, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stages in the order in which they run."""
        return tuple(getattr(self, name) for name in self.names)

    def run_exit(self, exit: int, images: Tensor, before: StageOutput | None = None) -> StageOutput:
        """Run one stage, and hand on what the next one reuses, nothing else.

        Args:
            exit: from 0.
            images: (B, 3, size, size).
            before: output of exit ``exit - 1`` for the same images; None for exit 0.
        """
        stages = self.stages
        wanted = exit + 1 < len(stages) and stages[exit + 1].relation_reuse
        return stages[exit].run(images, before, hand_on=wanted)


def make_cascade(
    make_stage: Callable[..., Stage],
    differences: Sequence[Mapping[str, Any]],
    *,
    feature_reuse: bool = True,
    relation_reuse: bool = True,
    **options: Any,
) -> Cascade:
    """A cascade of one kind of backbone; the first stage reuses nothing, each other one reuses the stage before.

    Args:
        make_stage: such as :class:`~dvt.models.t2t_vit.T2T_ViT` or :class:`~dvt.models.deit.VisionTransformer`.
        differences: what each stage has of its own, such as ``tokens_type`` or ``patch_size``.
        feature_reuse, relation_reuse: the paper's ablations switch them off.
        options: of all stages.
    """
    stages: list[Stage] = []
    reuse: dict[str, Any] = {}
    for difference in differences:
        stages.append(make_stage(**options, **difference, **reuse))
        reuse = {"source_grid": stages[-1].grid, "feature_reuse": feature_reuse, "relation_reuse": relation_reuse}
    return Cascade(stages)

"""Any plain Vision Transformer of timm, slimmed: the student as a lean network of ``common.hosts``, and its teacher.

The network stays one of timm's, with its modules under their names, on the runner; slimming adds ``tsm.*`` and, for
training, ``rtsm.*``, as in the published files. The paper slims LV-ViT (and DeiT, without released code): other hosts
are ours. Tokens are those of the patches; class token and registers pass by.

Letters: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from common.hosts.host import NotAHost, Tokens
from common.hosts.network import find_host, lean
from common.hosts.opening import create_timm
from common.hosts.timm_vit import TimmViT
from common.layers import init_linear
from common.run.errors import UsageError
from common.run.wrapping import within
from sit.models.lvvit import patch_grid
from sit.models.slim import Slim
from sit.models.slimming import (
    default_stages,
    layer_tokens,
    reverse_modules,
    slimming_blocks,
    slimming_modules,
    stage_tokens,
)


def make_plain(
    name: str, *, img_size: int | None = None, drop: float = 0.0, drop_path: float = 0.0, **options: Any
) -> Any:
    """A network of timm that can be slimmed, with random weights.

    Args:
        name: of ``timm.create_model``.
        img_size: side of the images; None for the network's own.
        drop: dropout after the position embedding, the attention projection and the MLP.
        drop_path: largest stochastic-depth rate.
        options: of timm's factory, such as ``num_classes`` and ``patch_size``.

    Raises:
        UsageError: a name or an option that timm does not know, or patches that do not fill the image; ``NotAHost``
            names the module for which the network cannot be slimmed.
    """
    rates = {"pos_drop_rate": drop, "proj_drop_rate": drop, "drop_path_rate": drop_path}
    options |= {key: rate for key, rate in rates.items() if rate} | ({} if img_size is None else {"img_size": img_size})
    seen = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic"}
    net = create_timm(name, pretrained_cfg_overlay=seen, **options)
    check_slimmable(net)
    embed: Any = net.patch_embed
    if isinstance(embed, PatchEmbed):
        sides: Any = zip(embed.img_size, embed.patch_size, strict=True)  # pyright: ignore[reportArgumentType]
        for side, patch in sides:
            try:
                patch_grid(side, patch)
            except ValueError as error:
                raise UsageError(f"{name}: {error}") from error
    return net


def check_slimmable(net: nn.Module) -> None:
    """Refuse what cannot be slimmed.

    Raises:
        NotAHost: naming the module and the reason.
    """
    kind = type(net).__name__
    if not TimmViT.accepts(net):
        raise NotAHost(f"{kind} cannot be slimmed: expected timm's VisionTransformer or a subclass")
    if hasattr(net, "head_dist"):
        raise NotAHost(f"{kind} cannot be slimmed: head_dist is a second answer, and the losses know one")
    try:
        find_host(net)
    except NotAHost as error:
        raise NotAHost(f"{kind} cannot be slimmed: {error}") from error


def slim(
    net: Any,
    *,
    stage_blocks: Sequence[int] | None = None,
    keeping_ratio: float | None = None,
    tokens: Sequence[int] | None = None,
    recover: bool = True,
) -> Any:
    """A student: the network with slimming between its stages, its modules fresh.

    Args:
        net: of :func:`make_plain`, whose weights it shares.
        stage_blocks: blocks of each stage; None for ``default_stages``.
        keeping_ratio: tokens of a stage over those of the one before; None for 0.5.
        tokens: of each stage after the first, in place of what the ratio gives.
        recover: with reverse modules, for training.

    Returns:
        The lean network; the network itself on the runner if there is one stage alone.

    Raises:
        UsageError: stages that do not make up the network.
    """
    host = find_host(net)
    facts = host.facts
    stages = list(stage_blocks or default_stages(facts.depth))
    if sum(stages) != facts.depth:
        raise UsageError(
            f"--stage-blocks {' '.join(map(str, stages))} has {sum(stages)} blocks, {facts.name} has {facts.depth}"
        )
    kept = stage_tokens(facts.patches, 0.5 if keeping_ratio is None else keeping_ratio, len(stages))
    if tokens is not None:
        if len(tokens) != len(stages) - 1:
            raise UsageError(
                f"the file has {len(tokens)} slimming modules, and {len(stages)} stages have {len(stages) - 1} between "
                "them: give the --stage-blocks that it was trained with"
            )
        kept = [facts.patches, *tokens]
    if len(stages) == 1:
        return lean(net)
    weights = {"tsm": slimming_modules(facts.width, kept[1:])}
    if recover:
        left = layer_tokens(kept, stages)[1 : facts.depth + 1]
        weights["rtsm"] = reverse_modules(facts.width, left, facts.patches)
    for modules in weights.values():
        modules.apply(init_linear)
    method = Slim(tuple(slimming_blocks(stages)), restore=None if host.reads_prefix(net) else "mixing")
    return lean(net, method.with_weights(weights))


def deployed(student: Any) -> Any:
    """The student for inference, in evaluation mode: of the reverse modules the last one alone, if features need it."""
    if not student.methods:
        return student.eval()
    (method,) = student.methods
    weights = dict(method.weights)
    if (reverse := weights.pop("rtsm", None)) is not None and method.restore == "recalibration":
        *others, last = reverse
        weights["rtsm"] = nn.ModuleList([*(nn.Identity() for _ in others), last])
    return lean(student.restore(), method.with_weights(weights), verify=False).eval()


def logits_and_tokens(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a lean network answers, and its patch tokens after every block, slimming included: L times (B, N_l, C)."""
    seen: list[Tokens] = []
    logits = net.output(images, seen=seen)
    return logits, [tokens.x[:, tokens.prefix :] for tokens in seen[1:]]


class Recovering(nn.Module):
    """A student as its losses see it: logits twice, as LV-ViT gives them, and every block's tokens, recovered.

    Args:
        model: of :func:`slim`, or a plain network on the runner.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Class logits (B, K), the same again, and L tensors (B, N, C).

        Source: SiT, arXiv:2111.12624, feature recalibration distillation (FRD): X'_l = RTSM_l(Y_l) of every block l.
        """
        return within(self.model, self._recover, images)

    def _recover(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        logits, tokens = logits_and_tokens(self.model, images)
        if hasattr(self.model, "rtsm"):
            tokens = [reverse(kept) for reverse, kept in zip(self.model.rtsm, tokens, strict=True)]
        return logits, logits, tokens


class Teacher(nn.Module):
    """A network of timm without slimming, from images to logits and L tokens (B, N, C), for a student of L blocks.

    Args:
        net: of :func:`make_plain`; of another depth than the student it lends tokens of blocks at equal distances.
        depth: L.
    """

    def __init__(self, net: Any, depth: int) -> None:
        super().__init__()
        self.net = lean(net)
        own = len(self.net.blocks)
        self.chosen = [-(-(index + 1) * own // depth) - 1 for index in range(depth)]
        """blocks, counted from 0"""

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, tokens = logits_and_tokens(self.net, images)
        return logits, [tokens[index] for index in self.chosen]

"""A cascade of trained networks that share nothing, small to large: ``leanvit.cascade``.

    net = leanvit.cascade([small, large], [0.9])      # images to logits; sure images never reach the large one
    found = net.calibrate("folder/of/classes", budget=1.5)   # thresholds for a mean cost in GMACs
    net.answer(images).exits                          # which network answered, from 0

Any network from images to logits will do, one with token methods (``leanvit.lean``) or a slice of another too. What the
published cascade has besides is reuse; the search for thresholds (``dvt.exits``) and early exit (``dvt.dynamic``) are
its own.

Letters: B images, C classes, K networks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.loaders import build_dataset, eval_loader
from common.hosts.accuracy import number_of_outputs
from common.hosts.files import load
from common.hosts.host import NotAHost
from common.hosts.network import Lean, find_host
from common.hosts.opening import open_model
from common.run.errors import UsageError
from dvt.costs import exit_gmacs
from dvt.dynamic import DynamicClassifier, DynamicOutput
from dvt.evaluation import collect_scores
from dvt.exits import NOBODY, complete_thresholds, thresholds_for_budget
from dvt.models.backbone import StageOutput
from dvt.models.cascade import Exits


class Networks(Exits):
    """Trained networks that share nothing, in the order in which they run; put in evaluation mode.

    Args:
        networks: at least two, images (B, 3, H, W) to logits (B, C), or to an object that has them as ``logits``.

    Raises:
        UsageError: naming networks that do not go together: other classes, sizes of images, devices or precisions.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        networks = list(networks) if isinstance(networks, Iterable) else [networks]
        if len(networks) < 2:
            raise UsageError(f"a cascade needs at least two networks, got {len(networks)}")
        for number, network in enumerate(networks):
            if not isinstance(network, nn.Module):
                raise UsageError(f"networks[{number}]: expected a network (torch.nn.Module), got {network!r:.80}")
            if getattr(network, "num_classes", None) == 0:
                raise UsageError(f"networks[{number}] ({type(network).__name__}) has no head: it gives no logits")
        self.num_classes = common(networks, "numbers of classes are", lambda net: number_of_outputs(net) or None)
        common(networks, "sides of images are", _image_size)
        common(networks, "weights are", _kind_of_weights)
        self.networks = nn.ModuleList(networks)
        self.eval()

    @property
    def stages(self) -> Sequence[nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The networks in the order in which they run."""
        return tuple(self.networks)

    def run_exit(self, exit: int, images: Tensor, before: StageOutput | None = None) -> StageOutput:
        """Run one network, which takes nothing over from the one before.

        Raises:
            UsageError: naming a network whose output is not (B, C) with as many classes as the others have.
        """
        output = self.networks[exit](images)
        logits = getattr(output, "logits", output)
        classes = self.num_classes or (None if before is None else before.logits.shape[1])
        fits = isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(images)
        if not fits or classes not in (None, logits.shape[1]):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UsageError(
                f"networks[{exit}] ({type(self.networks[exit]).__name__}) gives {found}, expected logits "
                f"({len(images)}, {classes or 'C'})"
            )
        return StageOutput(logits)


def common(networks: Sequence[nn.Module], what: str, read: Callable[[nn.Module], Any]) -> Any:
    """What all networks that say it have in common; None where none does.

    Raises:
        UsageError: listing what each says, if they differ.
    """
    said = [(f"networks[{k}] ({type(network).__name__})", read(network)) for k, network in enumerate(networks)]
    values = [value for _, value in said if value is not None]
    if any(value != values[0] for value in values):
        shown = ", ".join(f"{value} of {name}" for name, value in said if value is not None)
        raise UsageError(f"the networks of a cascade see the same images and answer alike, but their {what} {shown}")
    return values[0] if values else None


def _image_size(network: Any) -> tuple[int, int] | None:
    """Height and width of the images that a network takes, where it says so."""
    try:
        host = network.plan.host if isinstance(network, Lean) else find_host(network)
    except NotAHost:
        return None
    return host.facts.image_size


def _kind_of_weights(network: nn.Module) -> str | None:
    weights = (value for value in network.parameters() if value.is_floating_point())
    return next((f"{value.dtype} on {value.device}" for value in weights), None)


def preprocessing(networks: Sequence[nn.Module]) -> dict[str, Any] | None:
    """How images become tensors, in the words of ``timm.data.create_transform``; None where timm knows it of none.

    The crop is that of the last network, which is to be the best.

    Raises:
        UsageError: if they were trained on pixels of other means or deviations.
    """
    known = [network for network in networks if getattr(network, "pretrained_cfg", None)]
    configs = {id(net): timm.data.resolve_model_data_config(net) for net in known}  # pyright: ignore[reportAttributeAccessIssue]
    for key in ("mean", "std"):
        common(networks, f"{key} of pixels is", lambda net, key=key: configs.get(id(net), {}).get(key))
    if not known:
        return None
    config = configs[id(known[-1])]
    kept = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    return {"input_size": (3, *(common(networks, "", _image_size) or config["input_size"][1:])), **kept}


def open_networks(words: Sequence[str], image_size: int | None = None) -> tuple[Networks, dict[str, Any]]:
    """Networks by their names, and what :class:`~dvt.evaluation.ImageSource` is to know of their images.

    Args:
        words: ``NAME=FILE`` each, a name of ``common.hosts.opening`` and its weights; or FILE.safetensors of
            ``leanvit.save``.
        image_size: side in pixels, where it is not the networks' own.

    Raises:
        UsageError, CheckpointError: names, files and networks that do not exist or do not go together.
    """
    networks: list[nn.Module] = []
    seen: dict[str, Any] = {}
    for word in words:
        name, _, file = word.partition("=")
        if name.endswith(".safetensors") and not file:
            networks.append(load(name))
            continue
        model = open_model(name, image_size=image_size, weights=file or None)
        if not model.trained:
            raise UsageError(f"{word}: a cascade is made of trained networks: give weights, {name}=FILE")
        networks.append(model.net)
        seen = {key: getattr(model.preprocessing, key) for key in ("mean", "std", "crop_ratio")}
    if config := preprocessing(networks):
        seen = {"mean": config["mean"], "std": config["std"], "crop_ratio": config["crop_pct"]}
    exits = Networks(networks)
    sides = common(networks, "sides of images are", _image_size)
    if sides is None or sides[0] != sides[1]:
        raise UsageError(f"the networks take images of {sides} pixels, and images here are square: see --img-size")
    return exits, {"size": sides[0], **seen}


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and what they give on the images that they were found on: expect a little less of others."""

    thresholds: list[float]  # of all exits
    gmacs: list[float]  # multiply-accumulates per image in 1e9 up to each exit
    top1_percent: list[float]  # of each exit, if all images went there
    exit_percent: list[float]  # share of the images that leave at each exit
    early_gmacs: float  # mean cost per image with early exit
    early_top1_percent: float


class EarlyExit(DynamicClassifier):
    """A cascade as one classifier, images to logits. :class:`~dvt.dynamic.DynamicClassifier` says how it works.

    Its state dict holds the weights alone: keep ``thresholds`` beside it.
    """

    def answer(self, images: Tensor) -> DynamicOutput:
        """Logits (B, C), and of each image the exit that answered and its confidence."""
        return super().forward(images)

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Class logits (B, C), of the first exit that is sure enough of an image, for images (B, 3, H, W)."""
        return self.answer(images).logits

    def calibrate(
        self,
        data: str | Path | Dataset[Any] | Iterable[tuple[Tensor, Tensor]],
        budget: float,
        *,
        transform: Callable[[Any], Tensor] | None = None,
        batch_size: int = 64,
        workers: int = 0,
        show: bool = False,
    ) -> Calibration:
        """Find thresholds under which these images cost at most ``budget`` on average, and answer by them from now on.

        Args:
            data: folder of class folders (or with val/ in it), data set, or batches of (images, labels); images that
                were neither trained on nor are to be reported on. Labels serve the accuracies alone.
            budget: mean GMACs per image, between the costs of the first exit and of the last.
            transform: of a folder, from a Pillow image to (3, H, W); default: timm's of the networks.
            batch_size, workers: of a folder or data set.
            show: a progress line.

        Raises:
            UsageError: networks that want images in other ways than each other, or that timm knows nothing of.
            ValueError: a budget out of reach, which names both ends; images that the networks have no class for.
        """
        if isinstance(data, str | Path):
            if transform is None:
                wanted = preprocessing(self.cascade.stages)
                if wanted is None:
                    raise UsageError("timm knows no transform of these networks: give transform=, or batches")
                transform = timm.data.create_transform(**wanted)  # pyright: ignore[reportAttributeAccessIssue]
            data = build_dataset("folder", data, "val", transform)
        if isinstance(data, Dataset):
            data = cast(Any, eval_loader(data, batch_size=batch_size, workers=workers))
        device = next(self.parameters()).device
        seen: list[Tensor] = []

        def watched() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in cast(Iterable[tuple[Tensor, Tensor]], data):
                if not len(images):
                    continue
                if not seen:
                    seen.append(images[:8])
                yield images, labels

        scores = collect_scores(self.cascade, watched(), device=device, title="calibration", show=show)
        costs = exit_gmacs(self.cascade, seen[0].to(device))
        thresholds = thresholds_for_budget(scores.confidence, costs, budget)
        outcome = scores.leave(costs, thresholds)
        self.set_thresholds(thresholds)
        return Calibration(
            thresholds.tolist(), costs, scores.anytime,
            (100 * outcome.exit_counts[0] / scores.correct.shape[1]).tolist(),
            float(outcome.gmacs[0]), float(outcome.top1_percent[0]),
        )  # fmt: skip


def cascade(
    models: Exits | Sequence[nn.Module], thresholds: Sequence[float] | Tensor | None = None, **options: Any
) -> EarlyExit:
    """Several trained networks as one that asks the next only about images that it is not sure of.

    Args:
        models: networks for the same images and classes, small to large, see :class:`Networks`; or a trained cascade
            with reuse (``dvt.models.create_model``). Shared, not copied, and put in evaluation mode.
        thresholds: confidence, the largest probability, at which an image leaves, of each network but the last; None:
            every image goes to the last one until ``calibrate`` has found some.
        options: ``compiled`` and ``backend`` of :class:`~dvt.dynamic.DynamicClassifier`.

    Returns:
        Images (B, 3, H, W) to logits (B, C); see :class:`EarlyExit`. It cannot be exported as one file, because the
        sizes of its batches depend on the images: export ``.cascade.stages`` one by one.

    Raises:
        UsageError: networks that do not go together.
        ValueError: another number of thresholds, or one that is not a number.

    Source: arXiv:2105.15075, Section 3.3, without the reuse of Section 3.2.
    """
    exits = models if isinstance(models, Exits) else Networks(models)
    count = len(exits.stages)
    return EarlyExit(
        exits.eval(),
        complete_thresholds([NOBODY] * (count - 1) if thresholds is None else thresholds, count),
        **options,
    )

"""Early exit that happens: an image that an exit is sure of is not seen by the exits behind it.

The official release always runs all three exits and counts what could have been saved. Here the first exit runs on the
whole batch; the images it is not sure of are gathered into a smaller batch, with the features and relations that the
next exit reuses, and so on. Answers equal those of the full cascade under the same thresholds, image by image.

Paper: arXiv:2105.15075, Section 3.3. Letters: B images, C classes, K exits.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dvt.exits import NOBODY, confidence_and_prediction, confidences
from dvt.models.backbone import StageOutput
from dvt.models.cascade import Exits

SMALL = 8
"""Compiled exits see powers of two up to here, then multiples of it."""


class DynamicOutput(NamedTuple):
    """Answers of a batch."""

    logits: Tensor  # of the exit that answered, (B, C)
    exits: Tensor  # its index from 0, (B,), int64
    confidence: Tensor  # its largest probability, (B,), float32


class DynamicClassifier(nn.Module):
    """A cascade that stops each image at the first exit whose confidence reaches its threshold.

    Works for any batch size, on the CPU and on CUDA, also under autocast. The host waits for the device once per exit
    but the last, because the size of the next batch is not known earlier.

    Args:
        cascade: in evaluation mode; shared, not copied.
        thresholds: one per exit, as ``dvt.exits.find_thresholds`` gives them. The last exit always answers.
        compiled: run every exit through ``torch.compile``, with a symbolic batch size. The remaining batch is padded to
            one of a few sizes (see :func:`bucket`), so that kernels that are tuned or recorded per size meet few of
            them. After :meth:`warm_up` nothing is compiled again, whatever remains of a batch.
        backend: of ``torch.compile``.

    Raises:
        ValueError: if there is not one threshold per exit, or one is no confidence.

    Source: arXiv:2105.15075, Section 3.3: adaptive inference, exit after exit.
    """

    def __init__(
        self,
        cascade: Exits,
        thresholds: Tensor | Sequence[float],
        *,
        compiled: bool = False,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        super().__init__()
        self.cascade = cascade
        self.compiled = compiled
        self.set_thresholds(thresholds)
        self.backend = backend
        self._runs = self._make_runs()

    def _make_runs(self) -> list[Callable[..., StageOutput]]:
        runs = [_separate(self.cascade, k) for k in range(len(self.cascade.stages))]
        return [torch.compile(run, backend=self.backend, fullgraph=True) for run in runs] if self.compiled else runs

    def __getstate__(self) -> dict[str, Any]:
        """A copy runs its own cascade."""
        return {key: value for key, value in vars(self).items() if key != "_runs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._runs = self._make_runs()

    def _run(self, k: int, images: Tensor, before: StageOutput | None) -> StageOutput:
        """One exit; torch.compile is told that the number of images changes, and nothing else."""
        for value in (images, *(before or ())) if self.compiled else ():
            if value is not None and len(value) > 1:  # a single image has its own code
                torch._dynamo.maybe_mark_dynamic(value, 0)  # pyright: ignore[reportPrivateUsage]
        return self._runs[k](images, before)

    def set_thresholds(self, thresholds: Tensor | Sequence[float]) -> None:
        """Answer by other thresholds from now on; nothing is compiled again."""
        values = confidences(thresholds)
        if len(values) != len(self.cascade.stages):
            raise ValueError(f"expected {len(self.cascade.stages)} thresholds, one per exit, got {len(values)}")
        self.thresholds: list[float] = values.tolist()

    @torch.no_grad()
    def forward(self, images: Tensor) -> DynamicOutput:
        """Classify a batch, (B, 3, size, size); B may be any number, also 0.

        Raises:
            RuntimeError: in training mode, where drop-path would make answers random.
        """
        if any(part.training for part in (self.cascade, *self.cascade.stages)):
            raise RuntimeError("early exit is for evaluation: call .eval() first")
        total, device, last = len(images), images.device, len(self._runs) - 1
        exits = torch.zeros(total, dtype=torch.int64, device=device)
        confidence = torch.empty(total, device=device)
        answers = images.new_empty(0, self.cascade.num_classes or 0)
        if not total:
            return DynamicOutput(answers, exits, confidence)
        rows = torch.arange(total, device=device)  # numbers of the images that are left
        images = self._pad(images, total)
        output: StageOutput | None = None
        for k in range(last + 1):
            output = self._run(k, images, output)
            if k < last and self.thresholds[k] >= NOBODY:
                continue
            # every image still here gets this exit's answer; those that stay are given a later one
            logits = output.logits[: len(rows)]
            own_confidence, _ = confidence_and_prediction(logits)
            answers = answers if len(answers) else torch.empty_like(logits)
            answers[rows], confidence[rows], exits[rows] = logits, own_confidence, k
            if k == last:
                break
            stay = (~(own_confidence >= self.thresholds[k])).nonzero().squeeze(1)  # the host waits here
            if len(stay) == 0:
                break
            if len(stay) < len(rows):
                rows, kept = rows[stay], self._pad(stay, len(stay))
                images, output = images.index_select(0, kept), output.select(kept)
        return DynamicOutput(answers, exits, confidence)

    def _pad(self, rows: Tensor, count: int) -> Tensor:
        """The same with its last row repeated up to the next size that compiled exits see."""
        missing = bucket(count) - count if self.compiled else 0
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows

    @torch.no_grad()
    def warm_up(self, images: Tensor) -> None:
        """Compile every exit for any number of images up to that of this batch; without effect on results.

        Some operators choose their algorithm by the batch size, so that an exit is compiled once for a single image
        and once or twice for more.
        """
        counts = [1 << power for power in range((len(images) - 1).bit_length())]
        for count in dict.fromkeys([*counts, bucket(len(images))]):
            batch = images[torch.arange(count, device=images.device) % len(images)]
            output: StageOutput | None = None
            for k in range(len(self._runs)):
                output = self._run(k, batch, output)


def bucket(count: int) -> int:
    """Size that a batch of ``count`` images is padded to where exits are compiled: 1, 2, 4, 8, 16, 24, 32, ..."""
    if count <= SMALL:
        return 1 << (count - 1).bit_length()
    return -(-count // SMALL) * SMALL


def _separate(cascade: Exits, index: int) -> Callable[..., StageOutput]:
    """One exit of this cascade as a function with a code object of its own.

    torch.compile keeps what it compiled per code object, and gives up beyond a few: so no exit, and no other cascade of
    the process, takes the place of another.
    """

    def run(images: Tensor, before: StageOutput | None = None) -> StageOutput:
        return cascade.run_exit(index, images, before)

    code = run.__code__.replace(co_name=f"run_exit_{index}")
    return FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)

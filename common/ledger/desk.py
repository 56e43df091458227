"""What the papers' adapters and desk experiments share: finding files, running scripts, held-out digits."""

import contextlib
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.loaders import build_dataset
from common.ledger.cache import cached, source_files
from common.ledger.tables import NeedsWeights
from common.measure.benchmark import PairedSpeed
from common.run.checkpoint import hub_folder


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Keep standard output free, which may be JSON, while scripts run; if wanted, standard error too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO() if wanted else sys.stderr))
        if wanted:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def sha256_of(path: Path) -> str:
    """Digest of a file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_weights(files: Sequence[str], folder: Path | None) -> Path:
    """The first of these files that is in a folder; None is torch.hub's cache.

    Raises:
        NeedsWeights: naming the files looked for.
    """
    place = folder or hub_folder()
    for path in (place / file for file in files):
        if path.is_file():
            return path
    raise NeedsWeights(reason=f"{' or '.join(files)} in {place} (--weights DIR)")


def train_once(
    job: Sequence[str],
    train: Callable[[], float],
    file: Path,
    *,
    force: bool,
    progress: bool,
    at_least: float = 0.0,
    folder: Path | None = None,
) -> float:
    """Top-1 in percent after training, which is done anew only if the code, the versions or the file changed.

    Args:
        job: paper, and what tells this training from the paper's others.
        train: trains, and returns the accuracy.
        file: the checkpoint that it writes.
        force: train again although nothing changed.
        progress: let the trainer print.
        at_least: accuracy below which the training has failed.
        folder: of the cache, if not the common one.

    Raises:
        RuntimeError: if it failed.
    """

    def compute() -> dict[str, object]:
        with quiet(not progress):
            top1 = train()
        return {"sha256": sha256_of(file), "top1_percent": top1}

    def kept(again: bool) -> dict[str, object]:
        return cached(["training", *job], compute, files=source_files(job[0]), force=again, folder=folder)

    known = kept(force)
    if not file.is_file() or sha256_of(file) != known["sha256"]:
        known = kept(True)
    if (top1 := float(str(known["top1_percent"]))) < at_least:
        raise RuntimeError(f"{' '.join(job[:2])} reached {top1:.1f} % on the held-out digits, expected {at_least:g} %")
    return top1


def held_out_digits(transform: Callable[..., Tensor], number: int) -> Tensor:
    """The first held-out digits as an evaluation sees them, (number, 3, height, width), from the start if need be."""
    images: Any = build_dataset("digits", None, "val", transform)
    return torch.stack([images[index % len(images)][0] for index in range(number)])


def speed_cells(paired: PairedSpeed, flops_ratio: float) -> dict[str, float]:
    """Cells of a desk table: speed, speed-up, what the counted cost promises, and how much of that came true."""
    return {
        "throughput_ips": round(paired.speed.throughput_ips),
        "speedup": round(paired.speedup, 2),
        "flops_ratio": round(flops_ratio, 2),
        "realised": round(paired.speedup / flops_ratio, 2),
    }

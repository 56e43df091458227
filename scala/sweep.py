"""Accuracy of one network at several widths: a line per width, a table, and the curve against its cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.measure.flops import gmacs
from common.plots import Figure, Series, draw
from common.run.errors import DataError
from common.run.files import write_atomic
from common.run.program import get_logger, is_main
from scala.engine_scala import evaluate_widths

logger = get_logger(__name__)

COLUMNS = ("ratio", "gmacs", "params_m", "top1_percent", "top5_percent", "loss")
HEADS = ("width ratio", "GMACs", "parameters (M)", "top-1 (%)", "top-5 (%)", "loss")


def sweep(
    model: Any,
    loader: Iterable[Any],
    ratios: Sequence[float],
    *,
    device: torch.device,
    amp: str,
    failed: dict[str, str],
) -> list[dict[str, float]]:
    """Evaluate every width on the same images.

    Args:
        model: a sliced network, the bare module.
        loader: the images, as ``common.data.loaders.eval_loader`` gives them.
        ratios: valid widths, at least one.
        failed: takes the widths whose logits are not numbers, for :func:`check_numbers`.

    Returns:
        A row per other width: ``ratio``; ``gmacs`` by fvcore's convention, as the paper counts, and ``params_m``, those
        that the width touches; ``top1_percent``, ``top5_percent``, ``loss``, ``images``, ``skipped``.
    """
    rows: list[dict[str, float]] = []
    measured = evaluate_widths(model, loader, ratios, device=device, amp=amp, failed=failed)
    for ratio in filter(measured.__contains__, ratios):
        row = {"ratio": ratio, **costs(model, ratio), **measured[ratio]}
        rows.append(row)
        if is_main():
            print(
                f"* Acc@1 {row['top1_percent']:.3f} Acc@5 {row['top5_percent']:.3f} loss {row['batch_loss']:.3f} "
                f"(mean over batches; over images {row['loss']:.3f})"
            )
        logger.info("Width ratio: %g, Accuracy of the network on the %d test images: %.1f%%", ratio, row["images"],
                    row["top1_percent"])  # fmt: skip
    return rows


def check_numbers(failed: Mapping[str, str]) -> None:
    """For the end, when the other widths are written.

    Raises:
        DataError: a width gave logits that are not numbers.
    """
    if failed:
        raise DataError("; ".join(failed.values()))


def costs(model: Any, ratio: float) -> dict[str, float]:
    """GMACs and parameters (M) of a width, for one image."""
    return {"gmacs": gmacs(model.count_ops(ratio), "fvcore"), "params_m": model.count_parameters(ratio) / 1e6}


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """The rows as Markdown, which reads well on a terminal too."""
    forms = ("{:g}", "{:.4g}", "{:.6g}", "{:.3f}", "{:.3f}", "{:.4f}")
    cells = [[form.format(row[name]) for form, name in zip(forms, COLUMNS, strict=True)] for row in rows]
    lines = [HEADS, ["--:"] * len(HEADS), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(rows: Sequence[Mapping[str, float]], output_dir: str, arguments: Mapping[str, Any]) -> None:
    """``widths.json``, ``widths.md`` and, of several widths, the curve ``widths.png``; on rank 0, where to is given."""
    if not output_dir or not is_main():
        return
    folder = Path(output_dir)
    content = {"arguments": dict(arguments), "widths": [dict(row) for row in rows]}
    write_atomic(folder / "widths.json", json.dumps(content, indent=1, default=str) + "\n")
    write_atomic(folder / "widths.md", table(rows) + "\n")
    if len(rows) > 1:
        write_atomic(folder / "widths.png", curve(rows, str(arguments.get("model", "network"))))
    logger.info("widths: %s", folder / "widths.json")


def curve(rows: Sequence[Mapping[str, float]], name: str) -> bytes:
    """Accuracy against cost, a point per width that was measured, as PNG."""
    line = Series(name, [row["gmacs"] for row in rows], [row["top1_percent"] for row in rows])
    line.labels = [f"{row['ratio']:g}" for row in rows]
    title = "Accuracy of one network at its widths"
    return draw(Figure("widths", title, "GMACs", "top-1 (%)", {name: [line]}), "png")[0]

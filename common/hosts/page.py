"""What was measured of a network as files: figures, JSON, a sheet of every image, and one page that holds all of it."""

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.hosts.accuracy import KNN, PROBE, TOP1
from common.hosts.draw import Strip, draw_sheet, to_image
from common.hosts.trade import WORDS, Row, Trade, front
from common.measure.benchmark import describe_device
from common.plots import Figure, Series, draw, inline_svg
from common.run.files import write_atomic

THUMBNAIL = 160
"""Pixels of a panel's side on the page at most."""
TITLE = 36
"""Letters of a network's word above a figure at most, of which a path's end says most."""
COSTS = {"gmacs": "GMACs per image", "ms_per_image": "ms per image"}
MEASURES = {"patch_cosine": "cosine of patch features", TOP1: "top-1 accuracy (%)", KNN: "k-NN accuracy (%)",
            PROBE: "linear probe accuracy (%)"}  # fmt: skip


def measures(rows: Sequence[Row]) -> list[str]:
    """Fields of rows that say what is kept, those that were measured."""
    return [key for key in MEASURES if getattr(rows[0], key) is not None]


def pareto(rows: Sequence[Row], cost: str, measure: str, title: str) -> Figure:
    """What is kept against what it costs, a line for each method, and the front of all."""
    lines: dict[str, Series] = {}
    for row in rows:
        baseline = row.name == "dense"
        kind = "smaller images" if row.kind == "dense" and not baseline else row.kind
        line = lines.setdefault(kind, Series(kind, baseline=baseline))
        line.add((getattr(row, cost), getattr(row, measure)), _label(row, kind))
    best = Series("front of all", marked=False)
    for row in front(rows, cost, measure):
        best.add((getattr(row, cost), getattr(row, measure)), "")
    return Figure(
        f"pareto-{measure}-{cost}", title, COSTS[cost], MEASURES[measure], {"": [*lines.values(), best]}, clip=True
    )


def _label(row: Row, kind: str) -> str:
    """The settings alone: the method is in the legend."""
    if row.name == "dense":
        return "dense"
    if kind == "smaller images":
        return row.name.removeprefix("dense at ").replace(" pixels", " px")
    return row.name.partition(":")[2] if "+" not in row.name else ""


def write_all(
    trade: Trade, rows: Sequence[Row], folder: Path, *, layers: Sequence[int], chosen: str = "", code: str = ""
) -> list[Path]:
    """Write trade.json, index.html, the figures and a sheet of every image; returns the files.

    Args:
        layers: numbers of blocks after which tokens are shown.
        chosen, code: what was chosen within a budget, and the lines that build it.
    """
    contents: dict[str, str | bytes] = {"trade.json": trade.record(rows, chosen=chosen, code=code)}
    drawn: list[list[str]] = []
    spec = trade.model.spec if len(trade.model.spec) <= TITLE else f"...{trade.model.spec[3 - TITLE :]}"
    for measure in measures(rows):
        pair = []
        for cost in COSTS:
            figure = pareto(rows, cost, measure, f"{spec}: {MEASURES[measure]} against {COSTS[cost]}")
            contents[f"{figure.key}.png"], svg = draw(figure, "png", "svg")
            pair.append(inline_svg(svg))
        drawn.append(pair)
    files, seen = trade.images.files, []
    for index, file in enumerate(tqdm(files, desc="images", unit="image", delay=1, leave=False, disable=None)):
        strips = trade.strips(file, layers)
        alone = sum(other.stem == file.stem for other in files) == 1 and f"{file.stem}.png" not in contents
        name = file.stem if alone else f"{file.stem}-{index}"
        while f"{name}.png" in contents:
            name += "-"
        buffer = io.BytesIO()
        draw_sheet(strips).save(buffer, "png", optimize=True)
        contents[f"{name}.png"] = buffer.getvalue()
        seen.append((file.name, [Strip(strip.name, _inline(strip)) for strip in strips]))
    contents["index.html"] = _render(trade, rows, drawn, seen, chosen, code)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def _inline(strip: Strip) -> Any:
    return [(word, *_data(panel)) for word, panel in strip.panels]


def _data(panel: Tensor) -> tuple[str, int, int]:
    """A panel as the address of a small image that the page itself holds, its width and height."""
    image = to_image(panel)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=75, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.width, image.height


def _cells(row: Row, measured: Sequence[str]) -> list[tuple[float | None, str]]:
    """Value to sort by and text of each column behind the name."""
    cells: list[tuple[float | None, str]] = [
        (row.tokens, str(row.tokens)),
        (row.gmacs, f"{row.gmacs:.3f}"),
        (row.own_gmacs, f"{row.own_gmacs:.3f}"),
        (row.ms_per_image, f"{row.ms_per_image:.2f}"),
        (row.speedup, f"{row.speedup:.2f}x"),
        (row.realised, f"{100 * row.realised:.0f}%"),
        (row.patch_cosine, f"{row.patch_cosine:.4f}"),
        (row.class_cosine, f"{row.class_cosine:.4f}"),
        (row.against_resizing, "" if row.against_resizing is None else f"{row.against_resizing:+.4f}"),
    ]
    return cells + [(getattr(row, key), f"{getattr(row, key):.2f}") for key in measured]


def _render(
    trade: Trade, rows: Sequence[Row], drawn: Any, seen: Sequence[tuple[str, Any]], chosen: str, code: str
) -> str:
    own = Path(__file__).parent / "templates"
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([own, own.parents[1] / "templates"]), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    accuracies = [key for key in measures(rows) if key != "patch_cosine"]
    best = {mark: front(rows, cost, rows[0].measure) for mark, cost in (("M", "gmacs"), ("T", "ms_per_image"))}
    columns = ["tokens", "GMACs", "own", "ms/image", "speed-up", "of promised", "patches", "class", "against resizing"]
    return found.get_template("trade.html").render(
        model=trade.model,
        facts=trade.facts,
        images=trade.images,
        accuracy=trade.accuracy,
        timed=trade.timed,
        device=describe_device(trade.device),
        batch=min(trade.batch_size, len(trade.images.files)),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        chosen=chosen,
        code=code,
        figures=drawn,
        columns=columns + [WORDS[key] for key in accuracies],
        rows=[
            (row, _cells(row, accuracies), "".join(f"★{mark} " for mark, rows_of in best.items() if row in rows_of))
            for row in rows
        ],
        refused=trade.refused,
        seen=seen,
    )

"""Where the time of a pass goes, and what a compiler makes of it: ``python -m common.hosts --explain --compile``."""

import re
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from common.hosts.runner import Step
from common.measure.benchmark import compare

OWN = "method"
"""Part of what methods do, whatever it is."""
PARTS = {
    "attention": re.compile(r"attention"),
    "products": re.compile(r"mm\b|linear|conv|matmul|einsum"),
    "moving": re.compile(
        r"index|gather|scatter|cat|copy|clone|select|slice|where|contiguous|expand|fill|to\b|sort|topk"
    ),
    "elementwise": re.compile(r""),
}
"""Kind of operation -> its names; the first that fits."""
COLUMNS = (*PARTS, OWN)


@contextmanager
def _steps_named(network: nn.Module) -> Generator[None]:
    """Let a profiler see where methods act."""
    with ExitStack() as stack:
        open_ranges: list[Any] = []

        def enter(step: nn.Module, operands: Any) -> None:
            open_ranges.append(record_function(OWN))
            open_ranges[-1].__enter__()

        def leave(step: nn.Module, operands: Any, result: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        for module in network.modules():
            if isinstance(module, Step):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        yield


@torch.inference_mode()
def milliseconds_by_part(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Milliseconds of a pass over ``images``, (B, 3, H, W), by ``COLUMNS``.

    Of a CUDA device they are those of its kernels; of the CPU those of operations, of which the profiler takes some.
    """
    on_gpu = images.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _steps_named(network), profile(activities=activities) as found:
        network(images)
    spent: Counter[str] = Counter(dict.fromkeys(COLUMNS, 0.0))
    for event in found.events() or ():
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        above, inside = event, False
        while above is not None and not inside:
            inside, above = above.name == OWN, above.cpu_parent
        kind = OWN if inside else next(part for part, names in PARTS.items() if names.search(event.name))
        spent[kind] += taken / 1e3
    return dict(spent)


def explain(
    networks: Mapping[str, nn.Module], gmacs: Mapping[str, float], images: Tensor, *, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Parts of every network's pass, their sum as "all", and "promised": what its share of the operations would take.

    The networks take turns, after a round that is not counted; each number is the median of the rounds.

    Args:
        networks: by name, among them "dense".
        gmacs: of each.
        images: a batch, (B, 3, H, W).
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in networks}
    turns = [name for _ in range(rounds + 1) for name in networks]
    for name in tqdm(turns, desc="explaining", unit="pass", delay=1, leave=False, disable=None):
        parts = milliseconds_by_part(networks[name], images)
        found[name].append(parts | {"all": sum(parts.values())})
    middle = {
        name: {column: median(each[column] for each in passes[1:]) for column in (*COLUMNS, "all")}
        for name, passes in found.items()
    }
    dense = middle["dense"]["all"]
    return {name: parts | {"promised": dense * gmacs[name] / gmacs["dense"]} for name, parts in middle.items()}


@dataclass(frozen=True)
class Compiled:
    """What ``torch.compile`` makes of a network."""

    speedup: float
    """over the network itself, in turns"""
    graph_breaks: int
    recompilations: int
    """for later batches of the same shape"""
    seconds: float
    """that the first batch took"""


def compile_network(network: nn.Module, images: Tensor, *, rounds: int, limit_s: float | None) -> Compiled:
    """Compile a network for a batch, and time it in turns with itself.

    Raises:
        Whatever the compiler does.
    """
    torch.compiler.reset()
    counters.clear()
    program: Any = torch.compile(network)
    with torch.inference_mode():
        started = time.perf_counter()
        program(images)
        seconds = time.perf_counter() - started
        program(images)
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(2):
            program(images)
    breaks, more = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"] - graphs
    speeds: Mapping[str, Any] = compare(
        {"eager": network, "compiled": program}, images, baseline="eager", rounds=rounds, warmup=1, limit_s=limit_s
    )
    return Compiled(speeds["compiled"].speedup, breaks, more, seconds)


def compile_all(
    networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int, limit_s: float | None
) -> dict[str, Compiled | str]:
    """Every network compiled, or what the compiler said."""
    found: dict[str, Compiled | str] = {}
    for name, network in tqdm(networks.items(), desc="compiling", unit="network", leave=False, disable=None):
        try:
            found[name] = compile_network(network, images, rounds=rounds, limit_s=limit_s)
        except Exception as error:  # a compiler's can be any
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


def table(columns: Mapping[str, str], rows: Mapping[str, Mapping[str, float] | str], title: str) -> str:
    """For a terminal.

    Args:
        columns: heading -> format of its values.
        rows: name -> heading -> value, or why there is none.
    """
    width = max(map(len, (title, *rows)))
    lines = [f"{title:{width}}" + "".join(f"{heading:>15}" for heading in columns)]
    for name, values in rows.items():
        told = (
            f"  not possible: {values}"
            if isinstance(values, str)
            else "".join(f"{format(values[heading], form):>15}" for heading, form in columns.items())
        )
        lines.append(f"{name:{width}}{told}")
    return "\n".join(lines)

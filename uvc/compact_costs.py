"""What physical removal saves: costs by the paper's rules and in fact, and speed."""

from __future__ import annotations

import time
from copy import deepcopy
from typing import Any

import torch

from common.measure.benchmark import compare, device_name, random_images
from common.measure.flops import CONVENTIONS, count_parameters
from uvc.cost_model import CostModel
from uvc.models.compact import CompactViT
from uvc.models.gates import GatedTransformer
from uvc.removal import Compressed, dense_config


def costs_of(model: GatedTransformer, compressed: Compressed) -> dict[str, float]:
    """Counted by the paper's rules and really there: GMACs, share of the dense network, parameters."""
    cost, network = CostModel(model, dtype=torch.float64), compressed.network
    ratio, full = cost.of_structure(compressed.structure), float(cost.full)
    with torch.device("meta"):
        dense = CompactViT(dense_config(network.config, compressed.structure))
    rules = CONVENTIONS["uvc"]
    counted = network.count()
    real, real_full = rules.total(counted.published), rules.total(dense.count().published)
    return {
        "remaining_percent": 100 * ratio,
        "counted_gmacs": ratio * full / 1e9,
        "dense_gmacs": full / 1e9,
        "real_gmacs": real / 1e9,
        "real_remaining_percent": 100 * real / real_full,
        "padding_gmacs": (counted.executed.macs - counted.published.macs) / 1e9,
        "params_m": count_parameters(network) / 1e6,
        "dense_params_m": count_parameters(dense) / 1e6,
    }


def measure_speeds(
    compressed: Compressed,
    versions: dict[str, CompactViT],
    *,
    device: torch.device,
    dtype: str,
    batch: int,
    rounds: int,
    processor_time: bool,
) -> list[dict[str, Any]]:
    """Speed-up of each version over the dense network, and what of the counted saving it realises.

    Args:
        compressed, versions: the network, and forms of it by name.
        device, dtype, batch, rounds: of the passes, all networks in turns.
        processor_time: time what one thread of a CPU computes instead of the time that passes.
    """
    config = compressed.network.config
    networks = {"dense": CompactViT(dense_config(config, compressed.structure))} | versions
    networks = {name: deepcopy(network).to(device, getattr(torch, dtype)).eval() for name, network in networks.items()}
    images = random_images(batch, config.image_size[0], device, getattr(torch, dtype))
    clock, where = time.perf_counter, device_name(device)
    if processor_time:
        clock, where = time.process_time, f"{where}, processor time, 1 thread"
        torch.set_num_threads(1)
    speeds = compare(networks, images, baseline="dense", rounds=rounds, progress="benchmark", clock=clock)
    macs = {name: CONVENTIONS["uvc"].total(network.count().published) for name, network in networks.items()}
    rows = []
    for name, paired in speeds.items():
        share, speed = macs[name] / macs["dense"], paired.speed
        rows.append({
            "network": name, "latency_ms": speed.latency_ms, "throughput_ips": speed.throughput_ips,
            "speedup": paired.speedup, "flops_ratio": 1 / share, "realised": paired.speedup * share,
            "device": where, "dtype": dtype, "batch_size": batch,
        })  # fmt: skip
    return rows

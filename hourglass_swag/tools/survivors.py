"""Random weights with which ATS lets a wanted number of tokens survive, to measure its speed without the trained ones.

Which tokens ATS samples depends on how peaked the class token's attention is. With freshly initialised weights it is
nearly flat, so that almost every token survives; larger queries in the sampling layers make it as peaked as wanted.
"""

import math
from typing import Any

import torch
from torch import Tensor

from common.hosts import Tokens

TOLERANCE = 0.02  # of the number of tokens
STEPS = 24
LARGEST = 1e4  # factor of the queries


@torch.inference_mode()
def sharpen_(model: Any, tokens: float, images: Tensor) -> float:
    """Scale the query projections of the sampling layers, in place.

    Args:
        model: a network of the registry that drops tokens by ATS, in evaluation mode.
        tokens: wanted on average after its sampling layers, the class token included.
        images: on which they are counted, (B, 3, S, S).

    Returns:
        The number reached.

    Raises:
        ValueError: if the number wanted is out of reach.
    """
    (method,), layers = model.methods, model.encoder.layers
    start = model.plan.host.embed(model, images)
    queries = [layers[layer].self_attention.in_proj_weight[: model.hidden_dim] for layer in method.layers]
    plain = [query.clone() for query in queries]

    def survivors(factor: float) -> float:
        for query, own in zip(queries, plain, strict=True):
            torch.mul(own, factor, out=query)
        seen: list[Tokens] = []
        model.plan.run(start.update(undo=None), seen=seen)
        return sum(seen[layer + 1].x.shape[1] for layer in method.layers) / len(method.layers)

    low, high = 0.0, math.log(LARGEST)
    found = math.nan
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = survivors(math.exp(middle))
        if abs(found - tokens) <= TOLERANCE * tokens:
            return found
        low, high = (middle, high) if found > tokens else (low, middle)
    raise ValueError(f"no scale of the queries lets {tokens} tokens survive; the nearest was {found:.1f}")

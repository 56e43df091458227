"""Random weights with which ATS lets a wanted number of tokens survive, to measure its speed without the trained ones.

Which tokens ATS samples depends on how peaked the class token's attention is. With freshly initialised weights it is
nearly flat, so that almost every token survives; larger queries in the sampling layers make it as peaked as wanted.
"""

import math

import torch
from torch import Tensor

from hourglass_swag.models.ats_vision_transformer import ATSBlock, ATSVisionTransformer

TOLERANCE = 0.02  # of the number of tokens
STEPS = 24
LARGEST = 1e4  # factor of the queries


@torch.inference_mode()
def sharpen_(model: ATSVisionTransformer, tokens: float, images: Tensor) -> float:
    """Scale the query projections of the sampling layers, in place.

    Args:
        model: a network that drops tokens, in evaluation mode.
        tokens: wanted on average after its sampling layers, the class token included.
        images: on which they are counted, (B, 3, S, S).

    Returns:
        The number reached.

    Raises:
        ValueError: if the number wanted is out of reach.
    """
    first, layers = model.ats_blocks[0], list(model.encoder.layers)
    x = model.encoder.embed(model.embed(images))
    for layer in layers[:first]:
        x = layer(x)
    sampling = [layer for layer in layers if isinstance(layer, ATSBlock)]
    queries = [layer.self_attention.in_proj_weight[: model.hidden_dim] for layer in sampling]
    plain = [query.clone() for query in queries]

    def survivors(factor: float) -> float:
        for query, start in zip(queries, plain, strict=True):
            torch.mul(start, factor, out=query)
        y, policy, left = x, None, []
        for layer in layers[first:]:
            if isinstance(layer, ATSBlock):
                y, policy = layer(y, policy)
                left.append(len(y))
            else:
                y = layer(y)
        return sum(left) / len(left)

    low, high = 0.0, math.log(LARGEST)
    found = math.nan
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = survivors(math.exp(middle))
        if abs(found - tokens) <= TOLERANCE * tokens:
            return found
        low, high = (middle, high) if found > tokens else (low, middle)
    raise ValueError(f"no scale of the queries lets {tokens} tokens survive; the nearest was {found:.1f}")

"""Not All Images are Worth 16x16 Words (NeurIPS 2021).

A cascade with growing numbers of tokens, left as soon as it is sure. Here: numbers that the command lines and the
computations share.
"""

BUDGETS = 59
"""Points of the published curve: the shares of the exits are geometric series with ratio p / 20, p = 1, ..., 59."""

SEARCH_IMAGES = 50_000
"""Training images on which thresholds are found, at most."""

TRANSFORMS = ("imagenet", "cifar")
"""How images are cropped and normalised: as in DVT's published evaluation, or in T2T-ViT's transfer to CIFAR."""

"""Facts of the three logs that the UVC release publishes, as data.

Stage-1 logs: a row per epoch. The stage-2 log: top-1 at some of its validations, and the gates it loaded.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochFacts:
    """One validation of stage 1, in the order of the log's numbers.

    Attributes:
        epoch, step: epochs and optimizer steps done.
        loss, top1_percent: on the validation set, with noisy soft gates and unmasked weights.
        kept_percent: mask elements that are one.
        expected_percent, real_percent: remaining cost by soft and by hard gates, both random samples.
    """

    epoch: int
    step: int
    loss: float
    top1_percent: float
    kept_percent: float
    expected_percent: float
    real_percent: float


@dataclass(frozen=True)
class PublishedLog:
    """A log of stage 1.

    Attributes:
        file: its name in the release.
        model_type: the network.
        depth: its number of blocks.
        budget: of the command.
        warmup_epochs: epochs before anything is pruned.
        final_blocks: blocks that run at the end.
    """

    file: str
    model_type: str
    depth: int
    budget: float
    warmup_epochs: int
    final_blocks: int
    epochs: tuple[EpochFacts, ...]
    note: str


_TINY = (
    (1, 5005, 1.3470, 68.656, 100.0, 75.58, 83.72),
    (2, 10010, 1.3330, 68.882, 100.0, 100.00, 100.00),
    (3, 15015, 1.3251, 69.314, 100.0, 91.86, 83.72),
    (4, 20020, 1.3343, 69.318, 100.0, 83.72, 83.72),
    (5, 25025, 1.3182, 69.292, 100.0, 91.86, 83.72),
    (6, 30030, 1.8557, 59.018, 99.19, 66.13, 64.69),
    (7, 35035, 1.9055, 57.574, 99.42, 57.84, 65.87),
    (8, 40040, 1.8604, 58.630, 99.34, 57.49, 57.65),
    (9, 45045, 2.4155, 48.564, 99.07, 44.13, 48.45),
    (10, 50050, 2.7997, 41.568, 99.21, 41.57, 41.57),
    (11, 55055, 2.5575, 45.128, 99.17, 41.51, 41.51),
    (12, 60060, 2.4732, 47.458, 99.16, 41.50, 41.50),
    (13, 65065, 2.3825, 48.898, 99.14, 41.45, 41.45),
    (14, 70070, 2.2933, 50.244, 99.15, 41.54, 41.46),
    (15, 75075, 2.2531, 50.824, 99.15, 41.45, 41.45),
    (16, 80080, 2.2025, 51.676, 99.18, 41.49, 41.49),
    (17, 85085, 2.1843, 52.440, 99.33, 42.52, 42.51),
    (18, 90090, 2.1366, 53.206, 99.37, 42.55, 42.55),
    (19, 95095, 2.1230, 53.786, 99.39, 42.58, 42.58),
    (20, 100100, 2.0992, 54.248, 99.41, 42.60, 42.60),
    (21, 105105, 2.0697, 54.704, 99.42, 42.62, 42.62),
    (22, 110110, 2.0679, 54.958, 99.44, 42.64, 42.64),
    (23, 115115, 2.0562, 55.232, 99.46, 42.65, 42.65),
    (24, 120120, 2.0256, 55.712, 99.47, 42.66, 42.66),
    (25, 125125, 2.0164, 55.812, 99.47, 42.67, 42.67),
    (26, 130130, 2.0006, 56.148, 99.48, 42.68, 42.68),
    (27, 135135, 1.9930, 56.290, 99.49, 42.69, 42.69),
    (28, 140140, 1.9924, 56.352, 99.49, 42.69, 42.69),
    (29, 145145, 1.9948, 56.284, 99.5, 42.70, 42.69),
    (30, 150150, 1.9954, 56.302, 99.5, 42.77, 42.70),
    (31, 155155, 1.9911, 56.284, 99.51, 42.75, 42.71),
)

_BASE = (
    (3, 7509, 0.9154, 79.568, 100.0, 91.72, 83.44),
    (4, 10012, 0.9356, 79.400, 100.0, 100.00, 91.72),
    (5, 12515, 0.9299, 79.354, 100.0, 75.16, 91.72),
    (6, 15018, 1.1842, 74.170, 99.95, 59.12, 66.84),
    (7, 17521, 5.8869, 6.808, 99.99, 9.83, 8.93),
    (8, 20024, 5.9513, 3.950, 99.99, 8.94, 8.94),
    (9, 22527, 5.6434, 6.176, 99.99, 8.94, 8.94),
    (10, 25030, 5.4454, 7.596, 99.99, 8.94, 8.94),
    (11, 27533, 5.3476, 8.804, 99.99, 8.94, 8.94),
    (12, 30036, 5.0157, 11.970, 99.99, 16.06, 17.22),
    (13, 32539, 4.3890, 18.930, 99.99, 17.21, 17.22),
    (14, 35042, 3.3319, 34.276, 99.99, 26.23, 25.49),
    (15, 37545, 2.0903, 54.858, 99.99, 34.15, 33.77),
    (16, 40048, 1.3822, 68.752, 99.99, 50.16, 50.33),
    (17, 42551, 1.7041, 62.768, 99.99, 37.54, 42.05),
    (18, 45054, 1.5219, 65.898, 99.99, 39.64, 42.05),
    (19, 47557, 1.4468, 67.514, 99.99, 42.43, 50.33),
    (20, 50060, 1.5801, 64.802, 99.99, 41.69, 42.05),
    (21, 52563, 2.1233, 55.090, 99.99, 33.76, 33.77),
    (22, 55066, 1.7739, 61.836, 99.99, 37.44, 33.77),
    (23, 57569, 1.4614, 67.174, 99.99, 40.56, 42.05),
    (24, 60072, 1.4412, 67.710, 99.99, 41.64, 42.05),
    (25, 62575, 1.4198, 68.180, 99.99, 41.85, 42.05),
    (26, 65078, 1.5018, 66.994, 99.99, 34.57, 42.05),
    (27, 67581, 1.4305, 68.094, 99.99, 43.70, 42.05),
    (28, 70084, 1.4188, 68.486, 99.99, 44.18, 42.05),
    (29, 72587, 1.4180, 68.412, 99.99, 35.38, 33.77),
    (30, 75090, 1.4339, 67.978, 99.99, 40.66, 50.33),
)

STAGE1 = {
    "deit-tiny": PublishedLog(
        "deit-tiny-log.log", "deit_tiny_patch16_224", 12, 0.5, 5, 5, tuple(EpochFacts(*row) for row in _TINY),
        "Two GPUs with 128 pictures each. Five of twelve blocks run at the end; width pruning is almost nil.",
    ),
    "deit-base": PublishedLog(
        "deit-base-log.log", "deit_base_patch16_224", 12, 0.5, 5, 6, tuple(EpochFacts(*row) for row in _BASE),
        "Batch 512, the log begins within epoch 3. Only gates act; the run collapses to one block and recovers.",
    ),
}  # fmt: skip
"""Name -> log of stage 1."""

STAGE2_TOP1 = {
    0: 74.238, 1: 75.578, 2: 76.330, 3: 76.782, 4: 77.102, 5: 77.356, 6: 77.558, 7: 77.736, 15: 78.194, 30: 78.528,
    60: 78.756, 75: 78.768, 90: 78.772, 105: 78.614, 120: 78.684, 135: 78.722, 150: 78.696,
}  # fmt: skip
"""Number of the validation -> top-1 in percent; deit-small-5041-7882.log, validation 0 is before training."""

STAGE2_BEST = (57, 78.822)
"""Number of the best validation, and its top-1 in percent."""

STAGE2_SKIPPED = (8, 10)
"""Blocks that the gates loaded there skip."""

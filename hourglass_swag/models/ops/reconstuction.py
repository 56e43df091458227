"""The published (misspelt) name of ``reconstruction``."""

from hourglass_swag.models.ops.reconstruction import (  # noqa: F401
    NaiveUnpooling,
    State,
    TokenReconstructionBlock,
    UnpoolingBase,
    naive_unpool,
)

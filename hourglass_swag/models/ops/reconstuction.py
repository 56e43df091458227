"""The published (misspelt) name of ``reconstruction``."""

from hourglass_swag.models.ops.reconstruction import NaiveUnpooling as NaiveUnpooling
from hourglass_swag.models.ops.reconstruction import State as State
from hourglass_swag.models.ops.reconstruction import TokenReconstructionBlock as TokenReconstructionBlock
from hourglass_swag.models.ops.reconstruction import UnpoolingBase as UnpoolingBase
from hourglass_swag.models.ops.reconstruction import naive_unpool as naive_unpool

"""Networks of SiT: the sizes of LV-ViT, slimmed or not. Importing this module registers them with timm."""

from timm.layers.mlp import Mlp as Mlp

from sit.models.lvvit import FACTORIES
from sit.models.lvvit import Attention as Attention
from sit.models.lvvit import Block as Block
from sit.models.lvvit import LVViT as LVViT
from sit.models.lvvit import PatchEmbed4CG as PatchEmbed4CG
from sit.models.lvvit import PatchEmbed6CG as PatchEmbed6CG
from sit.models.lvvit import PatchEmbedNaive as PatchEmbedNaive
from sit.models.lvvit import count_published_parameters as count_published_parameters
from sit.models.lvvit import get_dpr as get_dpr
from sit.models.slimming import ReverseTSM as ReverseTSM
from sit.models.slimming import TokenSlimmingModule as TokenSlimmingModule
from sit.models.slimming import slim_tokens as slim_tokens
from sit.sizes import SIZES as SIZES

globals().update(FACTORIES)

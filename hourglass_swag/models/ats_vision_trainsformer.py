"""The published (misspelt) name of ``ats_vision_transformer``."""

from hourglass_swag.models.ats_vision_transformer import (  # noqa: F401
    ATSBlock,
    ATSEncoder,
    ATSVisionTransformer,
    ATSViTB16,
    ATSViTDesk,
    ATSViTH14,
    ATSViTL16,
)

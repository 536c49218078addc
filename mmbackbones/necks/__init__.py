from .deimv2_encoder import DEIMv2ConvEncoder, DEIMv2HybridEncoder
from .hybrid_encoder import HybridEncoder
from .lite_encoder import LiteEncoder
from .rtdetr_encoder import RTDETRHybridEncoder

__all__ = [
    'DEIMv2ConvEncoder',
    'DEIMv2HybridEncoder',
    'HybridEncoder',
    'LiteEncoder',
    'RTDETRHybridEncoder',
]

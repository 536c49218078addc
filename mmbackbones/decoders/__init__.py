from .deim_decoder import DEIMDecoder, DEIMRTDETRv2Decoder
from .deimv2_decoder import DEIMv2Decoder, DEIMv2LiteDecoder
from .dfine_decoder import DFINEDecoder
from .rtdetr_decoder import RTDETRDecoder, RTDETRv2Decoder

__all__ = [
    'DEIMDecoder',
    'DEIMRTDETRv2Decoder',
    'DEIMv2Decoder',
    'DEIMv2LiteDecoder',
    'DFINEDecoder',
    'RTDETRDecoder',
    'RTDETRv2Decoder',
]

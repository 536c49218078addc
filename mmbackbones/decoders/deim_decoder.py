"""DEIM's decoders: those of D-FINE and RT-DETRv2 with another activation.

DEIM: DETR with Improved Matching for Fast Convergence, arXiv 2412.04234.
Upstream: https://github.com/Intellindust-AI-Lab/DEIM engine/deim/dfine_decoder.py
and rtdetrv2_decoder.py (Apache-2.0).
Departs from the source: as `DFINEDecoder` and `RTDETRv2Decoder`.
"""

from torch import nn

from mmbackbones.decoders.dfine_decoder import DFINEDecoder
from mmbackbones.decoders.rtdetr_decoder import RTDETRv2Decoder
from mmbackbones.layers.mlp import MLP
from mmbackbones.registry import MODELS

__all__ = ['DEIMDecoder', 'DEIMRTDETRv2Decoder']


@MODELS.register_module()
class DEIMDecoder(DFINEDecoder):
    """D-FINE's decoder with SiLU in layers, box heads and quality estimation.

    Arguments and state dict are those of `DFINEDecoder`; weights of one run in the
    other, but mean something else there.
    """

    activation = nn.SiLU


@MODELS.register_module()
class DEIMRTDETRv2Decoder(RTDETRv2Decoder):
    """RT-DETRv2's decoder with SiLU, and positions from a deeper, narrower head.

    Weights of RT-DETRv2 do not fit `query_pos_head`.

    Args:
        *args: as `RTDETRv2Decoder`.
        **kwargs: as `RTDETRv2Decoder`.
    """

    activation = nn.SiLU
    flip_crossed = True  # noise as in D-FINE

    def _query_pos_head(self) -> MLP:
        dim = self.hidden_dim
        head = MLP(4, dim, dim, 3, self.activation)
        for linear in head.layers[:2]:
            nn.init.xavier_uniform_(linear.weight)
        return head

"""DEIMv2's decoders: D-FINE's refinement in lighter layers.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/deim_decoder.py
(Apache-2.0).
Departs from the source: as `DFINEDecoder`.
"""

from torch import nn

from mmbackbones.decoders.dfine_decoder import DFINEDecoder
from mmbackbones.layers.deimv2_layer import (
    SwiGLUDecoderLayer,
    SwiGLUGatedDecoderLayer,
)
from mmbackbones.layers.mlp import MLP
from mmbackbones.registry import MODELS

__all__ = ['DEIMv2Decoder', 'DEIMv2LiteDecoder']


@MODELS.register_module()
class DEIMv2Decoder(DFINEDecoder):
    """Of sizes N to X: SwiGLU layers, positions from the selected boxes alone.

    Encoder heads read the maps as they are, and so does the content of the queries.
    Arguments are those of `DFINEDecoder`; `feedforward_channels` counts gates, too.
    """

    activation = nn.SiLU
    positions_follow_boxes = False
    layer_type = SwiGLUGatedDecoderLayer

    def _enc_output(self) -> nn.Module:
        return nn.Identity()

    def _query_pos_head(self) -> MLP:
        head = MLP(4, self.hidden_dim, self.hidden_dim, 3, self.activation)
        for linear in head.layers:
            nn.init.xavier_uniform_(linear.weight)
        return head

    def _layer(self) -> nn.Module:
        return self.layer_type(
            self.hidden_dim, self.num_heads, self.num_points, self.feedforward_channels
        )


@MODELS.register_module()
class DEIMv2LiteDecoder(DEIMv2Decoder):
    """Of sizes Atto, Femto and Pico: no gates, and one box head for all layers.

    The state dict lists the shared head under the number of each layer.
    """

    layer_type = SwiGLUDecoderLayer

    def _bbox_heads(self, out_channels: int) -> list[MLP]:
        return [self._bbox_head(out_channels)] * self.num_layers

"""DEIMv2's hybrid encoders: D-FINE's with sums in the place of concatenations.

Real-Time Object Detection Meets DINOv3, arXiv 2509.20787.
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/deim/hybrid_encoder.py
(Apache-2.0).
Departs from the source: as `HybridEncoder`.
"""

from torch import Tensor, nn

from mmbackbones.layers.reparam import RepNCSPELAN
from mmbackbones.layers.split_elan import SplitELAN, SplitELANConv
from mmbackbones.necks.hybrid_encoder import HybridEncoder
from mmbackbones.registry import MODELS

__all__ = ['DEIMv2ConvEncoder', 'DEIMv2HybridEncoder']


@MODELS.register_module()
class DEIMv2HybridEncoder(HybridEncoder):
    """Of sizes M, L and X: adds maps, and fuses them by `SplitELAN`.

    A map that has `hidden_dim` channels already is not projected. Args and
    attributes are those of `HybridEncoder`.
    """

    block_type: type[RepNCSPELAN] = SplitELAN

    def _input_proj(self, in_channels: int) -> nn.Module:
        if in_channels == self.hidden_dim:
            return nn.Identity()
        return super()._input_proj(in_channels)

    def _fusion_block(self) -> nn.Module:
        return self.block_type(
            in_channels=self.hidden_dim,
            out_channels=self.hidden_dim,
            mid_channels=2 * self.hidden_dim,
            branch_channels=int(self.expansion * self.hidden_dim // 2),
            num_blocks=round(3 * self.depth_mult),
        )

    @staticmethod
    def _join(resized: Tensor, x: Tensor) -> Tensor:
        return resized + x


@MODELS.register_module()
class DEIMv2ConvEncoder(DEIMv2HybridEncoder):
    """Of sizes N and S: a 3x3 convolution follows each branch, as in D-FINE."""

    block_type = SplitELANConv

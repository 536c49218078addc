"""RT-DETR's hybrid encoder, v1 and v2: D-FINE's with other convolutions.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069.
Upstream: https://github.com/lyuwenyu/RT-DETR
rtdetrv2_pytorch/src/zoo/rtdetr/hybrid_encoder.py (Apache-2.0).
Departs from the source: as `HybridEncoder`.
"""

from torch import nn

from mmbackbones.layers.reparam import ConvNorm, CSPRepLayer, RepVGGBlock
from mmbackbones.necks.hybrid_encoder import HybridEncoder
from mmbackbones.registry import MODELS

__all__ = ['RTDETRHybridEncoder']


@MODELS.register_module()
class RTDETRHybridEncoder(HybridEncoder):
    """Fuses with one CSP layer a step; all its convolutions but `input_proj` have SiLU.

    Args and attributes are those of `HybridEncoder`, except that `expansion` is the
    width inside a fusion block in units of `hidden_dim`, and `depth_mult` the number
    of its RepVGG blocks in units of 3.
    """

    def _lateral(self) -> nn.Module:
        return ConvNorm(self.hidden_dim, self.hidden_dim, 1, activation=nn.SiLU)

    def _downsample(self) -> nn.Module:
        return ConvNorm(
            self.hidden_dim, self.hidden_dim, 3, stride=2, activation=nn.SiLU
        )

    def _fusion_block(self) -> nn.Module:
        return CSPRepLayer(
            2 * self.hidden_dim,
            self.hidden_dim,
            num_blocks=round(3 * self.depth_mult),
            mid_channels=int(self.hidden_dim * self.expansion),
        )

    def switch_to_deploy(self) -> None:
        """Re-parameterise the RepVGG blocks in place, as published; no others."""
        self.eval()
        for module in list(self.modules()):
            if isinstance(module, RepVGGBlock):
                module.switch_to_deploy()

from mmbackbones.backbones.convnextv2 import ConvNeXtV2
from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.backbones.hiera import Hiera

__all__ = ['ConvNeXtV2', 'HGNetV2', 'Hiera']

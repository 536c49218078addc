from mmbackbones.backbones.convnextv2 import ConvNeXtV2
from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.backbones.hgnetv2_lite import HGNetV2Lite
from mmbackbones.backbones.hiera import Hiera
from mmbackbones.backbones.resnet_vd import ResNetVD

__all__ = ['ConvNeXtV2', 'HGNetV2', 'HGNetV2Lite', 'Hiera', 'ResNetVD']

"""UPerNet with HGNetV2-B4 on ADE20K, crops of 512 x 512.

No result is published; here: not measured. The recipe of a convolutional backbone
of this size, ConvNeXt-T, without drop path, as HGNetV2's weights were trained
without: AdamW 1e-4, decay 0.05, layer-wise rate 0.9. Stage-1 weights are those that
PaddlePaddle recommends for tasks other than ImageNet.
8 GPUs x 2 images = 16 per step.

    bash tools/dist_train.sh configs/upernet_hgnetv2_b4_ade20k.py 8
"""

from mmengine.config import read_base
from mmengine.model import PretrainedInit

from mmbackbones.backbones.hgnetv2 import HGNetV2

with read_base():
    from ._base_.ade20k import *
    from ._base_.segmentation_runtime import *
    from ._base_.upernet_model import *
    from ._base_.upernet_schedule import *

model.backbone = dict(
    type=HGNetV2,
    arch='b4',
    init_cfg=dict(type=PretrainedInit, checkpoint='weights/PPHGNetV2_B4_stage1.pth'),
)

"""UPerNet with ConvNeXt V2-T on ADE20K, crops of 512 x 512.

No result is published for this size; here: not measured. Recipe of the published
larger ones (ConvNeXt V2 paper: AdamW 1e-4, decay 0.05, 160k iterations, batch 16,
layer-wise rate 0.9; drop path 0.4 as published for ConvNeXt-T, the upper end of V2's
sweep), from weights that were fine-tuned on ImageNet-1k, which the paper found better
than bare FCMAE ones. Norms on the maps, as there.
8 GPUs x 2 images = 16 per step. Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/upernet_convnextv2_tiny_ade20k.py 8
"""

from mmengine.config import read_base
from mmengine.model import PretrainedInit

from mmbackbones.backbones.convnextv2 import ConvNeXtV2

with read_base():
    from ._base_.ade20k import *
    from ._base_.segmentation_runtime import *
    from ._base_.upernet_model import *
    from ._base_.upernet_schedule import *

model.backbone = dict(
    type=ConvNeXtV2,
    arch='tiny',
    drop_path_rate=0.4,
    with_out_norm=True,
    init_cfg=dict(
        type=PretrainedInit, checkpoint='weights/convnextv2_tiny_1k_224_ema.pt'
    ),
)

"""UPerNet with ConvNeXt V2-B on ADE20K, crops of 512 x 512.

Reference 52.1 mIoU as published, tested at several scales; here: not measured.
The paper's recipe where it names one value; of its sweeps (rate 1e-4 to 3e-4,
layer-wise 0.8 or 0.9, drop path 0.1 to 0.4) those of the published ConvNeXt-B.
8 GPUs x 2 images = 16 per step. Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/upernet_convnextv2_base_ade20k.py 8
"""

from mmengine.config import read_base

with read_base():
    from .upernet_convnextv2_tiny_ade20k import *

model.backbone.update(
    arch='base',
    init_cfg=dict(checkpoint='weights/convnextv2_base_1k_224_ema.pt'),
)

"""UPerNet with HGNetV2-B0 on ADE20K, crops of 512 x 512.

No result is published; here: not measured. Recipe as argued in
upernet_hgnetv2_b4_ade20k.py.
8 GPUs x 2 images = 16 per step.

    bash tools/dist_train.sh configs/upernet_hgnetv2_b0_ade20k.py 8
"""

from mmengine.config import read_base

with read_base():
    from .upernet_hgnetv2_b4_ade20k import *

model.backbone.update(
    arch='b0',
    init_cfg=dict(checkpoint='weights/PPHGNetV2_B0_stage1.pth'),
)

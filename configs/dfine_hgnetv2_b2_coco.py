"""D-FINE-M: HGNetV2-B2 on COCO (upstream configs/dfine/dfine_hgnetv2_m_coco.yml).

Reference 52.3 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 132 epochs, the last 12 without strong augmentation.

    bash tools/dist_train.sh configs/dfine_hgnetv2_b2_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b0_coco import *

model.update(
    backbone=dict(
        arch='b2', init_cfg=dict(checkpoint='weights/PPHGNetV2_B2_stage1.pth')
    ),
    neck=dict(expansion=1.0, depth_mult=0.67),  # was 0.5, 0.34
    decoder=dict(num_layers=4),  # was 3
)
model.data_preprocessor.batch_augments[0].base_size_repeat = 6  # was 20

optim_wrapper.paramwise_cfg.groups[0].lr_mult = 0.1  # backbone 2e-5

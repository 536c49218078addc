"""RT-DETRv2-X: ResNet101-vd on COCO (upstream rtdetrv2_r101vd_6x_coco.yml).

Reference 54.3 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs, the last without strong augmentation.

    bash tools/dist_train.sh configs/rtdetrv2_r101vd_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetrv2_r50vd_coco import *

model.update(
    backbone=dict(
        arch='r101',
        init_cfg=dict(
            checkpoint='weights/ResNet101_vd_ssld_pretrained_from_paddle.pth'
        ),
    ),
    neck=dict(hidden_dim=384, feedforward_channels=2048),  # was 256, 1024
)

optim_wrapper.paramwise_cfg.groups[0].lr_mult = 0.01  # backbone 1e-6

"""RT-DETRv2 with HGNetV2-B5 on COCO (upstream rtdetrv2_hgnetv2_x_6x_coco.yml).

Reference 54.7 AP as published, of weights converted from PaddlePaddle; here: not
measured.
4 GPUs x 4 images = 16 per step; 72 epochs, the last without strong augmentation.

    bash tools/dist_train.sh configs/rtdetrv2_hgnetv2_b5_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetrv2_hgnetv2_b4_coco import *

model.update(
    backbone=dict(
        arch='b5',
        init_cfg=dict(checkpoint='weights/PPHGNetV2_X_ssld_pretrained_from_paddle.pth'),
    ),
    neck=dict(hidden_dim=384, feedforward_channels=2048),  # was 256, 1024
)

optim_wrapper.paramwise_cfg.groups[0].lr_mult = 0.01  # backbone 1e-6

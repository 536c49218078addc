"""RT-DETR-X: HGNetV2-B5 on COCO (upstream rtdetr_paddle rtdetr_hgnetv2_x_6x_coco.yml).

Reference 54.8 AP as published; here: not measured. Recipe as of
rtdetr_hgnetv2_b4_coco.py.
4 GPUs x 4 images = 16 per step; 72 epochs.

    bash tools/dist_train.sh configs/rtdetr_hgnetv2_b5_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetr_hgnetv2_b4_coco import *

model.update(
    backbone=dict(
        arch='b5',
        init_cfg=dict(checkpoint='weights/PPHGNetV2_X_ssld_pretrained_from_paddle.pth'),
    ),
    neck=dict(hidden_dim=384, feedforward_channels=2048),  # was 256, 1024
)

optim_wrapper.paramwise_cfg.groups[0].lr_mult = 0.01  # backbone 1e-6

"""RT-DETRv2-H: HGNetV2-B6 on COCO (upstream rtdetrv2_hgnetv2_h_6x_coco.yml).

Reference 56.3 AP as published, of weights converted from PaddlePaddle; here: not
measured.
4 GPUs x 4 images = 16 per step; 72 epochs, the last without strong augmentation.

    bash tools/dist_train.sh configs/rtdetrv2_hgnetv2_b6_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetrv2_hgnetv2_b4_coco import *

model.update(
    backbone=dict(
        arch='b6',
        init_cfg=dict(checkpoint='weights/PPHGNetV2_H_ssld_pretrained_from_paddle.pth'),
    ),
    neck=dict(
        hidden_dim=512,  # was 256
        num_encoder_layers=2,  # was 1
        feedforward_channels=2048,  # was 1024
    ),
)

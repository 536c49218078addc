"""RT-DETR-R34: ResNet34-vd on COCO (upstream rtdetr_r34vd_6x_coco.yml).

Reference 48.9 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs.

    bash tools/dist_train.sh configs/rtdetr_r34vd_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetr_r18vd_coco import *

model.update(
    backbone=dict(
        arch='r34',
        init_cfg=dict(checkpoint='weights/ResNet34_vd_pretrained_from_paddle.pth'),
    ),
    decoder=dict(num_layers=4),  # was 3
)

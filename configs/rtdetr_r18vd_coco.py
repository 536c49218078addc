"""RT-DETR-R18: ResNet18-vd on COCO (upstream rtdetr_r18vd_6x_coco.yml).

Reference 46.5 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs.

    bash tools/dist_train.sh configs/rtdetr_r18vd_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetr_r50vd_coco import *

model.update(
    backbone=dict(
        arch='r18',
        frozen_stages=-1,  # was 0
        frozen_norm=False,  # was True
        init_cfg=dict(checkpoint='weights/ResNet18_vd_pretrained_from_paddle.pth'),
    ),
    neck=dict(expansion=0.5),  # was 1
    decoder=dict(num_layers=3),  # was 6
)

# Norms of the backbone learn here, and are not decayed.
optim_wrapper.paramwise_cfg.groups.insert(
    0,
    dict(
        name='backbone_norms',
        match=r'^backbone\..*norm',
        lr_mult=0.1,
        decay_mult=0.0,
    ),
)

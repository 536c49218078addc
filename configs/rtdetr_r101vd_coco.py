"""RT-DETR-R101: ResNet101-vd on COCO (upstream rtdetr_r101vd_6x_coco.yml).

Reference 54.3 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs.

    bash tools/dist_train.sh configs/rtdetr_r101vd_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetr_r50vd_coco import *

model.update(
    backbone=dict(
        arch='r101',
        init_cfg=dict(
            checkpoint='weights/ResNet101_vd_ssld_pretrained_from_paddle.pth'
        ),
    ),
    neck=dict(hidden_dim=384, feedforward_channels=2048),  # was 256, 1024
)

# As published, everything is decayed: upstream's list for the backbone replaces the
# one with the exceptions.
optim_wrapper.paramwise_cfg = dict(
    groups=[dict(name='backbone', match=r'^backbone\.', lr_mult=0.01)]
)

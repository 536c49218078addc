"""RT-DETRv2-M*: ResNet34-vd on COCO (upstream rtdetrv2_r34vd_120e_coco.yml).

Reference 49.9 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 120 epochs, the last 3 without strong augmentation.

    bash tools/dist_train.sh configs/rtdetrv2_r34vd_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .rtdetrv2_r50vd_coco import *

model.update(
    backbone=dict(
        arch='r34',
        frozen_stages=-1,  # was 0
        frozen_norm=False,  # was True
        init_cfg=dict(checkpoint='weights/ResNet34_vd_pretrained_from_paddle.pth'),
    ),
    neck=dict(expansion=0.5),  # was 1
    decoder=dict(num_layers=4),  # was 6
)

optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(
            name='backbone_norms',
            match=r'^backbone\..*norm',
            lr_mult=0.5,
            decay_mult=0.0,
        ),
        dict(name='backbone', match=r'^backbone\.', lr_mult=0.5),
        dict(
            name='norms_biases',
            match=r'^(encoder|decoder)\..*(norm|bias)',
            decay_mult=0.0,
        ),
    ]
)

train_cfg.max_epochs = 120  # was 72
default_hooks.stage_switch.num_final_epochs = 3  # was 1

"""RT-DETRv2 with HGNetV2-B4 on COCO (upstream rtdetrv2_hgnetv2_l_6x_coco.yml).

Reference 52.9 AP as published, of weights converted from PaddlePaddle; here: not
measured.
4 GPUs x 4 images = 16 per step; 72 epochs, the last without strong augmentation.

    bash tools/dist_train.sh configs/rtdetrv2_hgnetv2_b4_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.backbones.hgnetv2 import HGNetV2

with read_base():
    from .rtdetrv2_r50vd_coco import *

model.backbone = dict(
    type=HGNetV2,
    arch='b4',
    use_lab=False,
    out_indices=(1, 2, 3),
    frozen_stages=0,  # the stem
    frozen_norm=True,
    init_cfg=dict(
        type=PretrainedInit,
        checkpoint='weights/PPHGNetV2_L_ssld_pretrained_from_paddle.pth',
    ),
)

optim_wrapper.paramwise_cfg.groups[0].lr_mult = 0.05  # backbone 5e-6

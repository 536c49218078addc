"""RT-DETR-L: HGNetV2-B4 on COCO (upstream rtdetr_paddle rtdetr_hgnetv2_l_6x_coco.yml).

Reference 53.0 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs. Published in PaddlePaddle alone, from
which the rates, the warm-up and the decay of all tensors are; the augmentation is
that of the PyTorch code (Paddle's fills zoomed-out images with the mean colour and
resizes batches with a random interpolation).

    bash tools/dist_train.sh configs/rtdetr_hgnetv2_b4_coco.py 4
"""

from mmengine.config import read_base
from mmengine.optim import LinearLR

from mmbackbones.backbones.hgnetv2 import HGNetV2

with read_base():
    from .rtdetr_r50vd_coco import *

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

optim_wrapper.paramwise_cfg = dict(
    groups=[dict(name='backbone', match=r'^backbone\.', lr_mult=0.05)]
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.001, by_epoch=False, begin=0, end=2000)
]

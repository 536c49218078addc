"""RT-DETRv2-L: ResNet50-vd on COCO (upstream rtdetrv2_r50vd_6x_coco.yml).

Reference 53.4 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs, the last without strong augmentation and
multi-scale.

    bash tools/dist_train.sh configs/rtdetrv2_r50vd_coco.py 4
"""

from mmengine.config import read_base
from mmengine.optim import AmpOptimWrapper, LinearLR

from mmbackbones.decoders.rtdetr_decoder import RTDETRv2Decoder

with read_base():
    from .rtdetr_r50vd_coco import *

model.decoder.update(
    type=RTDETRv2Decoder,
    cross_attn_method='default',
    query_select_method='default',
)

optim_wrapper.update(type=AmpOptimWrapper, loss_scale='dynamic')
# The published groups: biases are decayed, those of norms are not.
optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(name='backbone', match=r'^backbone\.', lr_mult=0.1),
        dict(name='norms', match=r'^(encoder|decoder)\..*norm', decay_mult=0.0),
    ]
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1 / 2000, by_epoch=False, begin=0, end=2000)
]
default_hooks.stage_switch.num_final_epochs = 1  # was 0

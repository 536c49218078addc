"""D-FINE-L: HGNetV2-B4 on COCO (upstream configs/dfine/dfine_hgnetv2_l_coco.yml).

Reference 54.0 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 80 epochs of 3696 steps, the last 8 without
strong augmentation and multi-scale.

    bash tools/dist_train.sh configs/dfine_hgnetv2_b4_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.engine.ema import RampEMAHook
from mmbackbones.engine.stage_switch import StageSwitchHook

with read_base():
    from ._base_.coco_detection import *
    from ._base_.default_runtime import *
    from ._base_.dfine_model import *
    from ._base_.dfine_schedule import *

model.update(
    backbone=dict(
        arch='b4',
        use_lab=False,
        frozen_stages=0,  # the stem
        frozen_norm=True,
    ),
    neck=dict(
        hidden_dim=256,
        use_encoder_idx=(2,),
        feedforward_channels=1024,
        expansion=1.0,
        depth_mult=1.0,
    ),
    decoder=dict(
        hidden_dim=256,
        num_layers=6,
        num_points=(3, 6, 3),
        feedforward_channels=1024,
    ),
)

optim_wrapper.optimizer.update(lr=2.5e-4, weight_decay=1.25e-4)
# The published groups; the first match wins, the rest is decayed. As published,
# biases of encoder and decoder are decayed in L and X, their norms are not.
optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(name='backbone', match=r'^backbone\.', lr_mult=0.05),
        dict(name='norms', match=r'^(encoder|decoder)\..*(norm|bn)', decay_mult=0.0),
    ]
)

train_cfg.max_epochs = 80
default_hooks.update(
    ema=dict(
        type=RampEMAHook,
        momentum=1e-4,  # decay 0.9999
        warmup_iters=1000,
    ),
    stage_switch=dict(
        type=StageSwitchHook, num_final_epochs=8, pipeline=final_pipeline
    ),
)

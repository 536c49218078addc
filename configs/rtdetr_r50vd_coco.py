"""RT-DETR-R50: ResNet50-vd on COCO (upstream rtdetr_r50vd_6x_coco.yml).

Reference 53.1 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 72 epochs. Augmentation and multi-scale never stop,
and there is neither warm-up nor mixed precision.

    bash tools/dist_train.sh configs/rtdetr_r50vd_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.engine.ema import RampEMAHook
from mmbackbones.engine.stage_switch import StageSwitchHook

with read_base():
    from ._base_.coco_detection import *
    from ._base_.default_runtime import *
    from ._base_.rtdetr_model import *
    from ._base_.rtdetr_schedule import *

model.update(
    backbone=dict(
        arch='r50',
        frozen_stages=0,  # the stem
        frozen_norm=True,
    ),
    neck=dict(
        hidden_dim=256,
        use_encoder_idx=(2,),
        num_encoder_layers=1,
        feedforward_channels=1024,
        expansion=1.0,
        depth_mult=1.0,
    ),
    decoder=dict(
        hidden_dim=256, num_layers=6, feedforward_channels=1024, eval_layer=-1
    ),
)

# The published groups; the first match wins, the rest is decayed. As published, the
# norms of encoder.input_proj and decoder.enc_output are decayed (but not their
# biases): upstream they have numbers for names, which its patterns miss.
optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(name='backbone', match=r'^backbone\.', lr_mult=0.1),
        dict(
            name='numbered_norms',
            match=r'^(encoder\.input_proj\.\d|decoder\.enc_output)\.norm\.weight',
        ),
        dict(
            name='norms_biases',
            match=r'^(encoder|decoder)\..*(norm|bias)',
            decay_mult=0.0,
        ),
    ]
)

train_dataloader.batch_size = 4
default_hooks.update(
    ema=dict(
        type=RampEMAHook,
        momentum=1e-4,  # decay 0.9999
        warmup_iters=2000,
    ),
    stage_switch=dict(
        type=StageSwitchHook,
        num_final_epochs=0,  # no final stage
        pipeline=final_pipeline,
        reload_best=False,
    ),
)

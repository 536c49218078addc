"""The demo: a small D-FINE from random weights on drawn shapes, CPU or GPU.

Reference: none. Here: AP 0.542 on 100 images not trained on (but on which these
settings and the best epoch were chosen) after 5.4 minutes on 2 CPU cores.
1 process x 16 images, 30 epochs of 50 steps, 96 x 96 pixels, flips only.

    python tools/demo.py
    python tools/train.py configs/dfine_demo.py --data-root outputs/demo/data
"""

from mmdet.datasets.transforms import (
    LoadAnnotations,
    PackDetInputs,
    RandomFlip,
    Resize,
)
from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import EpochBasedTrainLoop

from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.data.det_transforms import (
    DropSmallBoxes,
    LoadImage,
)

with read_base():
    from .dfine_hgnetv2_b0_coco import *

data_root = 'outputs/demo/data/'

# A tenth of D-FINE-N: four short stages, width 64, 60 queries for at most 8 objects.
model.backbone = dict(
    type=HGNetV2,
    arch=dict(
        stem_channels=(3, 8, 16),
        stage_in_channels=(16, 32, 64, 128),
        stage_mid_channels=(16, 24, 32, 48),
        stage_out_channels=(32, 64, 128, 192),
        stage_num_blocks=(1, 1, 1, 1),
        stage_downsample=(False, True, True, True),
        stage_light_block=(False, False, True, True),
        stage_kernel_size=(3, 3, 5, 5),
        stage_numb_of_layers=(2, 2, 2, 2),
        use_learnable_affine_block=True,
    ),
    out_indices=(1, 2, 3),
)
model.neck.update(hidden_dim=64, feedforward_channels=128)
model.decoder.update(
    num_classes=None,  # follows the annotation file
    hidden_dim=64,
    num_queries=60,
    num_layers=2,
    feedforward_channels=128,
    num_denoising=30,
    eval_size_hw=(96, 96),
)
model.data_preprocessor.batch_augments = None
model.test_cfg.max_per_img = 60

_resize = dict(type=Resize, scale=(96, 96), keep_ratio=False, backend='pillow')
train_pipeline = [
    dict(type=LoadImage),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(
        type=RandomFlip,
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    _resize,
    dict(type=DropSmallBoxes),
    dict(type=PackDetInputs),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    _resize,
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs),
]

train_dataloader.update(batch_size=16, num_workers=1)
train_dataloader.dataset.update(
    data_root=data_root,
    ann_file='annotations/instances_train.json',
    data_prefix=dict(img='train/'),
    pipeline=train_pipeline,
)
val_dataloader.update(batch_size=25, num_workers=1)
val_dataloader.dataset.update(
    data_root=data_root,
    ann_file='annotations/instances_val.json',
    data_prefix=dict(img='val/'),
    pipeline=test_pipeline,
)
test_dataloader = val_dataloader
val_evaluator.ann_file = None  # follows the val data set
test_evaluator = val_evaluator

# Small and short: a high rate, half of the run at a falling one, a fast average.
optim_wrapper.optimizer.lr = 2e-3
optim_wrapper.paramwise_cfg.groups[0].lr_mult = 1.0
param_scheduler = [
    dict(type=LinearLR, start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type=CosineAnnealingLR,
        eta_min_ratio=0.02,
        by_epoch=True,
        begin=13,
        end=30,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=30, val_interval=10)
default_hooks.logger.interval = 25
default_hooks.checkpoint.interval = 10
default_hooks.ema.update(momentum=0.01, warmup_iters=100)
default_hooks.stage_switch.num_final_epochs = 0

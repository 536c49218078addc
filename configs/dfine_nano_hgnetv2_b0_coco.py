"""D-FINE-N: HGNetV2-B0, two levels, on COCO (upstream dfine_hgnetv2_n_coco.yml).

Reference 42.8 AP as published; here: not measured.
4 GPUs x 32 images = 128 per step; 160 epochs of 924 steps, the last 12 without
strong augmentation. No multi-scale.

    bash tools/dist_train.sh configs/dfine_nano_hgnetv2_b0_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b0_coco import *

model.update(
    backbone=dict(out_indices=(2, 3)),  # was 1, 2, 3: strides 16 and 32 only
    neck=dict(
        hidden_dim=128,  # was 256
        use_encoder_idx=(1,),
        feedforward_channels=512,  # was 1024
        expansion=0.34,  # was 0.5
        depth_mult=0.5,  # was 0.34
    ),
    decoder=dict(hidden_dim=128, num_points=(6, 6), feedforward_channels=512),
)
model.data_preprocessor.batch_augments = None

train_dataloader.batch_size = 32  # was 8
val_dataloader.batch_size = 64
optim_wrapper.optimizer.lr = 8e-4  # was 2e-4; backbone 4e-4
auto_scale_lr.base_batch_size = 128

train_cfg.max_epochs = 160  # was 132

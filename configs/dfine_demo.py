"""The demo: a small D-FINE from random weights on drawn shapes, CPU or GPU.

AP 0.5 or better on unseen images is the aim; see the README for what it reaches.
1 process x 16 images; the last 2 epochs without zoom-out and crop.

    python tools/demo.py
    python tools/train.py configs/dfine_demo.py --data-root outputs/demo/data
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b0_coco import *

data_root = 'outputs/demo/data/'

# A tenth of D-FINE-N: four short stages, width 64, 60 queries for at most 8 objects.
model.backbone = dict(
    type=HGNetV2,
    arch=dict(
        stem_channels=(3, 16, 16),
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

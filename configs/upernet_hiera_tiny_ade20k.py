"""UPerNet with Hiera-T on ADE20K, crops of 512 x 512.

No result is published; here: not measured. Recipe as argued in
upernet_hiera_base_ade20k.py; drop path 0.1 as on ImageNet.
8 GPUs x 2 images = 16 per step. Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/upernet_hiera_tiny_ade20k.py 8
"""

from mmengine.config import read_base

with read_base():
    from .upernet_hiera_base_ade20k import *

model.backbone.update(
    arch='tiny',
    drop_path_rate=0.1,  # was 0.2
    init_cfg=dict(checkpoint='weights/hiera_tiny_224.pth'),
)

# Over 12 blocks, as many as ViT-B has.
optim_wrapper.paramwise_cfg.layer_decay = 0.65  # was 0.8

"""UPerNet with Hiera-L on ADE20K, crops of 512 x 512.

No result is published; here: not measured. Recipe as argued in
upernet_hiera_base_ade20k.py; drop path 0.4 as in Hiera's COCO recipe.
8 GPUs x 2 images = 16 per step. Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/upernet_hiera_large_ade20k.py 8
"""

from mmengine.config import read_base

with read_base():
    from .upernet_hiera_base_ade20k import *

model.backbone.update(
    arch='large',
    drop_path_rate=0.4,  # was 0.2
    init_cfg=dict(checkpoint='weights/hiera_large_224.pth'),
)

optim_wrapper.paramwise_cfg.layer_decay = (
    0.9  # was 0.8: 48 blocks; 0.9 over them makes 0.006
)

"""D-FINE with Hiera-T on COCO: encoder, decoder and schedule of D-FINE-L.

Not published; here: not measured. Recipe as argued in dfine_hiera_base_coco.py; drop
path 0.1, as on ImageNet. Over 12 blocks the rate is 2.7e-5 on average.
4 GPUs x 8 images = 32 per step; 80 epochs, the last 8 without strong augmentation.
Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/dfine_hiera_tiny_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hiera_base_coco import *

model.backbone.update(
    arch='tiny',
    drop_path_rate=0.1,  # was 0.2
    init_cfg=dict(checkpoint='weights/hiera_tiny_224.pth'),
)

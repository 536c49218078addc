"""D-FINE with Hiera-B+ on COCO: encoder, decoder and schedule of D-FINE-L.

Not published; here: not measured. Recipe as argued in dfine_hiera_base_coco.py.
4 GPUs x 8 images = 32 per step; 80 epochs, the last 8 without strong augmentation.
Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/dfine_hiera_base_plus_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hiera_base_coco import *

model.backbone.update(
    arch='base_plus',
    init_cfg=dict(checkpoint='weights/hiera_base_plus_224.pth'),
)

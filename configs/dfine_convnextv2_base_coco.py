"""D-FINE with ConvNeXt V2-B on COCO: encoder, decoder and schedule of D-FINE-L.

Not published; here: not measured. Recipe as argued in dfine_convnextv2_tiny_coco.py;
drop path 0.3, within the paper's sweep of 0.2 to 0.5 for this size.
4 GPUs x 8 images = 32 per step; 80 epochs, the last 8 without strong augmentation.
Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/dfine_convnextv2_base_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_convnextv2_tiny_coco import *

model.backbone.update(
    arch='base',
    drop_path_rate=0.3,  # was 0.2
    init_cfg=dict(checkpoint='weights/convnextv2_base_1k_224_ema.pt'),
)

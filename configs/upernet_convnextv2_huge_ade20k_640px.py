"""UPerNet with ConvNeXt V2-H on ADE20K, crops of 640 x 640.

Reference 57.0 mIoU as published, tested at several scales; here: not measured. From
weights that were trained on ImageNet-22k in between. Needs GPUs of 80 GB.
8 GPUs x 2 images = 16 per step. Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/upernet_convnextv2_huge_ade20k_640px.py 8
"""

from mmengine.config import read_base

with read_base():
    from .upernet_convnextv2_tiny_ade20k import *

model.backbone.update(
    arch='huge',
    with_cp=True,
    init_cfg=dict(checkpoint='weights/convnextv2_huge_22k_512_ema.pt'),
)
model.data_preprocessor.size = (640, 640)  # was 512, as all below
model.test_cfg.update(crop_size=(640, 640), stride=(426, 426))
train_dataloader.dataset.pipeline[2].scale = (2560, 640)
train_dataloader.dataset.pipeline[3].crop_size = (640, 640)
val_dataloader.dataset.pipeline[1].scale = (2560, 640)
test_dataloader = val_dataloader

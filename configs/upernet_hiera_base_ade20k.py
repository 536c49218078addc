"""UPerNet with Hiera-B on ADE20K, crops of 512 x 512.

No result is published; here: not measured. The recipe is argued from its relatives:
- AdamW 1e-4 with decay 0.05 as for ViT-B pre-trained likewise (MAE) under UPerNet;
- layer-wise rate 0.8: MAE's 0.65 over the 12 blocks of ViT-B makes 0.006 from top to
  bottom, 0.8 over 24 blocks makes 0.005. (ViTDet goes from 0.7 at 12 blocks to 0.8
  at 24 likewise.) Hiera's own 0.7 for ImageNet goes with a 20 times higher rate;
- drop path 0.2 and maps of all stages as in Hiera's COCO recipe;
- norms on the maps, as in all UPerNets of this kind.
`arch='base_abswin'` or `'sam2_base_plus'` with their weights have position tables
that are made for other sizes than 224.
8 GPUs x 2 images = 16 per step. Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/upernet_hiera_base_ade20k.py 8
"""

from mmengine.config import read_base
from mmengine.model import PretrainedInit

from mmbackbones.backbones.hiera import Hiera

with read_base():
    from ._base_.ade20k import *
    from ._base_.segmentation_runtime import *
    from ._base_.upernet_model import *
    from ._base_.upernet_schedule import *

model.backbone = dict(
    type=Hiera,
    arch='base',
    drop_path_rate=0.2,
    with_out_norm=True,
    init_cfg=dict(type=PretrainedInit, checkpoint='weights/hiera_base_224.pth'),
)

optim_wrapper.paramwise_cfg.layer_decay = 0.8  # was 0.9

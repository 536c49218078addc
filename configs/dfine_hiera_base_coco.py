"""D-FINE with Hiera-B on COCO: encoder, decoder and schedule of D-FINE-L.

Not published; here: not measured. What differs from D-FINE-L, and why:
- ImageNet statistics, with which Hiera's weights were trained;
- drop path 0.2 and decay 0.05 on the backbone (AdamW), as in Hiera's own fine-tuning
  on COCO (0.2) and ImageNet (0.05);
- its rate: on COCO it was fine-tuned with 3.5e-5 at batch 64 without layer-wise
  decay, on ImageNet with it. Here 5e-5 at the top and 0.9 per block: over 24 blocks
  that is 1.7e-5 on average, the published rate at our batch of 32;
- norms on the three maps, which differ in scale; norms, biases and position tables
  are not decayed, in encoder and decoder neither.
`arch='base_abswin'` or `'sam2_base_plus'` with their weights have position tables
that are made for other sizes than 224.
4 GPUs x 8 images = 32 per step; 80 epochs, the last 8 without strong augmentation.
Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/dfine_hiera_base_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.backbones.hiera import Hiera

with read_base():
    from .dfine_hgnetv2_b4_coco import *

model.backbone = dict(
    type=Hiera,
    arch='base',
    out_indices=(1, 2, 3),
    drop_path_rate=0.2,
    with_out_norm=True,
    init_cfg=dict(type=PretrainedInit, checkpoint='weights/hiera_base_224.pth'),
)
model.data_preprocessor.update(  # was RGB in [0, 1]
    mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)

optim_wrapper.paramwise_cfg = dict(
    # 0.2 x 2.5e-4 = 5e-5, 400 x 1.25e-4 = 0.05
    groups=[dict(name='backbone', match=r'^backbone\.', lr_mult=0.2, decay_mult=400.0)],
    layer_decay=0.9,
    decay_vectors=False,
)

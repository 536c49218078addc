"""D-FINE with ConvNeXt V2-A on COCO: encoder, decoder, schedule of D-FINE-S.

Not published; here: not measured. Its backbone, 3.4M parameters, stands in the place
of 1.9M of HGNetV2-B0. Rates and decay as argued in
dfine_convnextv2_tiny_coco.py; drop path 0.1, as on ImageNet.
4 GPUs x 8 images = 32 per step; 132 epochs, the last 12 without strong augmentation.
Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/dfine_convnextv2_atto_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.backbones.convnextv2 import ConvNeXtV2

with read_base():
    from .dfine_hgnetv2_b0_coco import *

model.backbone = dict(
    type=ConvNeXtV2,
    arch='atto',
    out_indices=(1, 2, 3),
    drop_path_rate=0.1,
    with_out_norm=True,
    init_cfg=dict(
        type=PretrainedInit, checkpoint='weights/convnextv2_atto_1k_224_ema.pt'
    ),
)
model.data_preprocessor.update(  # was RGB in [0, 1]
    mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)

optim_wrapper.paramwise_cfg = dict(
    # 0.5 x 2e-4 = 1e-4, 500 x 1e-4 = 0.05
    groups=[dict(name='backbone', match=r'^backbone\.', lr_mult=0.5, decay_mult=500.0)],
    layer_decay=0.9,
    decay_vectors=False,
)

"""D-FINE with ConvNeXt V2-T on COCO: encoder, decoder and schedule of D-FINE-L.

Not published; here: not measured. What differs from D-FINE-L, and why:
- ImageNet statistics, with which ConvNeXt V2's weights were trained;
- the backbone learns as it does under Mask R-CNN in its paper, at the same batch of
  32: AdamW 1e-4, decay 0.05, layer-wise rate 0.9, drop path 0.2 (the paper's sweep
  begins there, and ImageNet's value for T is the same);
- norms on the three maps, which differ in scale; norms, biases and GRN are not
  decayed, in encoder and decoder neither.
4 GPUs x 8 images = 32 per step; 80 epochs, the last 8 without strong augmentation.
Weights: CC BY-NC 4.0.

    bash tools/dist_train.sh configs/dfine_convnextv2_tiny_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.backbones.convnextv2 import ConvNeXtV2

with read_base():
    from .dfine_hgnetv2_b4_coco import *

model.backbone = dict(
    type=ConvNeXtV2,
    arch='tiny',
    out_indices=(1, 2, 3),
    drop_path_rate=0.2,
    with_out_norm=True,
    init_cfg=dict(
        type=PretrainedInit, checkpoint='weights/convnextv2_tiny_1k_224_ema.pt'
    ),
)
model.data_preprocessor.update(  # was RGB in [0, 1]
    mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)

optim_wrapper.paramwise_cfg = dict(
    # 0.4 x 2.5e-4 = 1e-4, 400 x 1.25e-4 = 0.05
    groups=[dict(name='backbone', match=r'^backbone\.', lr_mult=0.4, decay_mult=400.0)],
    layer_decay=0.9,
    decay_vectors=False,
)

"""DEIMv2-S with HGNetV2-B0 on COCO (upstream deimv2_hgnetv2_s_coco.yml).

No AP is published for it; here: not measured.
4 GPUs x 8 images = 32 per step; 132 epochs: 4 without strong augmentation, 60 with
mosaic, mix-up and copy-blend, 56 with copy-blend alone, 12 without any.

    bash tools/dist_train.sh configs/deimv2_hgnetv2_b0_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.necks.deimv2_encoder import DEIMv2ConvEncoder

with read_base():
    from .deim_hgnetv2_b0_coco import *
    from ._base_.deimv2_recipe import *

model.update(deimv2_model)
model.neck.type = DEIMv2ConvEncoder
model.data_preprocessor.batch_augments.insert(1, copy_blend)

# Rates, groups and epochs are those of DEIM-S.
default_hooks.matcher_switch = matcher_switch
default_hooks.matcher_switch.update(of_epochs=132, start=100)
default_hooks.stage_switch.phases[1].augments = (
    'MixUp', 'CopyBlend', 'MultiScaleResize')  # fmt: skip
default_hooks.stage_switch.phases[1].pipeline[2].transforms[0][0].cache_size = 50
default_hooks.stage_switch.phases[2].augments = ('CopyBlend', 'MultiScaleResize')

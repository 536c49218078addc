"""DEIMv2-L with HGNetV2-B4 on COCO (upstream deimv2_hgnetv2_l_coco.yml).

No AP is published for it; here: not measured.
4 GPUs x 8 images = 32 per step; 58 epochs: 4 without strong augmentation, 25 with
mosaic, mix-up and copy-blend, 21 with copy-blend alone, 8 without any.

    bash tools/dist_train.sh configs/deimv2_hgnetv2_b4_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .deim_hgnetv2_b4_coco import *
    from ._base_.deimv2_recipe import *

model.update(deimv2_model)
model.data_preprocessor.batch_augments.insert(1, copy_blend)

# Rates, groups and epochs are those of DEIM-L.
default_hooks.matcher_switch = matcher_switch
default_hooks.stage_switch.phases[1].augments = (
    'MixUp', 'CopyBlend', 'MultiScaleResize')  # fmt: skip
default_hooks.stage_switch.phases[1].pipeline[2].transforms[0][0].cache_size = 50
default_hooks.stage_switch.phases[2].augments = ('CopyBlend', 'MultiScaleResize')

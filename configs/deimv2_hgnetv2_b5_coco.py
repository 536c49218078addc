"""DEIMv2-X with HGNetV2-B5 on COCO (upstream deimv2_hgnetv2_x_coco.yml).

No AP is published for it; here: not measured.
4 GPUs x 8 images = 32 per step; 58 epochs with the phases of size L.

    bash tools/dist_train.sh configs/deimv2_hgnetv2_b5_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .deim_hgnetv2_b5_coco import *
    from ._base_.deimv2_recipe import *

model.update(deimv2_model)
model.backbone.update(frozen_stages=0, frozen_norm=True)  # as D-FINE-X, unlike DEIM-X
model.data_preprocessor.batch_augments.insert(1, copy_blend)

# Rates, groups and epochs are those of DEIM-X.
default_hooks.matcher_switch = matcher_switch
default_hooks.stage_switch.phases[1].augments = (
    'MixUp', 'CopyBlend', 'MultiScaleResize')  # fmt: skip
default_hooks.stage_switch.phases[1].pipeline[2].transforms[0][0].cache_size = 50
default_hooks.stage_switch.phases[2].augments = ('CopyBlend', 'MultiScaleResize')

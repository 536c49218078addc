"""DEIMv2-N: HGNetV2-B0, two levels, on COCO (upstream deimv2_hgnetv2_n_coco.yml).

Reference 43.0 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step, as the upstream file says; DEIM-N has 128 at the
same rate. 160 epochs: 4 without strong augmentation, 74 with mosaic, mix-up and
copy-blend, 70 without these, 12 without any. No multi-scale, and no cosine.

    bash tools/dist_train.sh configs/deimv2_nano_hgnetv2_b0_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.necks.deimv2_encoder import DEIMv2ConvEncoder

with read_base():
    from .deim_nano_hgnetv2_b0_coco import *
    from ._base_.deimv2_recipe import *

model.update(deimv2_model)
model.neck.type = DEIMv2ConvEncoder
model.decoder.feedforward_channels = 512  # was 2048
copy_blend.prob = 0.4  # was 0.5
model.data_preprocessor.batch_augments.append(copy_blend)

train_dataloader.batch_size = 8  # was 32
auto_scale_lr.base_batch_size = 32  # was 128
# Rates, groups and epochs are those of DEIM-N.
default_hooks.matcher_switch = matcher_switch
default_hooks.matcher_switch.update(of_epochs=160, start=136)
default_hooks.stage_switch.phases[1].augments = ('MixUp', 'CopyBlend')
default_hooks.stage_switch.phases[1].pipeline[2].transforms[0][0].cache_size = 50

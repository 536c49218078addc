"""DEIM of D-FINE-N on COCO (upstream configs/deim_dfine/deim_hgnetv2_n_coco.yml).

Reference 43.0 AP as published; here: not measured.
4 GPUs x 32 images = 128 per step; 160 epochs of 924 steps: 4 without strong
augmentation, 74 with mosaic and mix-up, 70 without these, 12 without any. No
multi-scale, and no cosine.

    bash tools/dist_train.sh configs/deim_nano_hgnetv2_b0_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.decoders.deim_decoder import DEIMDecoder

with read_base():
    from .dfine_nano_hgnetv2_b0_coco import *
    from ._base_.deim_recipe import *

model.update(deim_model)
model.decoder.type = DEIMDecoder
model.data_preprocessor.batch_augments = [mix_up]

# Rates and groups are those of D-FINE-N.
param_scheduler[0].update(of_epochs=160, flat_until=148, constant_from=148, gamma=1.0)
default_hooks.stage_switch = dense_o2o
default_hooks.stage_switch.update(of_epochs=160, ends=(4, 78, 148))

"""DEIM of RT-DETRv2-S: ResNet18-vd on COCO (upstream deim_r18vd_120e_coco.yml).

Reference 49.0 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 120 epochs: 4 without strong augmentation, 60 with
mosaic and mix-up, 53 without these, 3 without any. No multi-scale. Weights of RT-
DETRv2 do not fit the decoder.

    bash tools/dist_train.sh configs/deim_rtdetrv2_r18vd_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.decoders.deim_decoder import DEIMRTDETRv2Decoder

with read_base():
    from .rtdetrv2_r18vd_coco import *
    from ._base_.deim_recipe import *

model.update(deim_model)
model.decoder.type = DEIMRTDETRv2Decoder
model.data_preprocessor.batch_augments = [mix_up]

optim_wrapper.optimizer.lr = 2e-4  # was 1e-4
param_scheduler[0].update(of_epochs=120, flat_until=64, constant_from=117)
default_hooks.stage_switch = dense_o2o
default_hooks.stage_switch.update(of_epochs=120, ends=(4, 64, 117))

"""DEIM of RT-DETRv2-L: ResNet50-vd on COCO (upstream deim_r50vd_60e_coco.yml).

Reference 54.3 AP as published; here: not measured.
4 GPUs x 4 images = 16 per step; 60 epochs: 4 without strong augmentation, 30 with
mosaic and mix-up, 24 without these, 2 without any. Weights of RT-DETRv2 do not fit
the decoder.

    bash tools/dist_train.sh configs/deim_rtdetrv2_r50vd_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.decoders.deim_decoder import DEIMRTDETRv2Decoder

with read_base():
    from .rtdetrv2_r50vd_coco import *
    from ._base_.deim_recipe import *

model.update(deim_model)
model.decoder.type = DEIMRTDETRv2Decoder
model.backbone.update(frozen_stages=-1, frozen_norm=False)  # was 0, True
model.data_preprocessor.batch_augments.insert(0, mix_up)

optim_wrapper.optimizer.lr = 2e-4  # was 1e-4; backbone 2e-5
# Norms, those of the backbone too, at the full rate and undecayed.
optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(name='backbone', match=r'^backbone\.(?!.*norm)', lr_mult=0.1),
        dict(name='norms', match='norm', decay_mult=0.0),
    ]
)
param_scheduler[0].update(of_epochs=60, flat_until=34, constant_from=58)
default_hooks.stage_switch = dense_o2o
default_hooks.stage_switch.update(of_epochs=60, ends=(4, 34, 58))
train_cfg.max_epochs = 60  # was 72

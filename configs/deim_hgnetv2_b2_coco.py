"""DEIM of D-FINE-M on COCO (upstream configs/deim_dfine/deim_hgnetv2_m_coco.yml).

Reference 52.7 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 102 epochs: 4 without strong augmentation, 45 with
mosaic and mix-up, 41 without these, 12 without any.

    bash tools/dist_train.sh configs/deim_hgnetv2_b2_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.decoders.deim_decoder import DEIMDecoder

with read_base():
    from .dfine_hgnetv2_b2_coco import *
    from ._base_.deim_recipe import *

model.update(deim_model)
model.decoder.type = DEIMDecoder
model.data_preprocessor.batch_augments.insert(0, mix_up)

optim_wrapper.optimizer.lr = 4e-4  # was 2e-4
# As size S: norms, those of the backbone too, at the full rate and undecayed.
optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(name='backbone', match=r'^backbone\.(?!.*bn)', lr_mult=0.1),
        dict(name='norms', match=r'norm|bn', decay_mult=0.0),
    ]
)
param_scheduler[0].update(of_epochs=102, flat_until=49, constant_from=90)
default_hooks.stage_switch = dense_o2o
default_hooks.stage_switch.update(of_epochs=102, ends=(4, 49, 90))
train_cfg.max_epochs = 102  # was 132

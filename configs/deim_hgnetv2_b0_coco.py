"""DEIM of D-FINE-S on COCO (upstream configs/deim_dfine/deim_hgnetv2_s_coco.yml).

Reference 49.0 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 132 epochs: 4 without strong augmentation, 60 with
mosaic and mix-up, 56 without these, 12 without any.

    bash tools/dist_train.sh configs/deim_hgnetv2_b0_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.decoders.deim_decoder import DEIMDecoder

with read_base():
    from .dfine_hgnetv2_b0_coco import *
    from ._base_.deim_recipe import *

model.update(deim_model)
model.decoder.type = DEIMDecoder
model.data_preprocessor.batch_augments.insert(0, mix_up)

optim_wrapper.optimizer.lr = 4e-4  # was 2e-4
# As published: of the backbone, convolutions and LAB are decayed at its rate; its
# norms go with all others, undecayed and at the full rate. Biases are decayed.
optim_wrapper.paramwise_cfg = dict(
    groups=[
        dict(name='backbone', match=r'^backbone\.(?!.*bn)', lr_mult=0.5),
        dict(name='norms', match=r'norm|bn', decay_mult=0.0),
    ]
)
param_scheduler[0].update(of_epochs=132, flat_until=64, constant_from=120)
default_hooks.stage_switch = dense_o2o
default_hooks.stage_switch.update(of_epochs=132, ends=(4, 64, 120))

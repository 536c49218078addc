"""DEIM of D-FINE-X on COCO (upstream configs/deim_dfine/deim_hgnetv2_x_coco.yml).

Reference 56.5 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 58 epochs with the phases of size L.

    bash tools/dist_train.sh configs/deim_hgnetv2_b5_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.decoders.deim_decoder import DEIMDecoder

with read_base():
    from .dfine_hgnetv2_b5_coco import *
    from ._base_.deim_recipe import *

model.update(deim_model)
model.decoder.type = DEIMDecoder
model.backbone.update(frozen_stages=-1, frozen_norm=False)  # was 0, True
model.data_preprocessor.batch_augments.insert(0, mix_up)

optim_wrapper.optimizer.lr = 5e-4  # was 2.5e-4; backbone 5e-6
default_hooks.stage_switch = dense_o2o
train_cfg.max_epochs = 58  # was 80

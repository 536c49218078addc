"""D-FINE-S: from Objects365 to COCO (upstream dfine_hgnetv2_s_obj2coco.yml).

Reference 50.7 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 64 epochs, the last 8 without strong augmentation.
Rows of the 80 COCO classes are taken from the Objects365 head by name.

    bash tools/dist_train.sh configs/dfine_hgnetv2_b0_obj365_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b0_coco import *

load_from = 'weights/dfine_s_obj365.pth'
optim_wrapper.optimizer.update(lr=2.5e-4, weight_decay=1.25e-4)  # was 2e-4, 1e-4
model.data_preprocessor.batch_augments[0].base_size_repeat = 10  # was 20
param_scheduler = []  # no warm-up
default_hooks.ema.warmup_iters = 0  # was 1000: a constant decay
train_cfg.max_epochs = 64
default_hooks.stage_switch.num_final_epochs = 8

"""D-FINE-L: from Objects365 to COCO (upstream dfine_hgnetv2_l_obj2coco.yml).

Reference 57.1 AP as published; here: not measured.
4 GPUs x 8 images = 32 per step; 36 epochs, the last 6 without strong augmentation.
Rows of the 80 COCO classes are taken from the Objects365 head by name.

    bash tools/dist_train.sh configs/dfine_hgnetv2_b4_obj365_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b4_coco import *

load_from = 'weights/dfine_l_obj365.pth'
param_scheduler = []  # no warm-up
default_hooks.ema.warmup_iters = 0  # was 1000: a constant decay
train_cfg.max_epochs = 36
default_hooks.stage_switch.num_final_epochs = 6

"""D-FINE-N: from Objects365 to COCO (upstream dfine_hgnetv2_n_obj2coco.yml).

No AP is published; here: not measured.
4 GPUs x 32 images = 128 per step; 64 epochs, the last 8 without strong augmentation.
Rows of the 80 COCO classes are taken from the Objects365 head by name.

    bash tools/dist_train.sh configs/dfine_nano_hgnetv2_b0_obj365_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_nano_hgnetv2_b0_coco import *

load_from = 'weights/dfine_n_obj365.pth'
param_scheduler = []  # no warm-up
default_hooks.ema.warmup_iters = 0  # was 1000: a constant decay
train_cfg.max_epochs = 64
default_hooks.stage_switch.num_final_epochs = 8

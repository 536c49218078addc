"""D-FINE-L: pre-training on Objects365 (upstream dfine_hgnetv2_l_obj365.yml).

Reference 40.6 AP on the first 5000 val images as published; here:
not measured.
4 GPUs x 8 images = 32 per step; 24 epochs, augmentation never stops.

    bash tools/dist_train.sh configs/dfine_hgnetv2_b4_obj365.py 4
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b4_coco import *
    from ._base_.objects365 import *

train_dataloader.dataset.update(objects365_train)
val_dataloader.dataset.update(objects365_val)
test_dataloader.dataset.update(objects365_val)
val_evaluator.ann_file = objects365_ann_file
test_evaluator.ann_file = objects365_ann_file

# 366 rows, as in the published weights: the label is the category id (1..365),
# row 0 never sees a positive.
model.decoder.num_classes = 366
train_cfg.max_epochs = 24
default_hooks.stage_switch.num_final_epochs = 0  # no final stage

"""D-FINE-S on your own data: copy this file, edit the four lines under "Yours".

Any COCO-style json will do; category ids need not be contiguous. The number of
classes and their names follow from the annotation file. Recipe: upstream's
fine-tuning from Objects365 or COCO weights (dfine_hgnetv2_s_obj2custom.yml),
64 epochs, the last 8 without strong augmentation; but the average of weights keeps
its ramp: without, it would be nine tenths pre-trained after 1000 steps.

Other models: rtdetrv2_r18vd_custom, deim_hgnetv2_b0_custom and
deimv2_hgnetv2_atto_custom in this folder, each for any config of its family.

    python tools/browse_dataset.py configs/dfine_hgnetv2_b0_custom.py
    python tools/train.py configs/dfine_hgnetv2_b0_custom.py --auto-scale-lr
"""

from mmengine.config import read_base

with read_base():
    from .dfine_hgnetv2_b0_obj365_coco import *  # or another dfine_*_obj365_coco

# Yours ------------------------------------------------------------------------
data_root = 'data/custom/'
train = dict(ann_file='annotations/train.json', data_prefix=dict(img='images/'))
val = dict(ann_file='annotations/val.json', data_prefix=dict(img='images/'))
load_from = 'weights/dfine_s_obj365.pth'  # or dfine_s_coco.pth, or None
# ------------------------------------------------------------------------------

train_dataloader.dataset.update(train, data_root=data_root)
val_dataloader.dataset.update(val, data_root=data_root)
test_dataloader = val_dataloader
val_evaluator.ann_file = None  # follows the val data set
test_evaluator = val_evaluator
model.decoder.num_classes = None  # follows the annotation file

default_hooks.ema.warmup_iters = 1000  # was 0, see above

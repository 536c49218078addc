"""DEIMv2-Atto on your own data: copy this file, edit the four lines under "Yours".

Any COCO-style json will do; category ids need not be contiguous. The number of
classes and their names follow from the annotation file. The recipe is that of
COCO, shorter, its phases with their shares of the run; nothing is published for
own data.

    python tools/browse_dataset.py configs/deimv2_hgnetv2_atto_custom.py
    python tools/train.py configs/deimv2_hgnetv2_atto_custom.py --auto-scale-lr
"""

from mmengine.config import read_base

with read_base():
    from .deimv2_hgnetv2_atto_coco import *  # or another deimv2_*_coco

# Yours ------------------------------------------------------------------------
data_root = 'data/custom/'
train = dict(ann_file='annotations/train.json', data_prefix=dict(img='images/'))
val = dict(ann_file='annotations/val.json', data_prefix=dict(img='images/'))
load_from = 'weights/deimv2_hgnetv2_atto_coco.pth'  # or None
# ------------------------------------------------------------------------------

train_dataloader.dataset.update(train, data_root=data_root)
val_dataloader.dataset.update(val, data_root=data_root)
test_dataloader = val_dataloader
val_evaluator.ann_file = None  # follows the val data set
test_evaluator = val_evaluator
model.decoder.num_classes = None  # follows the annotation file

param_scheduler[0].warmup = 100  # iterations; was 4000
train_cfg.max_epochs = 100  # was 500

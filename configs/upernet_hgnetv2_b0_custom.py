"""UPerNet on your own label maps: copy this file, edit the lines under "Yours".

Maps are PNG files of one channel, named as their images. What their ids are is told
once, by a class file with `id: name` lines (or a plain list of names); the number of
classes follows from it. Any other upernet config may stand in the place of the B0.
Trained as on ADE20K, but for 20k iterations.

    python tools/browse_dataset.py configs/upernet_hgnetv2_b0_custom.py
    python tools/train.py configs/upernet_hgnetv2_b0_custom.py --auto-scale-lr
"""

from mmengine.config import read_base

from mmbackbones.data.seg_folders import SegmentationFolders

with read_base():
    from .upernet_hgnetv2_b0_ade20k import *

# Yours ------------------------------------------------------------------------
data_root = 'data/custom_segmentation/'
class_file = 'classes.yaml'  # below data_root
reduce_zero_label = True  # id 0 is void: ignored, no class
train = dict(img_path='images/train', seg_map_path='annotations/train')
val = dict(img_path='images/val', seg_map_path='annotations/val')
load_from = None  # a checkpoint of upernet_hgnetv2_b0_ade20k.py, say
# ------------------------------------------------------------------------------

train_dataloader.dataset = dict(
    type=SegmentationFolders,
    data_root=data_root,
    data_prefix=train,
    class_file=class_file,
    reduce_zero_label=reduce_zero_label,
    pipeline=train_pipeline,
)
val_dataloader.dataset = dict(
    type=SegmentationFolders,
    data_root=data_root,
    data_prefix=val,
    class_file=class_file,
    reduce_zero_label=reduce_zero_label,
    test_mode=True,
    pipeline=test_pipeline,
)
test_dataloader = val_dataloader
model.num_classes = None  # follows class_file

train_cfg.update(max_iters=20_000, val_interval=2_000)  # was 160k, 16k
default_hooks.checkpoint.interval = 2_000

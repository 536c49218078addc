"""ADE20K semantic segmentation, 150 classes, crops of 512 x 512."""

from mmcv.transforms import RandomFlip, RandomResize, Resize
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmseg.datasets.transforms import (
    PackSegInputs,
    PhotoMetricDistortion,
    RandomCrop,
)
from mmseg.evaluation import IoUMetric

from mmbackbones.data.seg_folders import ADE20K
from mmbackbones.data.seg_transforms import LoadLabelMap, LoadSegImage

# With images/{training,validation} and annotations/{training,validation}; id 0 is
# void and ignored, ids 1 to 150 are the classes.
data_root = 'data/ade/ADEChallengeData2016/'

# A leaf with another crop edits the pipelines where they are used, by position.
train_pipeline = [
    dict(type=LoadSegImage),
    dict(type=LoadLabelMap),
    dict(
        type=RandomResize,
        resize_type=Resize,
        scale=(2048, 512),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(type=RandomCrop, crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type=RandomFlip, prob=0.5),
    dict(type=PhotoMetricDistortion),
    dict(type=PackSegInputs),
]
# By these names mmseg's inferencer finds the loaders; our data sets read with
# LoadSegImage and LoadLabelMap. The map comes after Resize and keeps its size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type=Resize, scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type=PackSegInputs),
]

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type=InfiniteSampler, shuffle=True),
    dataset=dict(
        type=ADE20K,
        data_root=data_root,
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,  # images differ in size
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=ADE20K,
        data_root=data_root,
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'
        ),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# mIoU, mAcc and aAcc in percent, and a table by class.
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
test_evaluator = val_evaluator

"""COCO 2017 detection at 640 x 640 with the published D-FINE augmentation."""

from mmdet.datasets.transforms import (
    LoadAnnotations,
    PackDetInputs,
    RandomFlip,
    Resize,
)
from mmengine.dataset import DefaultSampler

from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.det_transforms import (
    DropSmallBoxes,
    LoadImage,
    PhotometricDistort,
    RandomIoUCrop,
    RandomZoomOut,
)
from mmbackbones.data.fast_transforms import (
    FastLoadImage,
    PackPlanes,
    WindowDistort,
    WindowFlip,
    WindowIoUCrop,
    WindowResize,
    WindowZoomOut,
)
from mmbackbones.evaluation.coco import FastCocoMetric

data_root = 'data/coco/'

# Stretched to the square with an antialiased filter, as the originals were
# trained and are evaluated.
_resize = dict(
    type=Resize,
    scale=(640, 640),
    keep_ratio=False,
    backend='pillow',
    interpolation='bilinear',
)
_meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
_pack = dict(type=PackDetInputs, meta_keys=_meta_keys)

# Only what is seen in the end is distorted, and resampled once. The steps draw the same
# numbers as the plain pipelines below, and give the same boxes.
train_pipeline = [
    dict(type=FastLoadImage),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=WindowDistort),
    dict(type=WindowZoomOut),
    dict(type=WindowIoUCrop),
    dict(type=DropSmallBoxes),
    dict(type=WindowFlip, prob=0.5),
    dict(type=WindowResize, scale=(640, 640)),
    dict(type=DropSmallBoxes),
    dict(type=PackPlanes, meta_keys=_meta_keys),
]
# The last epochs: no distortion, zoom-out or crop.
final_pipeline = [
    dict(type=FastLoadImage),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=DropSmallBoxes),
    dict(type=WindowFlip, prob=0.5),
    dict(type=WindowResize, scale=(640, 640)),
    dict(type=DropSmallBoxes),
    dict(type=PackPlanes, meta_keys=_meta_keys),
]
# To compare with: one pass over the image a step, as the originals. A leaf chooses them
# by `train_dataloader.dataset.pipeline = plain_train_pipeline` and
# `default_hooks.stage_switch.pipeline = plain_final_pipeline`.
plain_train_pipeline = [
    dict(type=LoadImage),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PhotometricDistort),
    dict(type=RandomZoomOut),
    dict(type=RandomIoUCrop),
    dict(type=DropSmallBoxes),
    dict(type=RandomFlip, prob=0.5),
    _resize,
    dict(type=DropSmallBoxes),
    _pack,
]
plain_final_pipeline = [
    dict(type=LoadImage),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=DropSmallBoxes),
    dict(type=RandomFlip, prob=0.5),
    _resize,
    dict(type=DropSmallBoxes),
    _pack,
]
# By this name DetInferencer finds the loader; CocoDetection reads with LoadImage.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    _resize,
    dict(type=LoadAnnotations, with_bbox=True),
    _pack,
]

train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=CocoDetection,
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDetection,
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type=FastCocoMetric, ann_file=data_root + 'annotations/instances_val2017.json'
)
test_evaluator = val_evaluator

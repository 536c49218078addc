"""The runtime of all configs, for segmentation: counted in iterations, by mIoU."""

from mmengine.config import read_base

from mmbackbones.evaluation.seg_pictures import SegPictureHook, SegVisualizer

with read_base():
    from .default_runtime import *

default_scope = 'mmseg'

default_hooks.logger.log_metric_by_epoch = False
default_hooks.checkpoint.update(by_epoch=False, interval=16_000, save_best='mIoU')
default_hooks.visualization = dict(type=SegPictureHook)
default_hooks.pop('val_loss')  # of detectors
default_hooks.curves.metrics = ('mIoU', 'mAcc', 'aAcc')
log_processor.by_epoch = False

visualizer = dict(
    type=SegVisualizer,
    vis_backends=[dict(type=PatientVisBackend)],
    name='visualizer',
    alpha=0.6,
)

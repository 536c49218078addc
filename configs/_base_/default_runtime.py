"""Hooks, logging and environment shared by every config."""

from mmdet.engine.hooks import DetVisualizationHook
from mmdet.visualization import DetLocalVisualizer
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.visualization import LocalVisBackend

from mmbackbones.engine.curves import CurveHook
from mmbackbones.engine.load_report import LoadReportHook
from mmbackbones.engine.train_log import CompactLogProcessor, LogHistoryHook

default_scope = 'mmdet'
custom_imports = dict(imports=['mmbackbones'], allow_failed_imports=False)

# A leaf edits an entry by its key: default_hooks.checkpoint.interval = 5.
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook,
        interval=1,
        max_keep_ckpts=3,
        save_best='coco/bbox_mAP',
        rule='greater',
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=DetVisualizationHook),
    load_report=dict(type=LoadReportHook),
    log_history=dict(type=LogHistoryHook),
    curves=dict(type=CurveHook),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
sync_bn = 'torch'  # takes effect in distributed runs on GPUs only

visualizer = dict(
    type=DetLocalVisualizer,
    vis_backends=[dict(type=LocalVisBackend)],
    name='visualizer',
)
log_processor = dict(type=CompactLogProcessor, window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0)

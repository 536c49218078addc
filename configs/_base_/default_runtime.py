"""Hooks, logging and environment shared by every config."""

from mmdet.engine.hooks import DetVisualizationHook
from mmdet.visualization import DetLocalVisualizer
from mmengine.hooks import (
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)

from mmbackbones.data.read_faults import ReadFaultHook
from mmbackbones.engine.curves import CurveHook
from mmbackbones.engine.disk_space import PatientVisBackend
from mmbackbones.engine.load_report import LoadReportHook
from mmbackbones.engine.loader_watch import LoaderWatchHook
from mmbackbones.engine.nan_guard import NanGuardHook
from mmbackbones.engine.preemption import PreemptionHook
from mmbackbones.engine.safe_checkpoint import SafeCheckpointHook
from mmbackbones.engine.step_scalars import StepScalarsHook
from mmbackbones.engine.train_log import CompactLogProcessor, LogHistoryHook
from mmbackbones.engine.val_loss import ValLossHook

default_scope = 'mmdet'
custom_imports = dict(imports=['mmbackbones'], allow_failed_imports=False)
# Resumes at any iteration; its checkpoints are whole or not there.
runner_type = 'mmbackbones.engine.safe_runner.SafeRunner'

# A leaf edits an entry by its key: default_hooks.checkpoint.interval = 5.
default_hooks = dict(
    runtime_info=dict(type=StepScalarsHook),
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=SafeCheckpointHook,
        interval=1,
        iter_interval=1000,  # states to resume from, between the others
        max_keep_ckpts=3,
        save_best='coco/bbox_mAP',
        rule='greater',
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=DetVisualizationHook),
    load_report=dict(type=LoadReportHook),
    log_history=dict(type=LogHistoryHook),
    curves=dict(type=CurveHook),
    nan_guard=dict(type=NanGuardHook, patience=20),
    read_faults=dict(type=ReadFaultHook, max_share=0.01),
    preemption=dict(type=PreemptionHook),
    val_loss=dict(type=ValLossHook),
    loader_watch=dict(type=LoaderWatchHook),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
sync_bn = 'torch'  # takes effect in distributed runs on GPUs only

visualizer = dict(
    type=DetLocalVisualizer,
    vis_backends=[dict(type=PatientVisBackend)],
    name='visualizer',
)
log_processor = dict(type=CompactLogProcessor, window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0)

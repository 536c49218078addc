"""Toy models and data that several test files share."""

import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

# A three-layer HGNetV2 of a few thousand parameters, four stages.
TOY_ARCH = dict(
    stem_channels=(3, 8, 8),
    stage_in_channels=(8, 16, 24, 32),
    stage_mid_channels=(8, 8, 8, 8),
    stage_out_channels=(16, 24, 32, 40),
    stage_num_blocks=(1, 1, 1, 1),
    stage_downsample=(False, True, True, True),
    stage_light_block=(False, False, True, True),
    stage_kernel_size=(3, 3, 5, 5),
    stage_numb_of_layers=(1, 1, 1, 1),
    use_learnable_affine_block=True,
)


def toy_detector_cfg(num_classes: int = 3, **overrides: dict) -> ConfigDict:
    """D-FINE with all its parts at toy width; `overrides` merge by key."""
    cfg = ConfigDict(
        type='DFINE',
        data_preprocessor=dict(
            type='mmdet.DetDataPreprocessor',
            mean=(0, 0, 0),
            std=(255, 255, 255),
            bgr_to_rgb=True,
        ),
        backbone=dict(type='HGNetV2', arch=TOY_ARCH, out_indices=(1, 2, 3)),
        neck=dict(
            type='HybridEncoder',
            hidden_dim=32,
            feedforward_channels=32,
            expansion=0.5,
            depth_mult=0.34,
        ),
        decoder=dict(
            type='DFINEDecoder',
            num_classes=num_classes,
            hidden_dim=32,
            num_queries=20,
            num_layers=2,
            feedforward_channels=32,
            num_denoising=10,
            eval_size_hw=(64, 64),
        ),
        criterion=dict(type='DFINECriterion'),
        test_cfg=dict(max_per_img=20),
    )
    cfg.update(overrides)
    return cfg


def data_sample(
    boxes: list | None = None,
    labels: list | None = None,
    input_hw: tuple[int, int] = (64, 64),
    original_hw: tuple[int, int] | None = None,
) -> DetDataSample:
    """One image's metadata and `(n, 4)` xyxy pixel boxes; no boxes by default."""
    original_hw = original_hw or input_hw
    sample = DetDataSample(
        metainfo=dict(
            img_id=0,
            img_shape=input_hw,
            batch_input_shape=input_hw,
            ori_shape=original_hw,
            scale_factor=(
                input_hw[1] / original_hw[1],
                input_hw[0] / original_hw[0],
            ),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes or [], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels or [], dtype=torch.int64),
    )
    return sample

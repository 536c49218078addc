"""D-FINE (arXiv 2410.13842): what all sizes share of the model."""

from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.model import PretrainedInit

from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.data.batch_augments import MultiScaleResize
from mmbackbones.decoders.dfine_decoder import DFINEDecoder
from mmbackbones.detectors.dfine import DFINE
from mmbackbones.losses.dfine_criterion import DFINECriterion
from mmbackbones.necks.hybrid_encoder import HybridEncoder

# Channels and strides are typed nowhere: the encoder follows the backbone, the
# decoder follows the encoder.
model = dict(
    type=DFINE,
    data_preprocessor=dict(
        type=DetDataPreprocessor,
        # RGB in [0, 1], no ImageNet statistics.
        mean=(0, 0, 0),
        std=(255, 255, 255),
        bgr_to_rgb=True,
        batch_augments=[dict(type=MultiScaleResize, base_size_repeat=4)],
    ),
    backbone=dict(
        type=HGNetV2,
        arch='b4',
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type=PretrainedInit, checkpoint='weights/PPHGNetV2_B4_stage1.pth'
        ),
    ),
    neck=dict(type=HybridEncoder),
    decoder=dict(
        type=DFINEDecoder,
        num_classes=80,
        num_queries=300,
        num_denoising=100,
        reg_max=32,
        reg_scale=4.0,
    ),
    criterion=dict(type=DFINECriterion, reg_max=32, reg_scale=4.0),
    test_cfg=dict(max_per_img=300),
)

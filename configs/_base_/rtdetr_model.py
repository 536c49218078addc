"""RT-DETR (arXiv 2304.08069): what all sizes of v1 and v2 share of the model."""

from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.model import PretrainedInit

from mmbackbones.backbones.resnet_vd import ResNetVD
from mmbackbones.data.batch_augments import MultiScaleResize
from mmbackbones.decoders.rtdetr_decoder import RTDETRDecoder
from mmbackbones.detectors.rtdetr import RTDETR
from mmbackbones.losses.rtdetr_criterion import RTDETRCriterion
from mmbackbones.necks.rtdetr_encoder import RTDETRHybridEncoder

# Channels and strides are typed nowhere: the encoder follows the backbone, the
# decoder follows the encoder.
model = dict(
    type=RTDETR,
    data_preprocessor=dict(
        type=DetDataPreprocessor,
        # RGB in [0, 1], no ImageNet statistics.
        mean=(0, 0, 0),
        std=(255, 255, 255),
        bgr_to_rgb=True,
        batch_augments=[dict(type=MultiScaleResize, base_size_repeat=3)],
    ),
    backbone=dict(
        type=ResNetVD,
        arch='r50',
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type=PretrainedInit,
            checkpoint='weights/ResNet50_vd_ssld_v2_pretrained_from_paddle.pth',
        ),
    ),
    neck=dict(type=RTDETRHybridEncoder),
    decoder=dict(
        type=RTDETRDecoder,
        num_classes=80,
        num_queries=300,
        num_points=(4, 4, 4),
        num_denoising=100,
    ),
    criterion=dict(type=RTDETRCriterion),
    test_cfg=dict(max_per_img=300),
)

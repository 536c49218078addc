"""UPerNet (arXiv 1807.10221): what all backbones share of the model."""

from mmseg.models import SegDataPreProcessor
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.models.losses import CrossEntropyLoss

from mmbackbones.segmentors import UPerNet

# A leaf adds the backbone; channels, strides and classes of the heads follow. Plain
# batch norms: `sync_bn` of the runtime joins them where there are several GPUs.
model = dict(
    type=UPerNet,
    num_classes=150,
    data_preprocessor=dict(
        type=SegDataPreProcessor,
        # ImageNet's statistics, with which all three families were trained.
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    decode_head=dict(
        type=UPerHead,
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type=FCNHead,
        in_strides=16,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss, loss_weight=0.4),
    ),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)

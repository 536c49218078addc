"""DEIMv2-Pico on COCO (upstream deimv2_hgnetv2_pico_coco.yml).

Reference 38.5 AP as published; here: not measured.
4 GPUs x 32 images = 128 per step, 640 px; 500 epochs: 4 without strong augmentation,
246 with mosaic, 150 without it, 68 and another 32 after a reload of the best without
strong augmentation. No multi-scale.

    bash tools/dist_train.sh configs/deimv2_hgnetv2_pico_coco.py 4
"""

from mmengine.config import read_base

from mmbackbones.backbones.hgnetv2_lite import HGNetV2Lite
from mmbackbones.decoders.deimv2_decoder import DEIMv2LiteDecoder
from mmbackbones.losses.classification import MatchabilityTerm
from mmbackbones.losses.detr_criterion import DETRCriterion
from mmbackbones.necks.lite_encoder import LiteEncoder

with read_base():
    from .deim_nano_hgnetv2_b0_coco import *
    from ._base_.deimv2_recipe import *

model.update(
    type=deimv2_model.type,
    backbone=dict(type=HGNetV2Lite, arch='pico', out_indices=(2,)),
    decoder=dict(
        type=DEIMv2LiteDecoder,
        num_queries=200,
        hidden_dim=112,
        num_points=(4, 2),
        feedforward_channels=320,
    ),
)
model.neck = dict(type=LiteEncoder, hidden_dim=112, expansion=0.34, depth_mult=0.5)
# No loss on distributions, and every set of queries has its own matches.
model.criterion = dict(type=DETRCriterion, classification=dict(type=MatchabilityTerm))
model.data_preprocessor.batch_augments = None

# Dropped before and after the resize.
final_pipeline[2].min_size = final_pipeline[5].min_size = 8  # pixels, was 1
train_pipeline[5].min_size = train_pipeline[8].min_size = 8
dense_pipeline[3].min_size = dense_pipeline[6].min_size = 8
dense_pipeline[2].transforms[0][0].cache_size = 50
train_dataloader.dataset.pipeline = train_pipeline
default_hooks.stage_switch.update(
    of_epochs=500,
    ends=(4, 250, 400, 468),
    phases=[
        dict(pipeline=final_pipeline, augments=()),
        dict(pipeline=dense_pipeline, augments=()),
        dict(pipeline=train_pipeline, augments=()),
        dict(pipeline=final_pipeline, augments=()),
    ],
    pipeline=final_pipeline,
)
default_hooks.matcher_switch = matcher_switch
default_hooks.matcher_switch.update(of_epochs=500, start=450)

# Groups are those of D-FINE-N.
optim_wrapper.optimizer.lr = 1.6e-3  # was 8e-4; backbone 8e-4
param_scheduler[0].update(
    of_epochs=500, flat_until=250, constant_from=468, gamma=0.5, warmup=4000
)
train_cfg.max_epochs = 500  # was 160

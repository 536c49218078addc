"""DEIMv2-Femto on COCO (upstream deimv2_hgnetv2_femto_coco.yml).

Reference 31.0 AP as published; here: not measured.
4 GPUs x 32 images = 128 per step, 416 px; 500 epochs with the phases of Pico.

    bash tools/dist_train.sh configs/deimv2_hgnetv2_femto_coco.py 4
"""

from mmengine.config import read_base

with read_base():
    from .deimv2_hgnetv2_pico_coco import *

model.update(
    backbone=dict(arch='femto'),  # was pico
    neck=dict(hidden_dim=96),  # was 112
    decoder=dict(
        num_queries=150,  # was 200
        hidden_dim=96,  # was 112
        feedforward_channels=256,  # was 320
        eval_size_hw=(416, 416),
    ),
)

final_pipeline[4].scale = train_pipeline[7].scale = (416, 416)  # was 640
dense_pipeline[5].scale = test_pipeline[1].scale = (416, 416)
final_pipeline[2].min_size = final_pipeline[5].min_size = 10  # was 8
train_pipeline[5].min_size = train_pipeline[8].min_size = 10
dense_pipeline[3].min_size = dense_pipeline[6].min_size = 10
dense_pipeline[2].transforms[0][0].size = 208  # was 320
train_dataloader.dataset.pipeline = train_pipeline
val_dataloader.dataset.pipeline = test_pipeline
test_dataloader.dataset.pipeline = test_pipeline
default_hooks.stage_switch.update(
    phases=[
        dict(pipeline=final_pipeline, augments=()),
        dict(pipeline=dense_pipeline, augments=()),
        dict(pipeline=train_pipeline, augments=()),
        dict(pipeline=final_pipeline, augments=()),
    ],
    pipeline=final_pipeline,
)

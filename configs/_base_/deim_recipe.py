"""DEIM's recipe (arXiv 2412.04234), to be put on the config of another model.

A leaf reads the model's config, then this; it takes over `deim_model`, `mix_up` and
`dense_o2o`, and states the epochs of its phases. Values here are those of size L.
"""

from mmcv.transforms import RandomChoice
from mmengine.config import read_base

from mmbackbones.data.batch_mixing import MixUp
from mmbackbones.data.mosaic import CentredAffine, WholeMosaic
from mmbackbones.engine.flat_cosine import FlatCosineLR
from mmbackbones.engine.phases import PhaseHook
from mmbackbones.losses.classification import MatchabilityTerm

with read_base():
    from .coco_detection import final_pipeline, train_pipeline

# Half of the samples are mosaics, which are neither zoomed out nor cropped.
dense_pipeline = [
    *train_pipeline[:2],
    dict(
        type=RandomChoice,
        transforms=[
            [
                dict(type=WholeMosaic, size=320),
                dict(
                    type=CentredAffine,
                    max_rotate_degree=10.0,
                    max_translate_ratio=0.1,
                    scaling_ratio_range=(0.5, 1.5),
                ),
                train_pipeline[2],
            ],
            train_pipeline[2:5],
        ],
        prob=[0.5, 0.5],
    ),
    *train_pipeline[5:],
]
# On the batch, before multi-scale.
mix_up = dict(type=MixUp, prob=0.5)

deim_model = dict(criterion=dict(classification=dict(type=MatchabilityTerm)))

# Epochs as published, of runs of `of_epochs`; other lengths turn at the same shares.
param_scheduler = [
    dict(
        type=FlatCosineLR,
        by_epoch=False,
        of_epochs=58,
        flat_until=29,
        constant_from=50,
        gamma=0.5,
        warmup=2000,
    )
]
dense_o2o = dict(
    type=PhaseHook,
    of_epochs=58,
    ends=(4, 29, 50),
    phases=[
        dict(pipeline=final_pipeline, augments=('MultiScaleResize',)),
        dict(pipeline=dense_pipeline, augments=('MixUp', 'MultiScaleResize')),
        dict(pipeline=train_pipeline, augments=('MultiScaleResize',)),
    ],
    pipeline=final_pipeline,
)

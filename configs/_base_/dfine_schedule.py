"""D-FINE's recipe: AdamW with merged groups at a constant rate after warm-up."""

from mmengine.optim import AmpOptimWrapper, LinearLR
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

from mmbackbones.engine.param_groups import ParamGroupConstructor

optim_wrapper = dict(
    type=AmpOptimWrapper,
    loss_scale='dynamic',
    constructor=ParamGroupConstructor,
    optimizer=dict(
        type=AdamW, lr=2.5e-4, betas=(0.9, 0.999), weight_decay=1.25e-4, fused=True
    ),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(groups=[]),
)
# Warm-up, then constant: the published milestone (epoch 500) is never reached.
param_scheduler = [
    dict(type=LinearLR, start_factor=1 / 500, by_epoch=False, begin=0, end=500)
]
auto_scale_lr = dict(enable=False, base_batch_size=32)

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=80, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)

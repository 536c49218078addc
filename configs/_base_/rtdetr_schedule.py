"""RT-DETR's recipe in PyTorch: AdamW at a constant rate, in full precision."""

from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

from mmbackbones.engine.param_groups import ParamGroupConstructor

optim_wrapper = dict(
    type=OptimWrapper,
    constructor=ParamGroupConstructor,
    optimizer=dict(
        type=AdamW, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, fused=True
    ),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(groups=[]),
)
param_scheduler = []  # the published milestone (epoch 1000) is never reached
auto_scale_lr = dict(enable=False, base_batch_size=16)

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=72, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)

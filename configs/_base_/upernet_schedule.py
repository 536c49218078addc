"""UPerNet's recipe: AdamW, 160k iterations, linear decay after warm-up."""

from mmengine.optim import AmpOptimWrapper, LinearLR, PolyLR
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

from mmbackbones.engine.param_groups import ParamGroupConstructor

optim_wrapper = dict(
    type=AmpOptimWrapper,
    loss_scale='dynamic',
    constructor=ParamGroupConstructor,
    optimizer=dict(
        type=AdamW, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    ),
    # Norms, biases, GRN, LAB and position tables are not decayed.
    paramwise_cfg=dict(
        groups=[dict(name='backbone', match=r'^backbone\.')],
        layer_decay=0.9,
        decay_vectors=False,
    ),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    # Its end is max_iters.
    dict(type=PolyLR, power=1.0, eta_min=0.0, by_epoch=False, begin=1500),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)

train_cfg = dict(type=IterBasedTrainLoop, max_iters=160_000, val_interval=16_000)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)

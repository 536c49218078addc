"""DEIMv2's recipe (arXiv 2509.20787), to be put on a config with DEIM's.

A leaf takes over `deimv2_model`, `copy_blend` and `matcher_switch`, and states which
phases blend. Values here are those of size L.
"""

from mmbackbones.data.batch_mixing import CopyBlend
from mmbackbones.decoders.deimv2_decoder import DEIMv2Decoder
from mmbackbones.detectors.rtdetr import RTDETR
from mmbackbones.engine.phases import MatcherSwitchHook
from mmbackbones.losses.matching import ScoreIoUMatcher
from mmbackbones.necks.deimv2_encoder import DEIMv2HybridEncoder

deimv2_model = dict(
    type=RTDETR,
    neck=dict(type=DEIMv2HybridEncoder),
    decoder=dict(type=DEIMv2Decoder, feedforward_channels=2048),
)
# On the batch, after mix-up, where that did not mix.
copy_blend = dict(
    type=CopyBlend, prob=0.5, num_objects=3, min_area=100, expand=(0.1, 0.25)
)
matcher_switch = dict(
    type=MatcherSwitchHook,
    of_epochs=58,
    start=45,
    matcher=dict(type=ScoreIoUMatcher, iou_power=4.0),
)

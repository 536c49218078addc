"""A backbone with the head it was published with: images in, class logits out.

Upstream: https://github.com/PaddlePaddle/PaddleClas
ppcls/arch/backbone/legendary_models/pp_hgnet_v2.py (Apache-2.0),
https://github.com/facebookresearch/hiera hiera/hiera.py (Apache-2.0),
https://github.com/facebookresearch/ConvNeXt-V2 models/convnextv2.py (MIT).
Departs from the source:
- logits in evaluation too, where Hiera gives probabilities;
- no dropout: no published weights were trained with any in the head.

Legend: N images, C channels of the last map, K classes.
"""

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmbackbones.backbones.hgnetv2 import HGNetV2
from mmbackbones.backbones.resnet_vd import ResNetVD
from mmbackbones.layers.conv import LearnableAffine
from mmbackbones.registry import MODELS

__all__ = ['ExpandingHead', 'ImageClassifier', 'NormHead']


class ExpandingHead(nn.Module):
    """HGNetV2's head: pool, 1x1 convolution, ReLU, affine, linear; or but the ends.

    Args:
        in_channels: C.
        num_classes: K.
        expand_channels: width between; None for a linear layer on the pooled map,
            as Hugging Face's classifier and ResNet-vd have it.
        use_lab: whether the affine is there, as in the backbone.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        expand_channels: int | None = 2048,
        use_lab: bool = False,
    ) -> None:
        super().__init__()
        self.last_conv = self.lab = None
        if expand_channels is not None:
            self.last_conv = nn.Conv2d(in_channels, expand_channels, 1, bias=False)
            self.lab = LearnableAffine() if use_lab else None
        self.fc = nn.Linear(expand_channels or in_channels, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to logits `(N, K)`."""
        x = F.adaptive_avg_pool2d(x, 1)
        if self.last_conv is not None:
            x = self.last_conv(x).relu()
        if self.lab is not None:
            x = self.lab(x)
        return self.fc(x.flatten(1))


class NormHead(nn.Module):
    """Head of Hiera, also for video, and ConvNeXt V2: pool, layer norm, linear.

    Args:
        in_channels: C.
        num_classes: K.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        self.fc = nn.Linear(in_channels, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` or `(N, C, T, H, W)` to logits `(N, K)`."""
        return self.fc(self.norm(x.flatten(2).mean(2)))


@MODELS.register_module()
class ImageClassifier(BaseModule):
    """Backbone and head; `convert.classifier_to_ours` reads published weights for it.

    Args:
        backbone: config of a backbone; its last stage is classified, whatever
            `out_indices` says.
        num_classes: K.
        expand_channels: of HGNetV2's head, see `ExpandingHead`. Without effect in
            other families.
        init_cfg: mmengine's.

    Raises:
        ValueError: `num_classes` is not positive.
    """

    def __init__(
        self,
        backbone: dict,
        num_classes: int = 1000,
        expand_channels: int | None = 2048,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f'num_classes is {num_classes!r}; give a number of at least 1'
            )
        self.backbone = MODELS.build({**backbone, 'out_indices': -1})
        (channels,) = self.backbone.out_channels
        if isinstance(self.backbone, HGNetV2):
            use_lab = any(isinstance(m, LearnableAffine) for m in self.modules())
            self.head = ExpandingHead(channels, num_classes, expand_channels, use_lab)
        elif isinstance(self.backbone, ResNetVD):
            self.head = ExpandingHead(channels, num_classes, expand_channels=None)
        else:
            self.head = NormHead(channels, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images `(N, 3, H, W)`, or what the backbone takes, to logits `(N, K)`."""
        return self.head(self.backbone(inputs)[-1])

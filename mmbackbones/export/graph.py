"""Models as the graphs that are exported: one tensor of images in, named tensors out.

Every graph takes `images` `(N, 3, H, W)`, RGB in [0, 1], and normalises them itself.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    'BackboneGraph',
    'DetectorGraph',
    'Normalise',
    'SegmentorGraph',
    'build_graph',
]


class Normalise(nn.Module):
    """`(255 x - mean) / std`, as one product and one sum, or as nothing at all.

    Args:
        mean: of the channels in the order in which the model takes them, on the
            scale of 0 to 255.
        std: likewise.
        flip: whether the model takes BGR.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, flip: bool = False
    ) -> None:
        super().__init__()
        self.mean, self.std, self.flip = tuple(mean), tuple(std), flip
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        scale = (255 / std).view(1, -1, 1, 1) if (std != 255).any() else None
        shift = (-mean / std).view(1, -1, 1, 1) if (mean != 0).any() else None
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    @classmethod
    def of(cls, preprocessor: nn.Module | None) -> 'Normalise':
        """From a data preprocessor of mmdet or mmseg; without one, nothing.

        Raises:
            ValueError: it does not state `mean` and `std` of three channels.
        """
        if preprocessor is None:
            return cls((0, 0, 0), (255, 255, 255))
        if not hasattr(preprocessor, 'mean'):  # one that does not normalise
            mean, std = (0.0,) * 3, (1.0,) * 3
        else:
            mean, std = (
                getattr(preprocessor, name).flatten().tolist()
                for name in ('mean', 'std')
            )
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f'data_preprocessor has mean {mean} and std {std}; exported graphs '
                'take three channels'
            )
        # Images come off the disk as BGR; without a conversion the model sees BGR.
        # mmdet and mmseg spell the attribute differently.
        converts = any(
            getattr(preprocessor, name, False)
            for name in ('channel_conversion', '_channel_conversion')
        )
        return cls(mean, std, flip=not converts)

    @property
    def mean_rgb(self) -> tuple[float, ...]:
        """`mean` by R, G, B."""
        return self.mean[::-1] if self.flip else self.mean

    @property
    def std_rgb(self) -> tuple[float, ...]:
        """`std` by R, G, B."""
        return self.std[::-1] if self.flip else self.std

    def forward(self, images: Tensor) -> Tensor:
        """`(N, 3, H, W)` to the same shape."""
        if self.flip:
            images = images.flip(1)
        if self.scale is not None:
            images = images * self.scale
        return images if self.shift is None else images + self.shift


class DetectorGraph(nn.Module):
    """A detector with the selection of its detections.

    Args:
        model: `RTDETR` or a relative.
    """

    task = 'detection'
    output_names = ('boxes', 'scores', 'labels')

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalise = Normalise.of(model.data_preprocessor)
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Returns:
            Boxes `(N, K, 4)` xyxy in pixels of the input, scores `(N, K)` and labels
            `(N, K)` int64, by falling score.
        """
        output = self.model.decoder(self.model.extract_feat(self.normalise(images)))
        scores, labels, boxes = self.model.select(output, *images.shape[-2:])
        return boxes, scores, labels


class SegmentorGraph(nn.Module):
    """A segmentor of mmseg; the whole input at once, whatever its `test_cfg` says.

    Args:
        model: `EncoderDecoder` or a relative.
    """

    task = 'segmentation'
    output_names = ('labels',)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalise = Normalise.of(model.data_preprocessor)
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Label every pixel: `(N, H, W)` int64."""
        head = self.model.decode_head
        logits = head(self.model.extract_feat(self.normalise(images)))
        logits = F.interpolate(
            logits, images.shape[-2:], mode='bilinear', align_corners=head.align_corners
        )
        if logits.shape[1] == 1:
            return ((logits[:, 0].sigmoid() > head.threshold).long(),)
        return (logits.argmax(1),)


class BackboneGraph(nn.Module):
    """The maps of a backbone as `feat0`, `feat1`, ...

    Args:
        backbone: with `out_channels`.
        preprocessor: of the model that it belongs to, or None.
    """

    task = 'backbone'

    def __init__(
        self, backbone: nn.Module, preprocessor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.normalise = Normalise.of(preprocessor)
        self.model = backbone
        self.output_names = tuple(f'feat{i}' for i in range(len(backbone.out_channels)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps `(N, C_i, h_i, w_i)`, fine to coarse."""
        return tuple(x.contiguous() for x in self.model(self.normalise(images)))


def build_graph(model: nn.Module) -> nn.Module:
    """The graph of a detector, a segmentor or a bare backbone.

    Raises:
        ValueError: the model is none of these.
    """
    if hasattr(model, 'decoder') and hasattr(model, 'select'):
        return DetectorGraph(model).eval()
    if hasattr(model, 'decode_head'):
        return SegmentorGraph(model).eval()
    if hasattr(model, 'out_channels') and hasattr(model, 'out_strides'):
        return BackboneGraph(model).eval()
    raise ValueError(
        f'{type(model).__name__} cannot be exported; detectors, segmentors with a '
        'decode_head and backbones can'
    )

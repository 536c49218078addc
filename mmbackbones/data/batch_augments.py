"""What is done to a whole batch, on the device.

D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
Refinement, arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/data/dataloader.py (Apache-2.0).
Departs from the source:
- all ranks use the same size in a step (upstream: every worker draws its own), and
  the size follows from the iteration, so that a resumed run repeats none;
- rectangular batches keep their ratio.
"""

import numpy as np
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.nn import functional as F

from mmbackbones.registry import MODELS

__all__ = ['MultiScaleResize', 'multi_scale_sizes']

_DIVISOR = 32


def multi_scale_sizes(
    base_size_hw: tuple[int, int], base_size_repeat: int
) -> list[tuple[int, int]]:
    """Sizes (H, W) to draw from: the base several times, and around it by 32 px.

    The longer side L runs over the multiples of 32 from 0.75 L to 1.25 L. For
    640 x 640: 480, 512, ..., 608, `base_size_repeat` times 640, 672, ..., 800. The
    other side follows in proportion, rounded to a multiple of 32.

    Raises:
        ValueError: a side is not a positive multiple of 32.
    """
    if any(side <= 0 or side % _DIVISOR for side in base_size_hw):
        raise ValueError(
            f'multi-scale needs sides that are multiples of {_DIVISOR}, not '
            f'{base_size_hw[0]} x {base_size_hw[1]} (h x w); change the size that '
            'the pipeline resizes or pads to'
        )
    steps = max(base_size_hw) // _DIVISOR
    first = max(int(0.75 * steps), 1)
    factors = [n / steps for n in range(first, int(1.25 * steps) + 1)]
    sizes = []
    for factor in factors:
        height, width = (
            max(round(side * factor / _DIVISOR), 1) * _DIVISOR for side in base_size_hw
        )
        sizes += [(height, width)] * (base_size_repeat if factor == 1 else 1)
    return sizes


@MODELS.register_module()
class MultiScaleResize(nn.Module):
    """Resizes each training batch to a size drawn for its iteration.

    For `DetDataPreprocessor.batch_augments`. The size is a pure function of `seed`
    and of the iteration, which the runner publishes in mmengine's `MessageHub`
    before each step (without a runner: 0). Set `enabled` to False to stop it;
    `StageSwitchHook` does.

    Args:
        base_size: side or (H, W) in pixels, multiples of 32, that `sizes` lie
            around; None takes the batch's own.
        base_size_repeat: how often the base stands among the sizes, which are drawn
            evenly (published: X 3, L 4, M 6, S 20); None switches all of this off.
        interpolation: of `torch.nn.functional.interpolate`; nearest as published.
        seed: of the draws.

    Raises:
        ValueError: `base_size_repeat` is negative; a base that is not a multiple of
            32; ground truth with masks, which are not resized.
    """

    def __init__(
        self,
        base_size: int | tuple[int, int] | None = None,
        base_size_repeat: int | None = 4,
        interpolation: str = 'nearest',
        seed: int = 0,
    ) -> None:
        super().__init__()
        if base_size_repeat is not None and base_size_repeat < 0:
            raise ValueError(
                f'base_size_repeat is {base_size_repeat}; give 0 or more, or None for '
                'no multi-scale'
            )
        if isinstance(base_size, int):
            base_size = (base_size, base_size)
        self.base_size = base_size if base_size is None else tuple(base_size)
        self.base_size_repeat = base_size_repeat
        self.interpolation = interpolation
        self.seed = seed
        self.enabled = base_size_repeat is not None
        if self.enabled and self.base_size is not None:
            multi_scale_sizes(self.base_size, base_size_repeat)  # refuse it early

    def size_at(
        self, iteration: int, batch_size_hw: tuple[int, int]
    ) -> tuple[int, int]:
        """The size (H, W) of an iteration, for batches that come as `batch_size_hw`."""
        sizes = multi_scale_sizes(
            self.base_size or batch_size_hw, self.base_size_repeat
        )
        draw = np.random.default_rng((self.seed, iteration)).integers(len(sizes))
        return sizes[draw]

    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample]
    ) -> tuple[Tensor, list[DetDataSample]]:
        """Resize images, and boxes in place.

        Args:
            inputs: `(N, C, H, W)`.
            data_samples: with `gt_instances.bboxes` as `(n, 4)` tensors in pixels
                of `inputs`, n may be 0.

        Returns:
            Resized inputs `(N, C, H', W')`, and the same samples with boxes,
            `img_shape`, `pad_shape`, `batch_input_shape` and `scale_factor` fitted.
        """
        height, width = inputs.shape[-2:]
        if not self.enabled:
            return inputs, data_samples
        iteration = MessageHub.get_current_instance().get_info('iter', 0)
        new_hw = self.size_at(iteration, (height, width))
        if new_hw == (height, width):
            return inputs, data_samples
        inputs = F.interpolate(inputs, size=new_hw, mode=self.interpolation)
        scale_hw = (new_hw[0] / height, new_hw[1] / width)
        for sample in data_samples:
            self._rescale(sample, scale_hw)
            sample.set_metainfo(dict(batch_input_shape=new_hw))
        return inputs, data_samples

    @staticmethod
    def _rescale(sample: DetDataSample, scale_hw: tuple[float, float]) -> None:
        scale_y, scale_x = scale_hw
        for key in ('img_shape', 'pad_shape'):
            if key in sample:
                shape = sample.get(key)
                scaled = (round(shape[0] * scale_y), round(shape[1] * scale_x))
                sample.set_metainfo({key: scaled})
        if 'scale_factor' in sample:
            factor_w, factor_h = sample.scale_factor
            sample.set_metainfo(
                dict(scale_factor=(factor_w * scale_x, factor_h * scale_y))
            )
        for key in ('gt_instances', 'ignored_instances'):
            if key not in sample:
                continue
            instances = sample.get(key)
            if 'masks' in instances:
                raise ValueError('MultiScaleResize does not resize masks')
            if 'bboxes' in instances:
                # Two kernels; a tensor of factors would be a blocking copy.
                instances.bboxes[:, 0::2] *= scale_x
                instances.bboxes[:, 1::2] *= scale_y

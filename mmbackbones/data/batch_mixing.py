"""Images of a batch mixed with each other, on the device (dense one-to-one).

DEIM: DETR with Improved Matching for Fast Convergence, arXiv 2412.04234 (mix-up);
DEIMv2: Real-Time Object Detection Meets DINOv3, arXiv 2509.20787 (copy-blend).
Upstream: https://github.com/Intellindust-AI-Lab/DEIMv2 engine/data/dataloader.py
(Apache-2.0).
Departs from the source:
- draws follow from the iteration and the rank, so that a resumed run repeats none;
- an image alone in its batch stays as it is (upstream doubles its boxes);
- the area of an object is that of its box in the batch (upstream: of the segment in
  the file).
"""

import random

import torch
from mmdet.structures import DetDataSample
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmbackbones.registry import MODELS

__all__ = ['CopyBlend', 'MixUp']


def _generator(name: str, seed: int) -> random.Random:
    """Draws of one augment in the current iteration on this rank."""
    iteration = MessageHub.get_current_instance().get_info('iter', 0)
    return random.Random(f'{name} {seed} {get_rank()} {iteration}')


def _check_prob(prob: float) -> None:
    if not 0 <= prob <= 1:
        raise ValueError(f'prob is {prob}; give a probability')


def _ground_truth(sample: DetDataSample) -> InstanceData:
    if 'masks' in sample.gt_instances:
        raise ValueError('MixUp and CopyBlend do not mix masks')
    return sample.gt_instances


@MODELS.register_module()
class MixUp(nn.Module):
    """Shows each image and its neighbour in the batch at once, with both's boxes.

    With x_i the images, x_i becomes beta x_i + (1 - beta) x_{i-1}, one beta for the
    batch. For `DetDataPreprocessor.batch_augments`, before what resizes. Boxes are
    not weighted. The samples get `mixup` (beta) into their metainfo.

    Args:
        prob: of mixing a batch.
        ratio_range: that beta is drawn from.
        seed: of the draws, see `MultiScaleResize`.

    Raises:
        ValueError: `prob` is none; ground truth with masks.

    Attributes:
        enabled: False stops it; `PhaseHook` sets it.
    """

    def __init__(
        self,
        prob: float = 0.5,
        ratio_range: tuple[float, float] = (0.45, 0.55),
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_prob(prob)
        self.prob = prob
        self.ratio_range = ratio_range
        self.seed = seed
        self.enabled = True

    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample]
    ) -> tuple[Tensor, list[DetDataSample]]:
        """Mix.

        Args:
            inputs: `(N, C, H, W)`.
            data_samples: with `gt_instances`; n boxes in one may be 0.

        Returns:
            The same or new inputs; the same samples.
        """
        draw = _generator('MixUp', self.seed)
        if not self.enabled or len(inputs) < 2 or draw.random() >= self.prob:
            return inputs, data_samples
        beta = draw.uniform(*self.ratio_range)
        inputs = torch.lerp(inputs.roll(1, 0), inputs, beta)
        alone = [_ground_truth(sample) for sample in data_samples]
        for i, sample in enumerate(data_samples):
            sample.gt_instances = InstanceData.cat([alone[i], alone[i - 1]])
            sample.set_metainfo(dict(mixup=beta))
        return inputs, data_samples


@MODELS.register_module()
class CopyBlend(nn.Module):
    """Blends objects of the whole batch into each of its images, with their boxes.

    Each image receives `num_objects` of those that are large enough, without
    repetition, at any place; with beta drawn once for the batch, a patch becomes
    beta * image + (1 - beta) * object. The object keeps some of its surroundings; its
    box does not include them. A batch that `MixUp` mixed is left alone, so it comes
    after that in `DetDataPreprocessor.batch_augments`.

    Reads all boxes from the device, once.

    Args:
        prob: of doing so in a batch.
        num_objects: for each image; fewer where the batch has fewer.
        min_area: of an object's box, in pixels of the batch.
        expand: range of the surroundings on each side over the object's side.
        ratio_range: that beta is drawn from.
        seed: of the draws, see `MultiScaleResize`.

    Raises:
        ValueError: `prob` is none; ground truth with masks.

    Attributes:
        enabled: False stops it; `PhaseHook` sets it.
    """

    def __init__(
        self,
        prob: float = 0.5,
        num_objects: int = 3,
        min_area: float = 100.0,
        expand: tuple[float, float] = (0.1, 0.25),
        ratio_range: tuple[float, float] = (0.45, 0.55),
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_prob(prob)
        self.prob = prob
        self.num_objects = num_objects
        self.min_area = min_area
        self.expand = expand
        self.ratio_range = ratio_range
        self.seed = seed
        self.enabled = True

    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample]
    ) -> tuple[Tensor, list[DetDataSample]]:
        """Blend; arguments and result as of `MixUp`."""
        draw = _generator('CopyBlend', self.seed)
        if not self.enabled or 'mixup' in data_samples[0].metainfo:
            return inputs, data_samples
        if draw.random() >= self.prob:
            return inputs, data_samples
        pool = self._objects(data_samples, *inputs.shape[-2:])
        if not pool:
            return inputs, data_samples
        beta = draw.uniform(*self.ratio_range)
        blended = inputs.clone()
        truths = [_ground_truth(sample) for sample in data_samples]
        for i, sample in enumerate(data_samples):
            chosen = draw.sample(pool, min(self.num_objects, len(pool)))
            places = []
            for image, _, box in chosen:
                source, target, place = self._place(box, inputs.shape[-2:], draw)
                patch = inputs[(image, slice(None), *source)]
                window = blended[(i, slice(None), *target)]
                window.copy_(torch.lerp(patch, window, beta))
                places.append(place)
            added = InstanceData.cat(
                [truths[image][index : index + 1] for image, index, _ in chosen]
            )
            added.bboxes = added.bboxes.new_tensor(places)
            sample.gt_instances = InstanceData.cat([truths[i], added])
        return blended, data_samples

    def _objects(
        self, data_samples: list[DetDataSample], height: int, width: int
    ) -> list[tuple[int, int, tuple[int, int, int, int]]]:
        """Image, number and whole-pixel box xyxy of each object in the batch."""
        boxes = [_ground_truth(sample).bboxes for sample in data_samples]
        images = [i for i, of_image in enumerate(boxes) for _ in of_image]
        numbers = [j for of_image in boxes for j in range(len(of_image))]
        found = []
        for i, j, (x1, y1, x2, y2) in zip(
            images, numbers, torch.cat(boxes).tolist(), strict=True
        ):
            if (x2 - x1) * (y2 - y1) < self.min_area:
                continue
            box = (
                max(int(x1), 0),
                max(int(y1), 0),
                min(int(x2), width),
                min(int(y2), height),
            )
            if box[0] < box[2] and box[1] < box[3]:
                found.append((i, j, box))
        return found

    def _place(
        self,
        box: tuple[int, int, int, int],
        size_hw: tuple[int, int],
        draw: random.Random,
    ) -> tuple[tuple[slice, slice], tuple[slice, slice], tuple[int, int, int, int]]:
        """Where an object is taken from and put, rows and columns; and its new box."""
        share = draw.uniform(*self.expand)
        spans = []
        for low, high, limit in zip(box[:2], box[2:], size_hw[::-1], strict=True):
            new_low = draw.randint(0, limit - (high - low))
            more = int((high - low) * share)
            # As far as both images reach.
            before = min(more, low, new_low)
            after = min(more, limit - high, limit - (new_low + high - low))
            spans.append((low, new_low, high - low, before, after))
        source = tuple(
            slice(low - before, low + length + after)
            for low, _, length, before, after in reversed(spans)
        )
        target = tuple(
            slice(new - before, new + length + after)
            for _, new, length, before, after in reversed(spans)
        )
        (_, x, width, *_), (_, y, height, *_) = spans
        return source, target, (x, y, x + width, y + height)

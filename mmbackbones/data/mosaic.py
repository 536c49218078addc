"""Four images in one, at the level of samples (dense one-to-one).

DEIM: DETR with Improved Matching for Fast Convergence, arXiv 2412.04234.
Upstream: https://github.com/Intellindust-AI-Lab/DEIM engine/data/transforms/mosaic.py
(Apache-2.0).
Departs from the source:
- the affine transform interpolates (upstream takes the nearest pixel);
- which recent samples are drawn from follows from the place of a sample in the run
  (upstream: from what the process has seen): they are the last ones, mosaics or not,
  of every eighth batch (upstream: mosaics alone, given up at random), and at the
  start of an epoch any of the data set stand for those that lack.

mmdet's `Mosaic` cuts its images at a drawn centre, upstream keeps them whole; mmdet's
`RandomAffine` turns and scales about a corner, upstream about the centre. The latter
is used for all but that.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from math import ceil

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import RandomAffine, Resize
from mmdet.structures.bbox import HorizontalBoxes, autocast_box_type
from mmengine.dataset import BaseDataset
from torch.utils.data import get_worker_info

from mmbackbones.data.read_faults import is_unreadable
from mmbackbones.registry import TRANSFORMS

__all__ = ['CentredAffine', 'WholeMosaic', 'give_data_set']

_UNLIMITED = 1_000_000
# A loader deals out batches in turn: with 1, 2, 4 or 8 workers those that are a
# multiple of 8 apart are read by the same one, which then has their images.
_STRIDE = 8
_ATTEMPTS = 10
_KEPT = ('img', 'gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags')


@TRANSFORMS.register_module()
class WholeMosaic(BaseTransform):
    """Puts a sample and three others on one canvas, two by two.

    Each image is resized to the same shorter side and put at the upper left of its
    quarter; quarters are as wide and high as the largest image, the rest is black.
    The others are drawn from the data set with replacement, and pass through the
    transforms that stand before this one; the data set makes itself known by
    `give_data_set`.

    Args:
        size: shorter side of each image, in pixels.
        cache_size: draw among the sample and so many less one that came before it,
            which mostly spares reading them; 0 draws from the data set. Which ones
            follows from the sample's place, see `DrawnIndex`: what images a process
            holds (of `size`, about `8 * cache_size` in all workers together) decides
            about time alone.

    Raises:
        ValueError: used without a data set; samples with masks or a window;
            `cache_size` after transforms that are random.
    """

    def __init__(self, size: int = 320, cache_size: int = 0) -> None:
        if size <= 0 or cache_size < 0:
            raise ValueError(
                f'size is {size} and cache_size {cache_size}; give a positive number '
                'of pixels and 0 samples or more'
            )
        self.cache_size = cache_size
        self._resize = Resize(
            scale=(_UNLIMITED, size),
            keep_ratio=True,
            backend='pillow',
            interpolation='bilinear',
        )
        self._cache: OrderedDict[int, dict] = OrderedDict()  # the oldest use first
        self._data_set: BaseDataset | None = None
        self._before: tuple[Callable, ...] = ()

    def draw_from(self, data_set: BaseDataset, before: Sequence[Callable]) -> None:
        """Set where the other images come from.

        Args:
            data_set: of the sample.
            before: transforms that the sample has gone through.
        """
        self._data_set, self._before = data_set, tuple(before)

    def __getstate__(self) -> dict:
        """For a copy, which may be of a subset: other images under these indices."""
        return {**vars(self), '_cache': OrderedDict()}

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Replace `img` and `gt_*` by those of the mosaic."""
        if 'gt_masks' in results:
            raise ValueError('WholeMosaic does not move masks')
        if 'window' in results:
            raise ValueError(
                'WholeMosaic takes whole images; put it before what moves a window'
            )
        first = self._resize(results)
        tiles = [first, *self._others(first)]
        height = max(tile['img'].shape[0] for tile in tiles)
        width = max(tile['img'].shape[1] for tile in tiles)
        canvas = np.zeros((2 * height, 2 * width, 3), first['img'].dtype)
        boxes = []
        for i, tile in enumerate(tiles):
            top, left = i // 2 * height, i % 2 * width
            rows, columns = tile['img'].shape[:2]
            canvas[top : top + rows, left : left + columns] = tile['img']
            moved = tile['gt_bboxes'].clone()
            moved.translate_([left, top])
            boxes.append(moved)
        joined = {
            key: np.concatenate([tile[key] for tile in tiles])
            for key in ('gt_bboxes_labels', 'gt_ignore_flags')
        }
        results.update(
            img=canvas,
            img_shape=canvas.shape[:2],
            gt_bboxes=HorizontalBoxes.cat(boxes),
            **joined,
        )
        return results

    def _others(self, first: dict) -> list[dict]:
        if self._data_set is None:
            raise ValueError(
                'WholeMosaic knows no data set to draw from; use it in the pipeline '
                'of a CocoDetection, or call draw_from'
            )
        if not self.cache_size:
            return [self._partner(self._any()) for _ in range(3)]
        index = first.get('sample_idx')
        own = {key: first[key] for key in _KEPT}
        if index is not None:
            self._keep(int(index), own)
        recent = self._recent(index)
        others = []
        for _ in range(3):
            age = random.randrange(self.cache_size)
            if age == 0:
                others.append(own)
            else:
                lacks = age > len(recent)
                others.append(self._partner(self._any() if lacks else recent[-age]))
        return others

    def _any(self) -> int:
        return random.randrange(len(self._data_set))

    @staticmethod
    def _recent(index: int | None) -> list[int]:
        """Samples that this process has probably read, the last one last."""
        before = getattr(index, 'before', ())
        first = (len(before) - 1) % _STRIDE
        return [other for batch in before[first::_STRIDE] for other in batch]

    def _partner(self, index: int) -> dict:
        """A resized image with its boxes; any other where that cannot be read."""
        for _ in range(_ATTEMPTS):
            try:
                return self._remembered(index) if self.cache_size else self._read(index)
            except Exception as error:
                # Not to be laid to the sample, which is what a data set would do.
                if not is_unreadable(error):
                    raise
                last = error
            index = self._any()
        raise last

    def _remembered(self, index: int) -> dict:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        state = _generator_states()
        results = self._read(index)
        if _generator_states() != state:
            raise ValueError(
                f'WholeMosaic has cache_size = {self.cache_size}, but a transform '
                'before it is random, so that what it reads again would differ; put '
                'that after it, or set cache_size=0'
            )
        tile = {key: results[key] for key in _KEPT}
        self._keep(index, tile)
        return tile

    def _keep(self, index: int, tile: dict) -> None:
        worker = get_worker_info()
        num_rows = ceil(_STRIDE / (worker.num_workers if worker else 1))
        self._cache[index] = tile
        self._cache.move_to_end(index)
        while len(self._cache) > self.cache_size * num_rows:
            self._cache.popitem(last=False)

    def _read(self, index: int) -> dict:
        results = self._data_set.get_data_info(index)
        for step in self._before:
            results = step(results)
        return self._resize(results)


def _generator_states() -> tuple:
    """Of all generators that transforms draw from, to be compared."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    torch_state = torch.default_generator.get_state().numpy().tobytes()
    return random.getstate(), keys.tobytes(), rest, torch_state


@TRANSFORMS.register_module()
class CentredAffine(RandomAffine):
    """mmdet's `RandomAffine` about the centre of the image.

    Args:
        max_rotate_degree: as there, likewise the others.
        max_translate_ratio: of width and height.
        scaling_ratio_range: of both sides together.
        max_shear_degree: none, as published.
        border_val: black, as published.
    """

    def __init__(
        self,
        max_rotate_degree: float = 10.0,
        max_translate_ratio: float = 0.1,
        scaling_ratio_range: tuple[float, float] = (0.5, 1.5),
        max_shear_degree: float = 0.0,
        border_val: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__(
            max_rotate_degree=max_rotate_degree,
            max_translate_ratio=max_translate_ratio,
            scaling_ratio_range=scaling_ratio_range,
            max_shear_degree=max_shear_degree,
            border_val=border_val,
        )

    def _get_random_homography_matrix(self, height: int, width: int) -> np.ndarray:
        matrix = super()._get_random_homography_matrix(height, width)
        to_centre = self._get_translation_matrix(width / 2, height / 2)
        from_centre = self._get_translation_matrix(-width / 2, -height / 2)
        return to_centre @ matrix @ from_centre


def give_data_set(steps: Iterable[Callable], data_set: BaseDataset) -> None:
    """Tell each `WholeMosaic` of a pipeline, nested or not, whom to draw from."""
    _give_data_set(steps, data_set, [])


def _give_data_set(
    steps: Iterable[Callable], data_set: BaseDataset, before: list[Callable]
) -> None:
    for step in steps:
        if isinstance(step, WholeMosaic):
            step.draw_from(data_set, before)
        nested = getattr(step, 'transforms', None)  # RandomChoice has pipelines
        for branch in nested if isinstance(nested, list | tuple) else ():
            inner = getattr(branch, 'transforms', [branch])
            _give_data_set(inner, data_set, list(before))
        before.append(step)

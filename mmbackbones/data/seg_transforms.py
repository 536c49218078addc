"""Loading images and label maps for semantic segmentation, checked.

Upstream: https://github.com/open-mmlab/mmsegmentation
mmseg/datasets/transforms/loading.py (Apache-2.0).
Departs from the source:
- ids become labels by the data set's table; an id without an entry is an error;
- maps of up to 16 bits;
- image and map have to be of one size.
"""

import io
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.dataset import Compose
from mmengine.fileio import get
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image, ImageOps

from mmbackbones.data.coco_json import name_some
from mmbackbones.data.det_transforms import LoadImage
from mmbackbones.data.seg_classes import UNKNOWN
from mmbackbones.registry import TRANSFORMS

__all__ = ['LoadLabelMap', 'LoadSegImage', 'with_checked_loading']


def _open(path: str, backend_args: dict | None) -> Image.Image:
    """A label map; its pixels are not decoded yet."""
    try:
        return Image.open(io.BytesIO(get(path, backend_args=backend_args)))
    except (OSError, SyntaxError) as error:
        raise ValueError(f'label map {path!r} cannot be read: {error}') from error


@TRANSFORMS.register_module()
class LoadSegImage(LoadImage):
    """Reads an image as `LoadImage` does; the label map says which way is up.

    Maps are drawn on the stored pixels or on the upright image (EXIF orientation).
    Where the map fits both, the stored pixels are kept. Without a map (`seg_map_path`
    is not in the results) the image is turned upright.

    Args:
        backend_args: mmengine's, for files that are not local.

    Raises:
        ValueError: image or map are missing or broken, or differ in size.
    """

    def transform(self, results: dict) -> dict:
        """Add `img` `(H, W, 3)` uint8 BGR, `img_shape` and `ori_shape` (H, W)."""
        path = results.get('seg_map_path')
        if path is not None:
            with _open(path, self.backend_args) as label_map:
                results['width'], results['height'] = label_map.size
        return super().transform(results)

    @staticmethod
    def _orient(image: Image.Image, results: dict) -> Image.Image:
        if results.get('seg_map_path') is None:
            return ImageOps.exif_transpose(image)
        size = (results['width'], results['height'])
        if image.size == size:
            return image
        upright = ImageOps.exif_transpose(image)
        if upright.size != size:
            raise ValueError(
                f'label map {results["seg_map_path"]!r} is {size[0]} x {size[1]} '
                f'pixels, but its image {results["img_path"]!r} is '
                f'{image.width} x {image.height}'
            )
        return upright


@TRANSFORMS.register_module()
class LoadLabelMap(BaseTransform):
    """Reads a picture of ids and turns them into labels.

    Takes `seg_map_path` and `id_to_label` (of `LabelTable.lookup`), both from
    `SegmentationFolders`. Transforms before it in the pipeline do not touch the map,
    those behind it do: in evaluation it stands behind `Resize`, so that predictions
    are compared at the size of the original.

    Args:
        backend_args: mmengine's, for files that are not local.

    Raises:
        ValueError: the file is broken, in colours, of fractions, or has ids that
            are no class.
    """

    def __init__(self, *, backend_args: dict | None = None) -> None:
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        """Add `gt_seg_map` `(H, W)` uint8, 255 where it is ignored."""
        path, table = results['seg_map_path'], results['id_to_label']
        with _open(path, self.backend_args) as image:
            try:
                ids = np.asarray(image)
            except OSError as error:
                raise ValueError(f'label map {path!r} is broken: {error}') from error
        if ids.ndim != 2:
            raise ValueError(
                f'label map {path!r} is a colour picture ({image.mode}); it has to '
                'have one channel, whose values are the ids of classes'
            )
        if ids.dtype.kind == 'f':
            raise ValueError(
                f'label map {path!r} has fractions ({image.mode}); its values have to '
                'be the ids of classes'
            )
        ids = ids.astype(np.int64)
        labels = np.full(ids.shape, UNKNOWN, table.dtype)
        known = (ids >= 0) & (ids < len(table))
        labels[known] = table[ids[known]]
        if (labels == UNKNOWN).any():
            _refuse(path, ids[labels == UNKNOWN], table)
        results['gt_seg_map'] = labels.astype(np.uint8)
        results.setdefault('seg_fields', []).append('gt_seg_map')
        return results


def _refuse(path: str, unknown: np.ndarray, table: np.ndarray) -> None:
    found = np.unique(unknown).tolist()
    known = np.flatnonzero(table != UNKNOWN).tolist()
    raise ValueError(
        f'label map {path!r} has {len(unknown)} pixels with ids that are no class: '
        f'{name_some(found)}; the {len(known)} known ids are {known[0]} to {known[-1]}'
        '. Correct the map, class_file or metainfo.classes, or reduce_zero_label'
    )


def with_checked_loading(pipeline: Compose) -> Compose:
    """Put the loaders above in the place of mmcv's and mmseg's, in place.

    Only where these are left at their defaults. mmseg's inferencer looks for them by
    name in the pipeline of the test set, so ours are not named there.
    """
    ours: dict[type, Any] = {
        LoadImageFromFile: LoadSegImage,
        LoadAnnotations: LoadLabelMap,
    }
    for i, step in enumerate(pipeline.transforms):
        if type(step) in ours and vars(step) == vars(type(step)()):
            pipeline.transforms[i] = ours[type(step)]()
    return pipeline

"""COCO-style detection sets, checked before the first step.

Microsoft COCO: Common Objects in Context, arXiv 1405.0312.
Built on `mmdet.datasets.CocoDataset` (Apache-2.0).
Departs from the source:
- classes follow from the annotation file, in the order of the category ids; a
  stated list of classes keeps its own order (mmdet keeps the file's);
- images without boxes are trained on;
- crowds and unusable boxes are dropped and counted, boxes are clamped to the image;
- images are read by `LoadImage`, one that cannot be read is replaced in training;
  polygons are not kept.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.dataset import Compose
from mmengine.fileio import exists, get_local_path, isdir
from mmengine.logging import print_log

from mmbackbones.data.coco_entries import (
    check_id,
    check_image,
    clamp_box,
    is_clipped,
    mistaken_boxes,
)
from mmbackbones.data.coco_json import category_table, name_some, read_coco_json
from mmbackbones.data.det_transforms import LoadImage
from mmbackbones.data.fast_transforms import check_windows
from mmbackbones.data.mosaic import give_data_set
from mmbackbones.data.read_faults import ReplacesUnreadable
from mmbackbones.registry import DATASETS

__all__ = ['CocoDetection']


@DATASETS.register_module()
class CocoDetection(ReplacesUnreadable, CocoDataset):
    """A detection set in COCO format.

    A sample has no crowd boxes; evaluation reads them from the json itself. After
    loading, `metainfo` holds `classes` (names by label) and `category_ids` (ids of
    the json by label). To join sets whose ids differ, give mmengine's
    `ConcatDataset` `ignore_keys=['category_ids']`.

    A `LoadImageFromFile` in the pipeline that is left at its defaults reads as
    `LoadImage` does. (`DetInferencer` looks for a loader of that very name in the
    pipeline of the test set, so ours is not named there.)

    Args:
        *args: as `mmdet.datasets.CocoDataset`.
        label_from_category_id: labels are the category ids themselves and the
            number of classes is the highest id + 1, as in the published Objects365
            heads (ids 1 to 365, 366 rows). False numbers the classes from 0.
        missing_images: 'error', or 'drop' to train without the images that are not
            on disk. Evaluation always needs all of them.
        **kwargs: as `mmdet.datasets.CocoDataset`; of `filter_cfg` the keys
            `filter_empty_gt` (False) and `min_size` (of an image, pixels) count, in
            training only.

    Raises:
        ValueError: no such data root, annotation file or image; a file that is not
            COCO-shaped; a category id that it does not list; nothing to train on;
            an unknown option.
    """

    METAINFO: dict = {}

    def __init__(
        self,
        *args: Any,
        label_from_category_id: bool = False,
        missing_images: str = 'error',
        **kwargs: Any,
    ) -> None:
        if missing_images not in ('error', 'drop'):
            raise ValueError(
                f"missing_images is {missing_images!r}; choose 'error' or 'drop'"
            )
        unknown = set(kwargs.get('filter_cfg') or ()) - {'filter_empty_gt', 'min_size'}
        if unknown:
            raise ValueError(
                f'filter_cfg has {name_some(sorted(unknown))}; it knows '
                'filter_empty_gt and min_size'
            )
        self.label_from_category_id = label_from_category_id
        self.missing_images = missing_images
        super().__init__(*args, **kwargs)

    @property
    def pipeline(self) -> Compose:
        """Transforms of a sample; may be replaced while training."""
        return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Compose) -> None:
        default = vars(LoadImageFromFile())
        for i, step in enumerate(pipeline.transforms):
            if type(step) is LoadImageFromFile and vars(step) == default:
                pipeline.transforms[i] = LoadImage()
        give_data_set(pipeline.transforms, self)
        check_windows(pipeline.transforms)
        self._pipeline = pipeline

    def load_data_list(self) -> list[dict]:
        """Images and their usable boxes; one line in the log says what they are."""
        self._check_paths()
        with get_local_path(self.ann_file, backend_args=self.backend_args) as path:
            coco = read_coco_json(path, need_annotations=not self.test_mode)
        self._check_entries(coco)
        classes, ids = category_table(
            coco['categories'],
            self.ann_file,
            classes=self._metainfo.get('classes'),
            label_from_category_id=self.label_from_category_id,
        )
        self._check_foreign(coco)
        self._check_boxes(coco)
        self._metainfo.update(classes=classes, category_ids=ids)
        if len(set(classes)) < len(classes):
            twice = [name for name, times in Counter(classes).items() if times > 1]
            raise ValueError(f'metainfo.classes has {name_some(twice)} more than once')
        self.cat_ids = list(ids)
        self.cat2label = {category: label for label, category in enumerate(ids)}

        missing = self._missing_images(coco['images'])
        self._num_clipped = 0
        dropped: Counter = Counter()
        annotations = defaultdict(list)
        for annotation in coco['annotations']:
            annotations[annotation['image_id']].append(annotation)
        data_list = []
        for image in coco['images']:
            of_image = annotations.pop(image['id'], [])
            if image['file_name'] in missing:
                dropped['of images not on disk'] += len(of_image)
            else:
                data_list.append(self._parse_image(image, of_image, dropped))
        dropped['of images not listed'] += sum(map(len, annotations.values()))
        self._report(data_list, len(coco['annotations']), len(missing), dropped)
        return data_list

    def filter_data(self) -> list[dict]:
        """What `filter_cfg` leaves of the images; everything in evaluation."""
        if self.test_mode or not self.filter_cfg:
            return self.data_list
        drop_empty = self.filter_cfg.get('filter_empty_gt', False)
        min_size = self.filter_cfg.get('min_size', 0)
        left = [
            info
            for info in self.data_list
            if (info['instances'] or not drop_empty)
            and min(info['width'], info['height']) >= min_size
        ]
        if not left:
            raise ValueError(
                f'filter_cfg {dict(self.filter_cfg)} leaves none of the '
                f'{len(self.data_list)} images of {self.ann_file!r}'
            )
        return left

    def _key(self) -> str:
        """Where the config holds this data set, as far as can be known."""
        return f'{"val" if self.test_mode else "train"}_dataloader.dataset'

    def _image_root(self) -> str:
        return self.data_prefix.get('img', self.data_root) or ''

    def _check_paths(self) -> None:
        def need(key: str, path: str, is_there: Callable) -> None:
            if path and not is_there(path, backend_args=self.backend_args):
                raise ValueError(
                    f'{key} {path!r} does not exist; set {self._key()}.{key}'
                    + (', or give --data-root' if key == 'data_root' else '')
                )

        need('data_root', self.data_root, isdir)
        if not self.ann_file:
            raise ValueError(f'{self._key()}.ann_file is not set')
        need('ann_file', self.ann_file, exists)

    def _check_entries(self, coco: dict) -> None:
        file = f'annotation file {self.ann_file!r}'
        if not coco['images']:
            raise ValueError(f'{file} lists no images')
        if not coco['annotations'] and not self.test_mode:
            raise ValueError(f'{file} has no annotations: there is nothing to train on')
        for image in coco['images']:
            check_image(image, file)
        count = Counter(image['id'] for image in coco['images'])
        if len(count) < len(coco['images']):
            twice = [image_id for image_id, times in count.items() if times > 1]
            raise ValueError(f'{file} lists the image id {name_some(twice)} repeatedly')
        for annotation in coco['annotations']:
            for key in ('image_id', 'category_id'):
                check_id(annotation, key, file)
        for category in coco['categories']:
            check_id(category, 'id', file)

    def _check_boxes(self, coco: dict) -> None:
        """Boxes are [x, y, width, height] in pixels, as far as can be told."""
        mistake = mistaken_boxes(coco)
        if mistake:
            raise ValueError(
                f'annotation file {self.ann_file!r}: {mistake}. COCO boxes are '
                '[x, y, width, height] in pixels, x and y of the upper left corner; '
                'convert the file'
            )

    def _check_foreign(self, coco: dict) -> None:
        """Every annotation is of a listed category."""
        file = f'annotation file {self.ann_file!r}'
        listed = {category['id'] for category in coco['categories']}
        foreign = Counter(
            annotation['category_id']
            for annotation in coco['annotations']
            if annotation['category_id'] not in listed
        )
        if foreign:
            raise ValueError(
                f'{foreign.total()} annotations of {file} have a category id that its '
                f'categories do not list: {name_some(sorted(foreign, key=str))}; it '
                f'lists {name_some(sorted(listed, key=str), 10)}'
            )

    def _missing_images(self, images: list[dict]) -> set[str]:
        """File names that are not on disk, found by listing each folder once."""
        root = self._image_root()
        if '://' in root:
            return set()
        listings: dict[str, set[str]] = {}
        missing = []
        for image in images:
            folder, name = os.path.split(os.path.join(root, image['file_name']))
            folder = folder or '.'
            if folder not in listings:
                found = os.listdir(folder) if os.path.isdir(folder) else ()
                listings[folder] = set(found)
            if name not in listings[folder]:
                missing.append(image['file_name'])
        if missing and (self.test_mode or self.missing_images == 'error'):
            raise ValueError(
                f'{len(missing)} of {len(images)} images of {self.ann_file!r} are not '
                f'in {root!r}: {name_some(missing, 3)}; set '
                f'{self._key()}.data_prefix.img'
                + ('' if self.test_mode else ", or missing_images='drop'")
            )
        return set(missing)

    def _parse_image(
        self, image: dict, annotations: Sequence[dict], dropped: Counter
    ) -> dict:
        width, height = image['width'], image['height']
        instances = []
        for annotation in annotations:
            label = self.cat2label.get(annotation['category_id'])
            box, reason = clamp_box(annotation['bbox'], width, height)
            if annotation.get('iscrowd') or annotation.get('ignore'):
                reason = 'crowd'
            elif label is None:
                reason = 'of other classes'
            if reason:
                dropped[reason] += 1
            else:
                self._num_clipped += is_clipped(annotation['bbox'], box)
                instances.append(dict(bbox=box, bbox_label=label, ignore_flag=0))
        return dict(
            img_path=os.path.join(self._image_root(), image['file_name']),
            img_id=image['id'],
            seg_map_path=None,
            width=width,
            height=height,
            instances=instances,
        )

    def _report(
        self, data_list: list[dict], total: int, num_missing: int, dropped: Counter
    ) -> None:
        """Log one summary; refuse a training set without a usable box."""
        boxes = Counter(
            instance['bbox_label']
            for info in data_list
            for instance in info['instances']
        )
        empty = sum(not info['instances'] for info in data_list)
        reasons = ', '.join(f'{n} {reason}' for reason, n in dropped.items() if n)
        classes = self._metainfo['classes']
        summary = (
            f'{self.ann_file}: {len(data_list)} images ({empty} without boxes), '
            f'{boxes.total()} boxes, {len(classes)} classes; '
        )
        summary += (
            f'dropped {dropped.total()} of {total} boxes: {reasons}'
            if reasons
            else 'dropped no boxes'
        )
        if self._num_clipped:
            summary += f'; cut {self._num_clipped} at the edge of their image'
        if num_missing:
            summary += f'; left out {num_missing} images not on disk'
        print_log(summary, logger='current')
        if self.test_mode:
            return
        if not boxes:
            raise ValueError(
                f'annotation file {self.ann_file!r} has no usable box to train on: '
                f'of {total}, {reasons}'
            )
        unused = [
            name
            for label, name in enumerate(classes)
            if label not in boxes and not name.startswith('unused ')
        ]
        if unused:
            print_log(
                f'{self.ann_file} lists {len(unused)} categories without any box: '
                f'{name_some(unused, 10)}. They stay classes of the model; to leave '
                'them out, name the others in metainfo.classes of every data set',
                logger='current',
                level=30,
            )

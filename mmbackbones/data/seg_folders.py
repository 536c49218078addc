"""Segmentation sets in folders, checked before the first step.

Scene Parsing through ADE20K Dataset (Zhou et al., CVPR 2017), arXiv 1608.05442.
Built on `mmseg.datasets.BaseSegDataset` (Apache-2.0).
Departs from the source:
- ids of the label maps may be any, a class file says what they are;
- every image needs its label map, and folders that are not there are an error;
- images of several suffixes, in either case, may be mixed.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.dataset import Compose
from mmengine.fileio import exists, isdir, join_path, list_dir_or_file, list_from_file
from mmengine.logging import print_log
from mmseg.datasets import ADE20KDataset, BaseSegDataset

from mmbackbones.data.coco_json import name_some
from mmbackbones.data.read_faults import ReplacesUnreadable
from mmbackbones.data.seg_classes import LabelTable, class_file_path
from mmbackbones.data.seg_transforms import with_checked_loading
from mmbackbones.registry import DATASETS

__all__ = ['ADE20K', 'SegmentationFolders']

_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')


@DATASETS.register_module()
class SegmentationFolders(ReplacesUnreadable, BaseSegDataset):
    """Images in one folder, their label maps under the same names in another.

    A label map is a picture of one channel whose values are ids. `metainfo` holds
    `classes` (names by label) and `category_ids` (ids in the maps by label). To join
    sets whose ids differ, give mmengine's `ConcatDataset`
    `ignore_keys=['category_ids', 'reduce_zero_label', 'label_map']`.

    A `LoadImageFromFile` and mmseg's `LoadAnnotations` in the pipeline that are left
    at their defaults read as `LoadSegImage` and `LoadLabelMap` do.

    Args:
        data_root: folder that the other paths start from.
        data_prefix: `img_path` and `seg_map_path`, the two folders.
        class_file: names of the ids, see `LabelTable.of`; relative to `data_root`.
        metainfo: `classes`, without a class file the names by rising id, with one a
            choice of its names (pixels of others are ignored); `palette`.
        reduce_zero_label: id 0 is void, see `LabelTable.of`.
        img_suffix: how names of images end, one or several, in either case.
        seg_map_suffix: how names of label maps end.
        ann_file: text file with the names to use, without suffix, one a line.
        **kwargs: as `mmseg.datasets.BaseSegDataset`.

    Raises:
        ValueError: folders or files that are missing, images without a label map,
            classes that do not fit.
    """

    def __init__(
        self,
        *,
        data_root: str | None = None,
        data_prefix: dict,
        class_file: str | None = None,
        metainfo: dict | None = None,
        reduce_zero_label: bool = False,
        img_suffix: str | Sequence[str] = _IMAGE_SUFFIXES,
        seg_map_suffix: str = '.png',
        ann_file: str = '',
        **kwargs: Any,
    ) -> None:
        metainfo = dict(metainfo or {})
        self.table = LabelTable.of(
            classes=metainfo.get('classes'),
            known=self.METAINFO.get('classes'),
            class_file=class_file_path(class_file, data_root),
            reduce_zero_label=reduce_zero_label,
        )
        metainfo.update(
            classes=self.table.classes, category_ids=self.table.category_ids
        )
        suffixes = (img_suffix,) if isinstance(img_suffix, str) else img_suffix
        super().__init__(
            data_root=data_root,
            data_prefix=data_prefix,
            metainfo=metainfo,
            reduce_zero_label=reduce_zero_label,
            img_suffix=tuple(suffix.lower() for suffix in suffixes),
            seg_map_suffix=seg_map_suffix,
            ann_file=ann_file,
            **kwargs,
        )

    @property
    def pipeline(self) -> Compose:
        """Transforms of a sample; may be replaced while training."""
        return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Compose) -> None:
        self._pipeline = with_checked_loading(pipeline)

    def get_data_info(self, idx: int) -> dict:
        """Paths of a sample, and the labels of its ids."""
        return super().get_data_info(idx) | dict(id_to_label=self.table.lookup())

    def load_data_list(self) -> list[dict]:
        """Pairs of image and label map; one line in the log says how many."""
        folders = {key: self._folder(key) for key in ('img_path', 'seg_map_path')}
        images = self._images(folders['img_path'])
        maps = self._names(folders['seg_map_path'])
        data_list, without = [], []
        for stem, name in images.items():
            label_map = stem + self.seg_map_suffix
            if label_map not in maps:
                without.append(name)
                continue
            data_list.append(
                dict(
                    img_path=join_path(folders['img_path'], name),
                    seg_map_path=join_path(folders['seg_map_path'], label_map),
                    label_map=self.label_map,
                    reduce_zero_label=self.reduce_zero_label,
                    seg_fields=[],
                )
            )
        if without:
            raise ValueError(
                f'{len(without)} of {len(images)} images of {folders["img_path"]!r} '
                f'have no label map in {folders["seg_map_path"]!r}: '
                f'{name_some(without, 3)}; the map of a.jpg is '
                f'a{self.seg_map_suffix} (seg_map_suffix)'
            )
        print_log(
            f'{folders["img_path"]}: {len(data_list)} images with label maps, '
            f'{len(self.table.classes)} classes; ignored ids: '
            f'{name_some(self.table.ignored_ids)}',
            logger='current',
        )
        return data_list

    def _key(self) -> str:
        """Where the config holds this data set, as far as can be known."""
        return f'{"val" if self.test_mode else "train"}_dataloader.dataset'

    def _folder(self, key: str) -> str:
        """A folder of `data_prefix`, which exists."""
        if self.data_root and not isdir(self.data_root, self.backend_args):
            raise ValueError(
                f'data_root {self.data_root!r} does not exist; set '
                f'{self._key()}.data_root, or give --data-root'
            )
        folder = self.data_prefix.get(key)
        if not folder:
            raise ValueError(f'{self._key()}.data_prefix.{key} is not set')
        if not isdir(folder, self.backend_args):
            raise ValueError(
                f'data_prefix.{key} {folder!r} does not exist; set '
                f'{self._key()}.data_prefix.{key}, or give --data-root'
            )
        return folder

    def _names(self, folder: str) -> set[str]:
        """Paths of files below a folder, relative to it."""
        return set(
            list_dir_or_file(
                folder, list_dir=False, recursive=True, backend_args=self.backend_args
            )
        )

    def _images(self, folder: str) -> dict[str, str]:
        """File names by what comes before the suffix, in order."""
        images: dict[str, str] = {}
        for name in sorted(self._names(folder)):
            suffix = next((s for s in self.img_suffix if name.lower().endswith(s)), '')
            if not suffix:
                continue
            stem = name[: -len(suffix)]
            if stem in images:
                raise ValueError(
                    f'{name!r} and {images[stem]!r} in {folder!r} share a label map; '
                    'rename one, or set img_suffix'
                )
            images[stem] = name
        if self.ann_file:
            images = self._listed(images, folder)
        if not images:
            raise ValueError(
                f'no images in {folder!r}: none ends in {", ".join(self.img_suffix)}'
            )
        return images

    def _listed(self, images: dict[str, str], folder: str) -> dict[str, str]:
        if not exists(self.ann_file, self.backend_args):
            raise ValueError(f'ann_file {self.ann_file!r} does not exist')
        lines = list_from_file(self.ann_file, backend_args=self.backend_args)
        listed = [line.strip() for line in lines if line.strip()]
        missing = [stem for stem in listed if stem not in images]
        if missing:
            raise ValueError(
                f'{len(missing)} of {len(listed)} images that {self.ann_file!r} lists '
                f'are not in {folder!r}: {name_some(missing, 3)}'
            )
        return {stem: images[stem] for stem in listed}


@DATASETS.register_module()
class ADE20K(SegmentationFolders):
    """ADE20K in the form of the scene parsing challenge: 150 classes.

    Label maps hold 0 for what is none of the classes, 1 to 150 for the classes;
    0 is ignored. Names and colours are mmseg's.

    Args:
        data_root: folder `ADEChallengeData2016`, or the one that it lies in.
        reduce_zero_label: as the maps are; False takes maps that start at 0.
        **kwargs: as `SegmentationFolders`.
    """

    METAINFO = ADE20KDataset.METAINFO

    def __init__(
        self, *, data_root: str, reduce_zero_label: bool = True, **kwargs: Any
    ) -> None:
        unpacked = join_path(data_root, 'ADEChallengeData2016')
        super().__init__(
            data_root=unpacked if isdir(unpacked) else data_root,
            reduce_zero_label=reduce_zero_label,
            **kwargs,
        )

"""The number of classes and their names, from the annotation file into the config."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.fileio import exists, get_local_path, join_path
from mmengine.utils import is_abs

from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.coco_json import category_table, name_some, read_categories
from mmbackbones.registry import DATASETS

__all__ = ['resolve_classes']

_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def resolve_classes(cfg: Config) -> Config:
    """Fill in what follows from the annotation files, in place.

    The classes are those of the first data set of `train_dataloader` (or, where its
    file is not there, of `val_dataloader` or `test_dataloader`): its
    `metainfo.classes`, else all categories of its file by rising id. They become
    `metainfo.classes` of every `CocoDetection` that states none, within wrappers
    too, and their number `model.decoder.num_classes` where that is None.

    Without any annotation file on this machine a config that states its
    `num_classes` stays as it is: to predict, no data are needed.

    Args:
        cfg: with pure-Python or string types; other data sets are left alone.

    Returns:
        The same config.

    Raises:
        ValueError: a stated `num_classes` is not what the file has; the data sets
            have different classes; `num_classes` is None and there is no file.
    """
    sets = [
        (f'{loader}.dataset', dataset)
        for loader in _LOADERS
        for dataset in _coco_sets((cfg.get(loader) or {}).get('dataset'))
    ]
    decoder = cfg.model.decoder
    present = [(key, dataset) for key, dataset in sets if _is_there(dataset)]
    if not present:
        if decoder.get('num_classes') is None and sets:
            key, dataset = sets[0]
            raise ValueError(
                'model.decoder.num_classes is to follow from the annotation file '
                f'{_ann_file(dataset)!r}, which does not exist; set {key}.data_root '
                f'and {key}.ann_file'
            )
        return cfg

    classes = _classes(present[0][1])
    for key, dataset in present[1:]:
        _check_same(classes, present[0][1], dataset, key)
    for _, dataset in sets:
        dataset.setdefault('metainfo', ConfigDict()).setdefault('classes', classes)
    if decoder.get('num_classes') is None:
        decoder.num_classes = len(classes)
    elif decoder.num_classes != len(classes):
        raise ValueError(
            f'model.decoder.num_classes is {decoder.num_classes}, but '
            f'{_ann_file(present[0][1])!r} gives {len(classes)} classes '
            f'({name_some(classes)}); set num_classes to None to follow the file, or '
            'data_root to the data that were meant'
        )
    return cfg


def _coco_sets(dataset: Any) -> Iterator[ConfigDict]:
    """The configs of `CocoDetection` in a data set's config, wrappers opened."""
    if not isinstance(dataset, dict):
        return
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    if any(inner):
        for wrapped in inner:
            yield from _coco_sets(wrapped)
        return
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and issubclass(kind, CocoDetection):
        yield dataset


def _ann_file(dataset: ConfigDict) -> str:
    """Path of the annotation file, put together as the data set does it."""
    ann_file = dataset.get('ann_file') or ''
    if not ann_file or is_abs(ann_file):
        return ann_file
    return join_path(dataset.get('data_root') or '', ann_file)


def _is_there(dataset: ConfigDict) -> bool:
    ann_file = _ann_file(dataset)
    return bool(ann_file) and exists(ann_file, dataset.get('backend_args'))


def _stated(dataset: ConfigDict) -> tuple[str, ...] | None:
    classes = (dataset.get('metainfo') or {}).get('classes')
    return None if classes is None else tuple(classes)


def _classes(
    dataset: ConfigDict, classes: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """Names by label: the stated ones, else `classes`, else all; the file has them."""
    ann_file = _ann_file(dataset)
    with get_local_path(ann_file, backend_args=dataset.get('backend_args')) as path:
        categories = read_categories(path)
    names, _ = category_table(
        categories,
        ann_file,
        classes=_stated(dataset) or classes,
        label_from_category_id=dataset.get('label_from_category_id', False),
    )
    return names


def _check_same(
    classes: tuple[str, ...], first: ConfigDict, other: ConfigDict, key: str
) -> None:
    """A second data set has to have the classes of the first."""
    theirs = _classes(other, classes if _stated(first) else None)
    unordered = _stated(other) is None and not other.get('label_from_category_id')
    if theirs == classes or (unordered and set(theirs) == set(classes)):
        return
    missing = [name for name in classes if name not in theirs]
    extra = [name for name in theirs if name not in classes]
    difference = '; '.join(
        [f'it lacks {name_some(missing)}'] * bool(missing)
        + [f'only it has {name_some(extra)}'] * bool(extra)
    )
    raise ValueError(
        f'{key} ({_ann_file(other)!r}) has other classes than {_ann_file(first)!r}: '
        f'{difference or "their order differs"}; list the same categories in both '
        'files, or name those to use in metainfo.classes of every data set'
    )

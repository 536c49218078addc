"""Which ids of a label map are which classes, from a class file or a config."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.fileio import exists, get_text, join_path
from mmengine.utils import is_abs

from mmbackbones.data.coco_json import name_some
from mmbackbones.registry import DATASETS

__all__ = [
    'IGNORED',
    'UNKNOWN',
    'LabelTable',
    'class_file_path',
    'resolve_seg_classes',
]

IGNORED = 255
"""Label of pixels that are neither trained on nor evaluated, as mmseg has it."""
UNKNOWN = -1
"""In place of a label, for ids that a label map must not have."""

_MAX_ID = 2**16 - 1
_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


@dataclass(frozen=True)
class LabelTable:
    """The classes of a segmentation set.

    Attributes:
        classes: names by label.
        category_ids: ids in the label maps, by label.
        ignored_ids: ids of pixels that do not count.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    ignored_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        *,
        classes: Sequence[str] | None = None,
        known: Sequence[str] | None = None,
        class_file: str | None = None,
        reduce_zero_label: bool = False,
    ) -> 'LabelTable':
        """Put a table together; of `class_file` and `known` one is enough.

        Args:
            classes: those to use, in this order; pixels of others are ignored. None
                takes all. Without `class_file` and `known` this is the list itself.
            known: all names by rising id, from 0, or from 1 with `reduce_zero_label`.
            class_file: YAML or JSON, a mapping from ids to names, at the top or
                under `classes` or `names`, or a list; or a text file with a name a
                line. Lists count as `known` does.
            reduce_zero_label: id 0 is no class, its pixels are ignored. So are those
                with id 255, unless it is a class by name.

        Raises:
            ValueError: the file is missing, no UTF-8 text or of another form; names
                or ids occur twice; there are no classes, or more than 255; unknown
                names.
        """
        if isinstance(classes, str):
            raise ValueError(
                f'metainfo.classes is {classes!r}; it takes a list of names'
            )
        first = int(reduce_zero_label)
        if class_file:
            source, entries = f'class file {class_file!r}', _read(class_file, first)
            if reduce_zero_label:
                entries = {i: name for i, name in entries.items() if i != 0}
        else:
            source, names = 'the list of classes', known or classes or ()
            entries = dict(enumerate(names, first))
        _check(entries, source)
        chosen = tuple(entries.values() if classes is None else classes)
        _check(dict(enumerate(chosen)), 'metainfo.classes')
        id_of = {name: i for i, name in entries.items()}
        foreign = [name for name in chosen if name not in id_of]
        if foreign:
            raise ValueError(
                f'metainfo.classes has {name_some(foreign)}, which {source} does not '
                f'have; it has {name_some(list(id_of), 10)}'
            )
        ids = tuple(id_of[name] for name in chosen)
        void = {0} if reduce_zero_label else set()
        others = (set(entries) | {IGNORED} | void) - set(ids)
        return cls(chosen, ids, tuple(sorted(others)))

    def lookup(self) -> np.ndarray:
        """Labels by id, `(highest id + 1,)` int16, with `IGNORED` and `UNKNOWN`."""
        ids = (*self.category_ids, *self.ignored_ids)
        labels = np.full(max(ids) + 1, UNKNOWN, np.int16)
        labels[list(self.ignored_ids)] = IGNORED
        labels[list(self.category_ids)] = range(len(self.category_ids))
        return labels


def _read(class_file: str, first: int) -> dict[int, str]:
    """Names by id."""
    if not exists(class_file):
        raise ValueError(f'class_file {class_file!r} does not exist')
    try:
        text = get_text(class_file, encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(
            f'class_file {class_file!r} is no UTF-8 text: {error}'
        ) from error
    if PurePath(class_file).suffix.lower() not in ('.yaml', '.yml', '.json'):
        names = (line.strip() for line in text.strip().splitlines())
        return dict(enumerate(names, first))
    try:
        content = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f'class_file {class_file!r} is broken: {error}') from error
    if isinstance(content, Mapping):
        content = content.get('classes') or content.get('names') or content
    if isinstance(content, list):
        content = dict(enumerate(content, first))
    if not isinstance(content, Mapping):
        raise ValueError(
            f'class_file {class_file!r} has neither a list of names nor a mapping '
            'from ids to names, at its top or under `classes` or `names`'
        )
    entries: dict[int, str] = {}
    for key, name in content.items():
        number = _number(key)
        if number is None or type(name) not in (str, int) or number in entries:
            raise ValueError(
                f'class_file {class_file!r} has the entry {key!r}: {name!r}; an id is '
                'an integer that occurs once, and a name is a text (yes, no, on, off '
                'and null need quotes to be one)'
            )
        entries[number] = str(name)
    return entries


def _number(key: object) -> int | None:
    """An id, as YAML or as JSON has it."""
    is_text = isinstance(key, str) and re.fullmatch(r'-?[0-9]+', key)
    return int(key) if is_text or type(key) is int else None


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once; of others the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping, or an error of YAML's."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(
                problem='a key occurs twice in a mapping', problem_mark=node.start_mark
            )
        return mapping


def _check(entries: Mapping[int, str], source: str) -> None:
    if not entries:
        raise ValueError(f'{source} is empty: set class_file or metainfo.classes')
    if len(entries) > IGNORED:
        raise ValueError(
            f'{source} has {len(entries)} classes; {IGNORED} are possible, since '
            f'{IGNORED} is the label of what is ignored'
        )
    outside = [i for i in entries if not 0 <= i <= _MAX_ID]
    if outside:
        raise ValueError(
            f'{source} has the ids {name_some(outside)}; ids are 0 to {_MAX_ID}'
        )
    if not all(entries.values()):
        raise ValueError(f'{source} has empty names among {name_some(list(entries))}')
    twice = [name for name, n in Counter(entries.values()).items() if n > 1]
    if twice:
        raise ValueError(f'{source} has the names {name_some(twice)} repeatedly')


def resolve_seg_classes(cfg: Config) -> Config:
    """Fill in what follows from the classes of the data sets, in place.

    `model.num_classes`, where it is None, becomes the number of classes of
    `train_dataloader` (or of the first loader that has a data set); the others have
    to have the same classes.

    Without the class file on this machine a config that states its `num_classes`
    stays as it is: to predict, no data are needed.

    Args:
        cfg: with pure-Python or string types. Data sets of mmseg count by their
            `metainfo.classes` or their own list.

    Returns:
        The same config.

    Raises:
        ValueError: a stated number that does not fit; different classes; a number
            that is to follow from a file which is not there.
    """
    sets = [
        (f'{loader}.dataset', dataset)
        for loader in _LOADERS
        for dataset in _seg_sets((cfg.get(loader) or {}).get('dataset'))
    ]
    stated = cfg.model.get('num_classes')
    found: list[tuple[str, tuple[str, ...]]] = []
    for key, dataset in sets:
        path = class_file_path(dataset.get('class_file'), dataset.get('data_root'))
        if path and stated is not None and not exists(path):
            continue
        try:
            found.append((key, _classes(dataset, path)))
        except ValueError as error:
            raise ValueError(f'{key}: {error}') from error
    if not found:
        if stated is None:
            raise ValueError(
                'model.num_classes is to follow from the data, but the config has no '
                'segmentation set; set num_classes'
            )
        return cfg
    first_key, classes = found[0]
    for key, others in found[1:]:
        if others != classes:
            difference = sorted(set(classes) ^ set(others)) or ['their order']
            raise ValueError(
                f'{key} has other classes than {first_key}; they differ in '
                f'{name_some(difference)}'
            )
    if stated is None:
        cfg.model.num_classes = len(classes)
    elif stated != len(classes):
        raise ValueError(
            f'model.num_classes is {stated}, but {first_key} has {len(classes)} '
            f'classes ({name_some(classes)}); set num_classes to None to follow it'
        )
    return cfg


def class_file_path(class_file: str | None, data_root: str | None) -> str | None:
    """Where a class file is: a relative path starts at `data_root`."""
    if not class_file or is_abs(class_file):
        return class_file
    return join_path(data_root or '', class_file)


def _kind(dataset: ConfigDict) -> Any:
    kind = dataset.get('type')
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _seg_sets(dataset: Any) -> Iterator[ConfigDict]:
    """The configs of data sets within wrappers."""
    if not isinstance(dataset, dict):
        return
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    if any(inner):
        for wrapped in inner:
            yield from _seg_sets(wrapped)
    else:
        yield dataset


def _classes(dataset: ConfigDict, class_file: str | None) -> tuple[str, ...]:
    known = (getattr(_kind(dataset), 'METAINFO', None) or {}).get('classes')
    return LabelTable.of(
        classes=(dataset.get('metainfo') or {}).get('classes'),
        known=known,
        class_file=class_file,
        reduce_zero_label=dataset.get('reduce_zero_label', False),
    ).classes

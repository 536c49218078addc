"""What a model says about itself: task, classes; of an exported file, its input.

An exported file carries one JSON object under the key `mmbackbones`: in an ONNX file
among the metadata properties, in an OpenVINO model in the runtime information, for a
TensorRT engine in a file of the same name that ends in `.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ['KEY', 'ExportInfo', 'ModelInfo', 'parse_metadata']

KEY = 'mmbackbones'
"""Name of the metadata in a file."""

_TASKS = ('detection', 'segmentation')
_RESIZES = ('stretch', 'keep_ratio_pad')


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What predictions need to be named.

    Attributes:
        task: 'detection' or 'segmentation'.
        classes: names by label.
        category_ids: ids of the training data by label.
        palette: RGB by label, or None.
    """

    task: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    palette: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def from_dataset_meta(cls, task: str, meta: dict) -> 'ModelInfo':
        """From a model's `dataset_meta`; labels stand in for ids that it lacks."""
        palette = meta.get('palette')
        classes = tuple(meta['classes'])
        return cls(
            task=task,
            classes=classes,
            category_ids=tuple(meta.get('category_ids') or range(len(classes))),
            palette=_colours(palette) if isinstance(palette, list | tuple) else None,
        )

    def labels_of(self, names: Sequence[str] | None) -> tuple[int, ...] | None:
        """Labels of classes by name; None stands for all of them.

        Raises:
            ValueError: a name that is no class of the model, or no names at all.
        """
        if names is None:
            return None
        if isinstance(names, str) or not names:
            raise ValueError(f'classes is {names!r}; give a list of names, or None')
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise ValueError(
                f'classes names {", ".join(map(repr, unknown))}, which the model does '
                f'not know; its {len(self.classes)} classes are '
                f'{", ".join(self.classes)}'
            )
        return tuple(i for i, name in enumerate(self.classes) if name in names)


@dataclass(frozen=True, kw_only=True)
class ExportInfo(ModelInfo):
    """A model in a file, whose preprocessing is stated, not run by a config.

    Attributes:
        input_size_hw: height and width of the input in pixels.
        dynamic_batch: whether any number of images may be given at once.
        resize: 'stretch' to the input, or 'keep_ratio_pad': as large as fits, at the
            upper left, the rest filled with `mean`.
        mean: of R, G, B on the scale of 0 to 255; the graph itself subtracts it.
        std: likewise; the graph divides by it.
        licence: of the weights.
    """

    input_size_hw: tuple[int, int]
    dynamic_batch: bool
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str


def parse_metadata(text: str | None, path: str) -> ExportInfo:
    """Read the metadata of an exported file.

    Args:
        text: JSON from the file, or None where the key was not found.
        path: of the file, for errors.

    Raises:
        ValueError: there is none, or it is not as this version writes it.
    """
    if text is None:
        raise ValueError(
            f'{path!r} has no metadata under {KEY!r} (classes, input size), so it is '
            'no export of this package; make one with tools/export.py'
        )
    try:
        found = json.loads(text)
        info = _from_json(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'the metadata {KEY!r} in {path!r} cannot be used: '
            f'{type(error).__name__} {error}; export the model anew'
        ) from error
    return info


def _from_json(found: dict[str, Any]) -> ExportInfo:
    for key, choices in (('task', _TASKS), ('resize', _RESIZES)):
        if found[key] not in choices:
            raise ValueError(f'{key} is {found[key]!r}; known are {choices}')
    classes = tuple(map(str, found['classes']))
    ids = found.get('category_ids')
    height, width = map(int, found['input_size_hw'])
    return ExportInfo(
        task=found['task'],
        classes=classes,
        category_ids=tuple(range(len(classes)) if ids is None else map(int, ids)),
        palette=_colours(found['palette']) if found.get('palette') else None,
        input_size_hw=(height, width),
        dynamic_batch=bool(found['dynamic_batch']),
        resize=found['resize'],
        mean=tuple(map(float, found['mean'])),
        std=tuple(map(float, found['std'])),
        licence=str(found.get('licence', '')),
    )


def _colours(palette: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, colour)) for colour in palette)

"""What a model says about itself: task, classes; of an exported file, its input.

An exported file carries one JSON object under the key `mmbackbones`: in an ONNX file
among the metadata properties, in an OpenVINO model in the runtime information, in a
program of `torch.export` among its extra files, beside a TensorRT engine or an
ExecuTorch program in `<file>.json`. What is written and what is read are defined here,
side by side.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    'KEY',
    'ExportInfo',
    'ModelInfo',
    'Slide',
    'metadata_json',
    'parse_metadata',
    'read_openvino_metadata',
    'read_sidecar',
    'write_onnx_metadata',
    'write_openvino_metadata',
    'write_sidecar',
]

KEY = 'mmbackbones'
"""Name of the metadata in a file."""

_TASKS = ('detection', 'segmentation')
# How `resize_as_stated` resizes.
_INTERPOLATION = dict(
    detection='bilinear, antialiased, as of Pillow', segmentation='bilinear'
)
_RESIZES = ('stretch', 'keep_ratio_pad', 'keep_ratio')


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
    def from_dataset_meta(cls, task: str, meta: Mapping[str, Any]) -> 'ModelInfo':
        """From a model's `dataset_meta`; labels stand in for ids that it lacks."""
        classes = tuple(map(str, meta['classes']))
        ids, palette = meta.get('category_ids'), meta.get('palette')
        is_table = isinstance(palette, list | tuple) and len(palette) > 0
        return ModelInfo(
            task=task,
            classes=classes,
            category_ids=tuple(map(int, ids or range(len(classes)))),
            palette=_colours(palette) if is_table else None,
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
class Slide:
    """Windows that slide over an image, as mmseg's `test_cfg` with mode 'slide' has it.

    Each window is as large as the file's input. The file gives logits, which are
    averaged where windows overlap.

    Attributes:
        stride_hw: of the windows in pixels.
        scale_wh: what the image is resized to first, by `ExportInfo.resize`; None
            leaves it as it is.
        align_corners: how logits are resized.
    """

    stride_hw: tuple[int, int]
    scale_wh: tuple[int, int] | None
    align_corners: bool


@dataclass(frozen=True, kw_only=True)
class ExportInfo(ModelInfo):
    """A model in a file, whose preprocessing is stated, not run by a config.

    Attributes:
        input_size_hw: height and width of the input in pixels.
        dynamic_batch: whether any number of images may be given at once.
        resize: 'stretch' to the size; 'keep_ratio', as large as fits into it;
            'keep_ratio_pad', the same at the upper left, the rest filled with `mean`.
            The size is that of the input, or `slide.scale_wh`.
        mean: of R, G, B on the scale of 0 to 255; the graph itself subtracts it.
        std: likewise; the graph divides by it.
        licence: of the weights.
        slide: of a segmentor that is tested so; None where an image is one input.
    """

    input_size_hw: tuple[int, int]
    dynamic_batch: bool
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    slide: Slide | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """Of a graph that predicts, in their order."""
        if self.task == 'detection':
            return 'boxes', 'scores', 'labels'
        return ('labels',) if self.slide is None else ('logits',)


def metadata_json(info: ExportInfo) -> str:
    """The JSON object as text; `interpolation` is for readers of other makers."""
    filter = _INTERPOLATION.get(info.task)
    stated = {} if filter is None else dict(interpolation=filter)
    return json.dumps(asdict(info) | stated)


def parse_metadata(text: str | None, path: str) -> ExportInfo:
    """Read the metadata of an exported file that predicts.

    Args:
        text: JSON from the file, or None where the key was not found.
        path: of the file, for errors.

    Raises:
        ValueError: there is none, it is not as this version writes it, or it is that
            of a bare backbone.
    """
    if text is None:
        raise ValueError(
            f'{path!r} has no metadata under {KEY!r} (classes, input size), so it is '
            'no export of this package; make one with tools/export.py'
        )
    try:
        found = json.loads(text)
        if found['task'] == 'backbone':
            raise _NoPredictionError
        return _from_json(found)
    except _NoPredictionError:
        raise ValueError(
            f'{path!r} is a bare backbone, which predicts nothing; export the model '
            'without --backbone'
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'the metadata {KEY!r} in {path!r} cannot be used: '
            f'{type(error).__name__} {error}; export the model anew'
        ) from error


class _NoPredictionError(Exception):
    """A file that is ours, but is not to be predicted with."""


def _from_json(found: dict[str, Any]) -> ExportInfo:
    for key, choices in (('task', _TASKS), ('resize', _RESIZES)):
        if found[key] not in choices:
            raise ValueError(f'{key} is {found[key]!r}; known are {choices}')
    slide = found.get('slide')
    return ExportInfo(
        **vars(ModelInfo.from_dataset_meta(found['task'], found)),
        input_size_hw=_pair(found['input_size_hw']),
        dynamic_batch=bool(found['dynamic_batch']),
        resize=found['resize'],
        mean=tuple(map(float, found['mean'])),
        std=tuple(map(float, found['std'])),
        licence=str(found.get('licence', '')),
        slide=None
        if slide is None
        else Slide(
            stride_hw=_pair(slide['stride_hw']),
            scale_wh=slide['scale_wh'] and _pair(slide['scale_wh']),
            align_corners=bool(slide['align_corners']),
        ),
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = map(int, values)
    return first, second


def _colours(palette: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, colour)) for colour in palette)


def write_onnx_metadata(model: Any, info: ExportInfo) -> None:
    """Add the metadata to an `onnx.ModelProto`, in place of what was there."""
    kept = [prop for prop in model.metadata_props if prop.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=KEY, value=metadata_json(info))


def write_openvino_metadata(model: Any, info: ExportInfo) -> None:
    """Add the metadata to an `openvino.Model`."""
    model.set_rt_info(metadata_json(info), [KEY])


def read_openvino_metadata(model: Any) -> str | None:
    """Of an `openvino.Model`, which may have been read from an ONNX file."""
    for keys in ([KEY], ['framework', KEY]):  # the second: of an ONNX file
        if model.has_rt_info(keys):
            return model.get_rt_info(keys).astype(str)
    return None


def write_sidecar(path: str | Path, info: ExportInfo) -> Path:
    """Write `<file>.json` beside a file that cannot hold it; returns its path."""
    sidecar = Path(f'{path}.json')
    sidecar.write_text(metadata_json(info))
    return sidecar


def read_sidecar(path: str | Path) -> str:
    """Text of `<file>.json` beside a file.

    Raises:
        ValueError: there is none.
    """
    sidecar = Path(f'{path}.json')
    if not sidecar.is_file():
        raise ValueError(
            f'{str(path)!r} lacks {str(sidecar)!r}, its metadata; keep them together'
        )
    return sidecar.read_text()

"""What an exported file says about itself, and how it is written into each format.

One JSON object under the key `mmbackbones`: in an ONNX file among the metadata
properties, in an OpenVINO model in the runtime information, in a file of
`torch.export` among its extra files, beside a TensorRT engine or an ExecuTorch program
in a file of the same name that ends in `.json`. `mmbackbones.inference` reads it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmbackbones.inference.metadata import KEY, ExportInfo

__all__ = [
    'KEY',
    'describe',
    'metadata_json',
    'published_licence',
    'resize_mode',
    'write_onnx_metadata',
    'write_openvino_metadata',
    'write_sidecar',
]

_LICENCES = {
    'HGNetV2': 'Apache-2.0',
    'ConvNeXtV2': 'CC-BY-NC-4.0',
    'Hiera': 'CC-BY-NC-4.0',
}
"""Of the published weights that a model usually starts from."""


def published_licence(backbone: nn.Module) -> str:
    """Licence of a backbone's published weights as an SPDX name, else 'unknown'."""
    name = type(backbone).__name__
    pos_embed = getattr(getattr(backbone, 'spec', None), 'pos_embed', None)
    if name == 'Hiera' and pos_embed == 'window':
        return 'Apache-2.0'  # trunks of SAM 2, and timm's
    return _LICENCES.get(name, 'unknown')


def resize_mode(pipeline: Sequence[Mapping[str, Any]]) -> str:
    """How a test pipeline brings images to size: 'stretch' or 'keep_ratio_pad'.

    Args:
        pipeline: `test_dataloader.dataset.pipeline` of a config.
    """
    for step in pipeline:
        kind = step['type']
        name = kind if isinstance(kind, str) else kind.__name__
        if name.rpartition('.')[2] == 'Resize':
            return 'keep_ratio_pad' if step.get('keep_ratio', False) else 'stretch'
    return 'stretch'


def describe(
    task: str,
    *,
    input_size_hw: tuple[int, int],
    dynamic_batch: bool,
    mean: Sequence[float],
    std: Sequence[float],
    licence: str,
    dataset_meta: Mapping[str, Any] | None = None,
    resize: str = 'stretch',
) -> ExportInfo:
    """The metadata of a file that is about to be written.

    Args:
        task: 'detection', 'segmentation' or 'backbone'.
        input_size_hw: height and width of the input in pixels.
        dynamic_batch: whether any number of images may be given at once.
        mean: of R, G, B on the scale of 0 to 255.
        std: likewise.
        licence: of the weights.
        dataset_meta: of the model: `classes`, `category_ids`, `palette`. None for a
            backbone.
        resize: 'stretch' or 'keep_ratio_pad'.
    """
    meta = dataset_meta or {}
    classes = tuple(meta.get('classes', ()))
    ids = meta.get('category_ids')
    palette = meta.get('palette')
    return ExportInfo(
        task=task,
        classes=classes,
        category_ids=tuple(range(len(classes)) if ids is None else map(int, ids)),
        palette=tuple(tuple(map(int, colour)) for colour in palette)
        if isinstance(palette, list | tuple)
        else None,
        input_size_hw=tuple(map(int, input_size_hw)),
        dynamic_batch=dynamic_batch,
        resize=resize,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        licence=licence,
    )


def metadata_json(info: ExportInfo) -> str:
    """The JSON object as text."""
    return json.dumps(dataclasses.asdict(info))


def write_onnx_metadata(model: Any, info: ExportInfo) -> None:
    """Add the metadata to an `onnx.ModelProto`, in place of what was there."""
    kept = [prop for prop in model.metadata_props if prop.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=KEY, value=metadata_json(info))


def write_openvino_metadata(model: Any, info: ExportInfo) -> None:
    """Add the metadata to an `openvino.Model`."""
    model.set_rt_info(metadata_json(info), [KEY])


def write_sidecar(path: str | Path, info: ExportInfo) -> Path:
    """Write `<stem>.json` beside a file that cannot hold it; returns its path."""
    sidecar = Path(path).with_suffix('.json')
    sidecar.write_text(metadata_json(info))
    return sidecar

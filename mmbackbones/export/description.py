"""What a file that is about to be written will say about itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmbackbones.inference.metadata import ExportInfo, ModelInfo, Slide

__all__ = ['describe', 'published_licence', 'resize_mode', 'slide_of']

_LICENCES = {
    'HGNetV2': 'Apache-2.0',
    'HGNetV2Lite': 'Apache-2.0',
    'ResNetVD': 'Apache-2.0',
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
    step = _resize_step(pipeline)
    return 'keep_ratio_pad' if step.get('keep_ratio', False) else 'stretch'


def slide_of(
    model: nn.Module,
    pipeline: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
) -> Slide | None:
    """The windows that a segmentor is tested with, or None.

    Args:
        model: a detector or a segmentor.
        pipeline: `test_dataloader.dataset.pipeline` of its config.
        size_hw: of the input that is exported.

    Raises:
        ValueError: the input is not as large as the windows.
    """
    test_cfg = getattr(model, 'test_cfg', None) or {}
    if not hasattr(model, 'decode_head') or test_cfg.get('mode') != 'slide':
        return None
    crop_hw = tuple(test_cfg['crop_size'])
    if crop_hw != tuple(size_hw):
        raise ValueError(
            f'size is {tuple(size_hw)}, but model.test_cfg slides windows of '
            f'{crop_hw}; change its crop_size and stride, too, or export for whole '
            'images: --cfg-options model.test_cfg.mode=whole'
        )
    scale = _resize_step(pipeline).get('scale')
    return Slide(
        stride_hw=tuple(test_cfg['stride']),
        scale_wh=None if scale is None else tuple(scale),
        align_corners=model.decode_head.align_corners,
    )


def _resize_step(pipeline: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for step in pipeline:
        kind = step['type']
        name = kind if isinstance(kind, str) else kind.__name__
        if name.rpartition('.')[2] == 'Resize':
            return step
    return {}


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
    slide: Slide | None = None,
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
        resize: as `ExportInfo` has it.
        slide: of `slide_of`.
    """
    meta = dataset_meta or dict(classes=())
    return ExportInfo(
        **vars(ModelInfo.from_dataset_meta(task, meta)),
        input_size_hw=tuple(map(int, input_size_hw)),
        dynamic_batch=dynamic_batch,
        resize='keep_ratio' if slide and resize == 'keep_ratio_pad' else resize,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        licence=licence,
        slide=slide,
    )

"""What is asked of an export, and whether it goes together."""

from dataclasses import dataclass

from mmengine.config import Config

from mmbackbones.apis.config import is_segmentor
from mmbackbones.export.files import SUFFIXES, named, need_packages

__all__ = ['TOLERANCES', 'ExportOptions', 'check_options', 'default_size']

TOLERANCES = {'fp32': 1e-3, 'fp16': 2e-2, 'int8': None}
"""Of differences, by precision."""

_COARSEST_STRIDE = 32  # of a detector's maps, which are enlarged twofold each


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user wants; `tools/export.py` has a line on each.

    Attributes:
        format: a key of `mmbackbones.export.files.SUFFIXES`.
        precision: 'fp32', 'fp16' or 'int8'.
        out: file to write, of Triton the folder of the repository, or None.
        size_hw: height and width of the input, None for the config's.
        batch_size: of a fixed batch.
        dynamic_batch: take any number of images.
        backbone: export the bare backbone.
        sampling: 'grid_sample' or 'gather'.
        images: file, folder or pattern, to compare and to calibrate with.
        num_images: of `images`.
        tolerance: of differences; None for the precision's own.
        evaluate: whether to evaluate both sides on the test set.
        max_images: of the test set.
        licence: of the weights.
    """

    format: str = 'onnx'
    precision: str = 'fp32'
    out: str | None = None
    size_hw: tuple[int, int] | None = None
    batch_size: int = 1
    dynamic_batch: bool = False
    backbone: bool = False
    sampling: str = 'grid_sample'
    images: str | None = None
    num_images: int = 16
    tolerance: float | None = None
    evaluate: bool = False
    max_images: int | None = None
    licence: str | None = None


def default_size(cfg: Config) -> tuple[int, int]:
    """Height and width that a config tests at; of a segmentor, its crop.

    Raises:
        ValueError: the config does not say.
    """
    for crop in (
        (cfg.model.get('test_cfg') or {}).get('crop_size'),
        (cfg.model.get('data_preprocessor') or {}).get('size'),
    ):
        if crop is not None:
            return tuple(crop)
    for step in cfg.test_dataloader.dataset.pipeline:
        scale = step.get('scale')
        if scale is not None:
            return scale[1], scale[0]
    raise ValueError('the config states no input size; give --size H W')


def check_options(cfg: Config, options: ExportOptions) -> None:
    """See that options go together, before anything is loaded.

    Raises:
        ValueError: they do not, or a package is missing.
    """
    if options.format not in SUFFIXES:
        raise ValueError(
            f'format is {options.format!r}; choose from {", ".join(SUFFIXES)}'
        )
    if options.precision not in TOLERANCES:
        raise ValueError(
            f'precision is {options.precision!r}; choose from {", ".join(TOLERANCES)}'
        )
    step = 1 if options.backbone or is_segmentor(cfg) else _COARSEST_STRIDE
    if options.size_hw and any(side < 1 or side % step for side in options.size_hw):
        raise ValueError(
            f'size is {options.size_hw}; give height and width in pixels'
            + (f', multiples of {step}' if step > 1 else '')
        )
    for name in ('batch_size', 'num_images'):
        if getattr(options, name) < 1:
            raise ValueError(f'{name} is {getattr(options, name)}; give 1 or more')
    if options.precision == 'int8' and options.format != 'openvino':
        raise ValueError(
            f'precision int8 is made by OpenVINO; format is {options.format!r}'
        )
    if options.precision != 'fp32' and options.format in ('torch_export', 'executorch'):
        raise ValueError(
            f'format {options.format} is written in fp32; precision is '
            f'{options.precision!r}'
        )
    if options.precision != 'fp32' and options.images is None:
        raise ValueError(f'precision {options.precision} is calibrated: give --images')
    if options.format == 'executorch' and options.dynamic_batch:
        raise ValueError('format executorch takes a fixed batch; leave --dynamic-batch')
    if options.evaluate and options.backbone:
        raise ValueError('a bare backbone predicts nothing that could be evaluated')
    if options.out is not None:
        named(options.out, options.format)
    need_packages(options.format, options.precision)

"""From a config and a checkpoint to a file for another runtime, and a report on it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config
from torch import nn

from mmbackbones.apis.config import is_segmentor, prepare
from mmbackbones.apis.detection import build_detector
from mmbackbones.export.description import (
    describe,
    published_licence,
    resize_mode,
    slide_of,
)
from mmbackbones.export.files import (
    SUFFIXES,
    named,
    need_packages,
    open_file,
    write_file,
)
from mmbackbones.export.graph import BackboneGraph, build_graph
from mmbackbones.export.programs import export_program
from mmbackbones.export.report import (
    Report,
    compare_sides,
    evaluate,
    evaluate_file,
    load_images,
    measure_latency,
)
from mmbackbones.export.runners import GraphRunner
from mmbackbones.export.windows import WindowGraph
from mmbackbones.inference.backends import TorchBackend
from mmbackbones.inference.metadata import ExportInfo, ModelInfo, Slide
from mmbackbones.inference.sources import find_images
from mmbackbones.layers.fold import fold_for_inference, pad_channels

__all__ = ['ExportOptions', 'default_size', 'export_model']

_COARSEST_STRIDE = 32  # of a detector's maps, which are enlarged twofold each
_OTHER_BATCH = 3  # images that a dynamic batch has to take beside one
_TOLERANCES = {'fp32': 1e-3, 'fp16': 2e-2, 'int8': None}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user wants; `tools/export.py` has a line on each.

    Attributes:
        format: a key of `mmbackbones.export.files.SUFFIXES`.
        precision: 'fp32', 'fp16' or 'int8'.
        out: file to write, or None.
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


def export_model(
    cfg: Config, name: str, checkpoint: str, options: ExportOptions
) -> Report:
    """Write a file and its report.

    Args:
        cfg: from `load_config`.
        name: path of the config; its stem names the file.
        checkpoint: ours, or an official release.
        options: what to write.

    Returns:
        The report, which is also saved beside the file.

    Raises:
        ValueError: options that do not go together, a missing package, or a model
            that cannot be exported.
    """
    _check(cfg, options)
    model = _build(cfg, checkpoint, options.evaluate)
    size_hw = options.size_hw or default_size(cfg)
    slide = _slide(cfg, model, size_hw, options)
    reference = _graph(model, slide, options)
    info = _describe(cfg, model, reference, size_hw, slide, options)
    path = named(options.out or Path(cfg.work_dir, Path(name).stem), options.format)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = _find(options)
    batch_size = 1 if options.dynamic_batch else options.batch_size

    folded = fold_for_inference(copy.deepcopy(model), channels_last=False)
    pad_channels(folded)
    graph = _graph(folded, slide, options)
    program = export_program(
        graph,
        size_hw=size_hw,
        batch_size=batch_size,
        dynamic_batch=options.dynamic_batch,
        sampling=options.sampling,
    )
    notes = write_file(
        program,
        path,
        info,
        graph.output_names,
        format=options.format,
        precision=options.precision,
        batches=lambda: load_images(paths, info, batch_size),
    )
    report = Report(
        file=str(path),
        format=options.format,
        precision=options.precision,
        runtime='none',
        tolerance=_TOLERANCES[options.precision]
        if options.tolerance is None
        else options.tolerance,
        notes=notes,
    )
    _compare(report, cfg, model, reference, info, paths, options)
    report.save()
    return report


def _check(cfg: Config, options: ExportOptions) -> None:
    if options.format not in SUFFIXES:
        raise ValueError(
            f'format is {options.format!r}; choose from {", ".join(SUFFIXES)}'
        )
    if options.precision not in _TOLERANCES:
        raise ValueError(
            f'precision is {options.precision!r}; choose from {", ".join(_TOLERANCES)}'
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


def _build(cfg: Config, checkpoint: str, evaluate: bool) -> nn.Module:
    if evaluate:  # else no data set is needed: the checkpoint knows its classes
        prepare(cfg, training=False)
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import build_segmentor

        return build_segmentor(cfg, checkpoint, 'cpu')
    return build_detector(cfg, checkpoint, 'cpu')


def _slide(
    cfg: Config, model: nn.Module, size_hw: tuple[int, int], options: ExportOptions
) -> Slide | None:
    if options.backbone:
        return None
    return slide_of(model, cfg.test_dataloader.dataset.pipeline, size_hw)


def _graph(model: nn.Module, slide: Slide | None, options: ExportOptions) -> nn.Module:
    if options.backbone:
        return BackboneGraph(model.backbone, model.data_preprocessor).eval()
    return build_graph(model) if slide is None else WindowGraph(model).eval()


def _describe(
    cfg: Config,
    model: nn.Module,
    graph: nn.Module,
    size_hw: tuple[int, int],
    slide: Slide | None,
    options: ExportOptions,
) -> ExportInfo:
    return describe(
        graph.task,
        input_size_hw=size_hw,
        dynamic_batch=options.dynamic_batch,
        mean=graph.normalise.mean_rgb,
        std=graph.normalise.std_rgb,
        licence=options.licence or published_licence(model.backbone),
        dataset_meta=None if options.backbone else model.dataset_meta,
        resize=resize_mode(cfg.test_dataloader.dataset.pipeline),
        slide=slide,
    )


def _find(options: ExportOptions) -> list[str]:
    if options.images is None:
        return []
    return find_images(options.images)[: options.num_images]


def _compare(
    report: Report,
    cfg: Config,
    model: nn.Module,
    reference: nn.Module,
    info: ExportInfo,
    paths: list[str],
    options: ExportOptions,
) -> None:
    """Fill the report."""
    batch_size = 1 if options.dynamic_batch else options.batch_size
    exported = open_file(
        report.file, options.format, reference.output_names, info, batch_size
    )
    report.runtime = exported.name
    if not paths:
        report.notes.append('compared on noise: give --images to compare on pictures')
    ours = GraphRunner(reference)
    first = next(load_images(paths, info, batch_size))
    report.differences = compare_sides(
        ours, exported, _batches(paths, info, batch_size), info
    )
    report.latency_ms = measure_latency(
        {'pytorch': ours, exported.name: exported}, first
    )
    if options.evaluate:
        model_info = ModelInfo.from_dataset_meta(info.task, model.dataset_meta)
        pipeline = cfg.test_dataloader.dataset.pipeline
        backend = TorchBackend(model, pipeline, model_info)
        key, value = evaluate(cfg, backend, max_images=options.max_images)
        _, other = evaluate_file(cfg, exported, info, max_images=options.max_images)
        report.accuracy = {
            'metric': key,
            'pytorch': round(value, 4),
            exported.name: round(other, 4),
            'lost': round(value - other, 4) + 0.0,  # no -0.0
        }


def _batches(
    paths: list[str], info: ExportInfo, batch_size: int
) -> Iterator[np.ndarray]:
    """Images as the file takes them; a dynamic batch takes three at once, too."""
    yield from load_images(paths, info, batch_size)
    if info.dynamic_batch:
        yield from load_images(paths[:_OTHER_BATCH], info, _OTHER_BATCH)

"""From a config and a checkpoint to a file for another runtime, and a report on it."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.config import Config
from torch import nn

from mmbackbones.apis.config import is_segmentor, prepare
from mmbackbones.apis.detection import build_detector
from mmbackbones.apis.export_options import (
    TOLERANCES,
    ExportOptions,
    check_options,
    default_size,
)
from mmbackbones.apis.named_files import check_checkpoint
from mmbackbones.export.description import (
    describe,
    published_licence,
    resize_mode,
    slide_of,
)
from mmbackbones.export.files import named, open_file, write_file
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
from mmbackbones.export.triton import place_in_repository
from mmbackbones.export.windows import WindowGraph
from mmbackbones.inference.backends import TorchBackend
from mmbackbones.inference.metadata import ExportInfo, ModelInfo, Slide
from mmbackbones.inference.sources import find_images
from mmbackbones.layers.fold import fold_for_inference, pad_channels

__all__ = ['export_model']

_OTHER_BATCH = 3  # images that a dynamic batch has to take beside one
_FEW_IMAGES = 32  # fewer to calibrate with say little of what will come


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
    check_options(cfg, options)
    check_checkpoint(checkpoint)
    model = _build(cfg, checkpoint, options.evaluate)
    size_hw = options.size_hw or default_size(cfg)
    slide = _slide(cfg, model, size_hw, options)
    reference = _graph(model, slide, options)
    info = _describe(cfg, model, reference, size_hw, slide, options)
    path = _target(cfg, Path(name).stem, options)
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
        tolerance=TOLERANCES[options.precision]
        if options.tolerance is None
        else options.tolerance,
        notes=notes,
    )
    if options.precision == 'int8' and len(paths) < _FEW_IMAGES:
        report.notes.append(_few_images(len(paths), options))
    _compare(report, cfg, model, reference, info, paths, options)
    report.save()
    return report


def _few_images(count: int, options: ExportOptions) -> str:
    advice = '' if options.evaluate else ', and --evaluate to see what is lost'
    return (
        f'calibrated on {count} images only: take {_FEW_IMAGES} or more, some hundreds '
        f'are usual (--num-images){advice}'
    )


def _build(cfg: Config, checkpoint: str, evaluate: bool) -> nn.Module:
    if evaluate:  # else no data set is needed: the checkpoint knows its classes
        prepare(cfg, training=False)
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import build_segmentor

        return build_segmentor(cfg, checkpoint, 'cpu')
    return build_detector(cfg, checkpoint, 'cpu')


def _target(cfg: Config, stem: str, options: ExportOptions) -> Path:
    """The file to write."""
    if options.format == 'triton':
        repository = Path(options.out or Path(cfg.work_dir, 'repository'))
        return place_in_repository(repository, stem)
    return named(options.out or Path(cfg.work_dir, stem), options.format)


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

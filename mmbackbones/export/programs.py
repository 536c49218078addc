"""`torch.export` of a graph: what every format but TorchScript starts from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmbackbones.backbones.hgnetv2 import HGStem
from mmbackbones.inference.metadata import KEY, ExportInfo, metadata_json
from mmbackbones.layers.conv import ConvBNAct
from mmbackbones.layers.fold import Bound
from mmbackbones.ops.grid_sample import grid_sample_by_gather

__all__ = ['SAMPLINGS', 'export_program', 'save_program']

SAMPLINGS = ('grid_sample', 'gather')
"""How points of maps are read: the runtime's GridSample, or elementary operations."""

_TINY = -1e-30


def export_program(
    graph: nn.Module,
    *,
    size_hw: tuple[int, int],
    batch_size: int = 1,
    dynamic_batch: bool = False,
    sampling: str = 'grid_sample',
) -> ExportedProgram:
    """Trace a graph.

    Args:
        graph: of `build_graph`, in evaluation mode.
        size_hw: height and width of the input in pixels.
        batch_size: of a fixed batch.
        dynamic_batch: take any number of images instead.
        sampling: one of `SAMPLINGS`.

    Raises:
        ValueError: `sampling` is no choice, or a size is not positive.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f'sampling is {sampling!r}; choose from {SAMPLINGS}')
    if min(*size_hw, batch_size) < 1:
        raise ValueError(
            f'size is {size_hw} and batch_size {batch_size}; give positive numbers'
        )
    # A batch of 1 would be taken for a constant.
    images = torch.rand(2 if dynamic_batch else batch_size, 3, *size_hw)
    shapes = {'images': {0: Dim('batch')}} if dynamic_batch else None
    with torch.no_grad(), _constant_positions(graph, images), _kept_padding(graph):
        program = torch.export.export(
            graph, (images,), dynamic_shapes=shapes, strict=dynamic_batch
        )
    rewritten = {torch.ops.aten.floor_divide.default: _truncated_division}
    if sampling == 'gather':
        rewritten[torch.ops.aten.grid_sampler.default] = _by_gather
        rewritten[torch.ops.aten.grid_sampler_2d.default] = _by_gather
    return program.run_decompositions(rewritten)


def _truncated_division(x: Tensor, divisor: Tensor | int) -> Tensor:
    """The quotient of indices, which are never negative.

    For the negative ones ONNX needs a comparison of booleans, which TensorRT 10 lacks.
    """
    return torch.div(x, divisor, rounding_mode='trunc')


def _by_gather(
    maps: Tensor, grid: Tensor, mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    if (mode, padding_mode, align_corners) != (0, 0, False):
        raise ValueError(
            f'sampling gather stands for bilinear sampling with zeros outside; the '
            f'model has mode {mode}, padding {padding_mode}, align_corners '
            f'{align_corners}'
        )
    return grid_sample_by_gather(maps, grid)


@contextlib.contextmanager
def _kept_padding(graph: nn.Module) -> Iterator[None]:
    """Within it, the stem of HGNetV2 pools over a zero that no runtime optimises.

    ONNX Runtime (1.31, Pad_Fusion) moves a padding with zeros into a max-pooling, whose
    own padding is minus infinity. That is the same for maps without negative values,
    and is wrong behind a learnable affine with a negative bias.
    """
    stems = [
        module
        for module in graph.modules()
        if isinstance(module, HGStem)
        and module.pool_pad == 0
        and not _is_nonnegative(module.stem1)
    ]
    for stem in stems:
        stem.pool_pad = _TINY
    try:
        yield
    finally:
        for stem in stems:
            stem.pool_pad = 0.0


def _is_nonnegative(block: ConvBNAct) -> bool:
    if isinstance(block.act, Bound):
        return block.act.value >= 0 and not block.act.is_upper
    return isinstance(block.act, nn.ReLU) and isinstance(block.lab, nn.Identity)


@contextlib.contextmanager
def _constant_positions(graph: nn.Module, images: Tensor) -> Iterator[None]:
    """Within it, resampled position tables of Hiera are constants.

    They depend on the size of the image alone, which an exported graph fixes; bicubic
    resampling is what runtimes support least.

    Args:
        graph: with or without such a backbone.
        images: of the size that is exported.
    """
    found: list[tuple[nn.Module, Tensor]] = []
    for module in graph.modules():
        if hasattr(module, '_position_table'):
            found.append((module, _record_table(module, graph, images)))
    try:
        for module, table in found:
            module.register_buffer('constant_position_table', table, persistent=False)
            module._position_table = lambda grid, m=module: m.constant_position_table
        yield
    finally:
        for module, _ in found:
            del module._position_table, module.constant_position_table


def _record_table(module: nn.Module, graph: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    compute = module._position_table

    def record(grid: tuple[int, ...]) -> Tensor:
        seen.append(compute(grid))
        return seen[-1]

    module._position_table = record
    try:
        with torch.no_grad():
            graph(images[:1])
    finally:
        del module._position_table
    return seen[-1].contiguous()


def save_program(program: ExportedProgram, path: str | Path, info: ExportInfo) -> None:
    """Write a `.pt2` that `torch.export.load` reads, metadata inside."""
    torch.export.save(program, path, extra_files={KEY: metadata_json(info)})

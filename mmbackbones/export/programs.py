"""`torch.export` of a graph, what every format starts from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from mmbackbones.inference.metadata import KEY, ExportInfo, metadata_json
from mmbackbones.layers.hg_stem import HGStem, StemPool
from mmbackbones.ops.grid_sample import grid_sample_by_gather

__all__ = ['SAMPLINGS', 'export_program', 'save_program']

SAMPLINGS = ('grid_sample', 'gather')
"""How points of maps are read: the runtime's GridSample, or elementary operations."""


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
    with torch.no_grad(), _constant_positions(graph, images), _convolved_padding(graph):
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


class _ConvolvedPadding(StemPool):
    """Pads by a depthwise convolution with ones, and pools.

    Runtimes convolve and pool in memory of their own layout, which a padding of its
    own would have to leave and enter again. And it keeps the zeros: ONNX Runtime (1.31,
    Pad_Fusion) moves a padding into the max-pooling behind it, whose own padding is
    minus infinity, which is another result for maps with negative values.
    """

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        # Not the `padded` of the other convolution: only what has one reader is fused.
        ones = x.new_ones(x.shape[1], 1, 1, 1)
        padded = F.conv2d(F.pad(x, (0, 1, 0, 1), value=-0.0), ones, groups=x.shape[1])
        return F.max_pool2d(padded, kernel_size=2, stride=1)


@contextlib.contextmanager
def _convolved_padding(graph: nn.Module) -> Iterator[None]:
    """Within it, the stem of HGNetV2 pools over zeros that a convolution adds."""
    stems = [
        module
        for module in graph.modules()
        if isinstance(module, HGStem) and module.pool.edge == 0
    ]
    pools = [stem.pool for stem in stems]
    for stem in stems:
        stem.pool = _ConvolvedPadding()
    try:
        yield
    finally:
        for stem, pool in zip(stems, pools, strict=True):
            stem.pool = pool


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
    """Write a `.pt2` that `torch.export.load` reads, metadata inside.

    What line of the source each node comes from is dropped: it names folders.
    """
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop('stack_trace', None)
    torch.export.save(program, path, extra_files={KEY: metadata_json(info)})

"""Formats: which file each has, how it is written and opened."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch.export import ExportedProgram

from mmbackbones.export.executorch_file import need_executorch, save_executorch
from mmbackbones.export.onnx_file import need, save_onnx
from mmbackbones.export.openvino_file import save_openvino
from mmbackbones.export.precision import quantise_openvino, to_half
from mmbackbones.export.programs import save_program
from mmbackbones.export.runners import (
    ExecuTorchRunner,
    OnnxRunner,
    OpenVinoRunner,
    ProgramRunner,
)
from mmbackbones.export.tensorrt_check import check_for_tensorrt
from mmbackbones.export.triton import write_config
from mmbackbones.inference.exported import Session
from mmbackbones.inference.metadata import ExportInfo, write_sidecar

__all__ = ['SUFFIXES', 'named', 'need_packages', 'open_file', 'write_file']

SUFFIXES = {
    'onnx': '.onnx',
    'openvino': '.xml',
    'torch_export': '.pt2',
    'tensorrt': '.onnx',
    'executorch': '.pte',
    'triton': '',
}
"""Of what a format writes: TensorRT takes the ONNX file, Triton a folder."""

_ONNX = ('onnx', 'onnxscript', 'onnxruntime')
_PACKAGES = {
    'onnx': _ONNX,
    'openvino': (*_ONNX, 'openvino'),
    'tensorrt': _ONNX,
    'triton': _ONNX,
}

Batches = Callable[[], Iterator[np.ndarray]]


def named(path: str | Path, format: str) -> Path:
    """A path with the suffix of a format, if any, which is added where it is missing.

    What follows another dot is part of the name: `v1.2`.

    Raises:
        ValueError: the path has the suffix of another format.
    """
    suffix, given = SUFFIXES[format], Path(path).suffix
    if given == suffix:
        return Path(path)
    if given in {*SUFFIXES.values(), '.bin', '.engine'} - {''}:
        raise ValueError(
            f'out is {str(path)!r}, but format {format} writes {suffix or "a folder"}'
        )
    return Path(f'{path}{suffix}')


def need_packages(format: str, precision: str) -> None:
    """Import what a format is written and run with: sooner than a model is traced.

    Raises:
        ValueError: a package is not installed.
    """
    for package in _PACKAGES.get(format, ()):
        need(package, f'format {format}')
    if precision == 'int8':
        need('nncf', 'precision int8')
    if format == 'executorch':
        need_executorch('executorch.exir')


def write_file(
    program: ExportedProgram,
    path: Path,
    info: ExportInfo,
    output_names: tuple[str, ...],
    *,
    format: str,
    precision: str,
    batches: Batches,
) -> list[str]:
    """Write one file.

    Args:
        program: of `export_program`.
        path: to write.
        info: metadata.
        output_names: of the graph.
        format: key of `SUFFIXES`.
        precision: 'fp32', 'fp16', or for OpenVINO 'int8'.
        batches: gives images to calibrate with.

    Returns:
        Lines for the report.
    """
    if format == 'torch_export':
        save_program(program, path, info)
        return []
    if format == 'executorch':
        notes = save_executorch(program, path)
        write_sidecar(path, info)
        return notes
    if format == 'openvino':
        # Not beside the file: an ONNX file of the same model may be there.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            onnx_path = Path(folder, 'model.onnx')
            notes = _write_onnx(
                program, onnx_path, info, output_names, precision, batches
            )
            save_openvino(onnx_path, path, info)
        if precision == 'int8':
            notes += quantise_openvino(path, info, batches())
        return notes
    notes = _write_onnx(program, path, info, output_names, precision, batches)
    if format == 'tensorrt':
        write_sidecar(path.with_suffix('.engine'), info)
        notes += check_for_tensorrt(path, info)
    if format == 'triton':
        notes.append(f'for Triton: {write_config(path, info)}')
    return notes


def _write_onnx(
    program: ExportedProgram,
    path: Path,
    info: ExportInfo,
    output_names: tuple[str, ...],
    precision: str,
    batches: Batches,
) -> list[str]:
    save_onnx(program, path, info, output_names)
    return to_half(path, batches()) if precision == 'fp16' else []


def open_file(
    path: str | Path,
    format: str,
    output_names: tuple[str, ...],
    info: ExportInfo,
    batch_size: int,
) -> Session:
    """The file in its runtime; for TensorRT, the ONNX file in ONNX Runtime."""
    fixed = None if info.dynamic_batch else batch_size
    if format == 'torch_export':
        return ProgramRunner(path, output_names, fixed)
    if format == 'executorch':
        return ExecuTorchRunner(path, output_names, batch_size)
    return OpenVinoRunner(path) if format == 'openvino' else OnnxRunner(path)

"""ONNX files: made, cleaned, checked, described.

Constants are folded for the fixed input size, so that anchors, positions and shapes
are numbers in the file. What is left are standard operators.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch.export import ExportedProgram

from mmbackbones.inference.metadata import ExportInfo, write_onnx_metadata

__all__ = ['OPSET', 'need', 'save_onnx']

OPSET = 18
"""Of ONNX: what ONNX Runtime, OpenVINO and TensorRT 10 all read."""

_FOLDED_BYTES = 64 << 20


def need(package: str, why: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ValueError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{why} needs {package}: pip install "mmbackbones[export]"'
        ) from error


def save_onnx(
    program: ExportedProgram,
    path: str | Path,
    info: ExportInfo,
    output_names: tuple[str, ...],
) -> None:
    """Write one file, weights inside.

    Args:
        program: of `export_program`.
        path: to write.
        info: metadata.
        output_names: of the graph.

    Raises:
        ValueError: onnx or onnxscript are missing; the result is no valid model.
    """
    onnx = need('onnx', 'an ONNX file')
    need('onnxscript', 'an ONNX file')
    with torch.no_grad(), _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=['images'],
            output_names=list(output_names),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        _fold(exported.model)
    model = exported.model_proto
    _sum_before_norms(model.graph)
    _name_batch(model, info)
    for value in model.graph.node:
        # Where in the source each node came from: of no use outside, and large.
        del value.metadata_props[:]
    del model.graph.value_info[:]
    write_onnx_metadata(model, info)
    onnx.checker.check_model(model, full_check=True)
    custom = sorted({node.domain for node in model.graph.node} - {'', 'ai.onnx'})
    if custom or model.functions:
        raise ValueError(f'the graph has operators of other domains: {custom}')
    onnx.save(model, str(path))


def _fold(model: object) -> None:
    """Fold constants as large as anchors and position tables are."""
    from onnxscript import optimizer

    for _ in range(2):  # what the first pass simplified, the second can fold
        optimizer.optimize_ir(
            model, input_size_limit=_FOLDED_BYTES, output_size_limit=_FOLDED_BYTES
        )


def _sum_before_norms(graph: object) -> None:
    """Write the residual sum before a layer norm as `Sum`, which is the same as `Add`.

    ONNX Runtime (1.31, SkipLayerNormalization) merges `Add` and norm into an operator
    that takes longer than both of them.
    """
    constants = {value.name for value in graph.initializer}
    normalised = {
        node.input[0] for node in graph.node if node.op_type == 'LayerNormalization'
    }
    for node in graph.node:
        if node.op_type == 'Add' and node.output[0] in normalised:
            if constants.isdisjoint(node.input):  # a bias belongs to its product
                node.op_type = 'Sum'


def _name_batch(model: object, info: ExportInfo) -> None:
    """Call a dynamic first dimension `batch` everywhere it is visible."""
    if not info.dynamic_batch:
        return
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        first.dim_param = 'batch'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about optional parts of itself."""
    names = ('torch.onnx', 'onnxscript', 'onnx_ir')
    levels = [
        (logging.getLogger(name), logging.getLogger(name).level) for name in names
    ]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)

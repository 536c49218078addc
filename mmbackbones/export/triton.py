"""A model repository for NVIDIA's Triton Inference Server.

https://docs.nvidia.com/deeplearning/triton-inference-server, model configuration.
"""

import shutil
from pathlib import Path

import numpy as np

from mmbackbones.inference.metadata import ExportInfo

__all__ = ['write_repository']

_TYPES = {np.float32: 'TYPE_FP32', np.int64: 'TYPE_INT64', np.int32: 'TYPE_INT32'}


def write_repository(
    onnx_path: Path, folder: Path, info: ExportInfo, *, max_batch_size: int = 16
) -> Path:
    """Write `<folder>/<stem>/config.pbtxt` and `<folder>/<stem>/1/model.onnx`.

    Args:
        onnx_path: an exported file.
        folder: the repository, which may hold other models.
        info: of the file.
        max_batch_size: of Triton's batches, where the batch is dynamic.

    Returns:
        The folder of the model.

    Raises:
        ValueError: the onnx package is missing, or a tensor's type is not known.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ValueError('this needs onnx: pip install onnx') from error
    graph = onnx.load(str(onnx_path), load_external_data=False).graph
    batch = max_batch_size if info.dynamic_batch else 0
    lines = [
        f'name: "{onnx_path.stem}"',
        'platform: "onnxruntime_onnx"',
        f'max_batch_size: {batch}',
    ]
    for kind, values in (('input', graph.input), ('output', graph.output)):
        entries = [_tensor(value, info.dynamic_batch, onnx) for value in values]
        lines.append(f'{kind} [\n  ' + ',\n  '.join(entries) + '\n]')
    if batch:
        lines.append('dynamic_batching { max_queue_delay_microseconds: 5000 }')
    model = folder / onnx_path.stem
    version = model / '1'
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(onnx_path, version / 'model.onnx')
    (model / 'config.pbtxt').write_text('\n'.join(lines) + '\n')
    return model


def _tensor(value: object, dynamic_batch: bool, onnx: object) -> str:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).type
    if dtype not in _TYPES:
        raise ValueError(f'{value.name} is of type {dtype.__name__}; Triton gets none')
    dims = [d.dim_value if d.HasField('dim_value') else -1 for d in kind.shape.dim]
    if dynamic_batch:
        dims = dims[1:]  # Triton adds it
    shape = ', '.join(map(str, dims))
    return f'{{ name: "{value.name}" data_type: {_TYPES[dtype]} dims: [{shape}] }}'

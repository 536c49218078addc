"""A model in a repository of NVIDIA's Triton Inference Server.

`<repository>/<name>/1/model.onnx` and, beside the version, `config.pbtxt`.

https://docs.nvidia.com/deeplearning/triton-inference-server, model configuration.
"""

from pathlib import Path

import numpy as np

from mmbackbones.inference.metadata import ExportInfo

__all__ = ['place_in_repository', 'write_config']

_TYPES = {np.float32: 'TYPE_FP32', np.int64: 'TYPE_INT64', np.int32: 'TYPE_INT32'}


def place_in_repository(repository: Path, name: str) -> Path:
    """Where the ONNX file of a model lies; other models may be beside it."""
    return repository / name / '1' / 'model.onnx'


def write_config(
    onnx_path: Path, info: ExportInfo, *, max_batch_size: int = 16
) -> Path:
    """Write `config.pbtxt` of an ONNX file that lies in a repository.

    Args:
        onnx_path: of `place_in_repository`.
        info: of the file.
        max_batch_size: of Triton's batches, where the batch is dynamic.

    Returns:
        The path of the config.

    Raises:
        ValueError: the onnx package is missing, or a tensor's type is not known.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ValueError('this needs onnx: pip install onnx') from error
    graph = onnx.load(str(onnx_path), load_external_data=False).graph
    model = onnx_path.parents[1]
    batch = max_batch_size if info.dynamic_batch else 0
    lines = [
        f'name: "{model.name}"',
        'platform: "onnxruntime_onnx"',
        f'max_batch_size: {batch}',
    ]
    for kind, values in (('input', graph.input), ('output', graph.output)):
        entries = [_tensor(value, info.dynamic_batch, onnx) for value in values]
        lines.append(f'{kind} [\n  ' + ',\n  '.join(entries) + '\n]')
    if batch:
        lines.append('dynamic_batching { max_queue_delay_microseconds: 5000 }')
    config = model / 'config.pbtxt'
    config.write_text('\n'.join(lines) + '\n')
    return config


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

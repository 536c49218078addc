"""The Open Inference Protocol, version 2, over HTTP: tensors in and out.

https://github.com/kserve/open-inference-protocol (Apache-2.0), with the extension for
binary tensors that Triton and KServe share.

Legend: N images, K detections.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmbackbones.serving.limits import Limits, RequestError, decode_image

__all__ = ['InferRequest', 'model_metadata', 'parse_request', 'render_response']

_DTYPES = {
    'UINT8': np.uint8,
    'INT32': np.int32,
    'INT64': np.int64,
    'FP32': np.float32,
}
_DTYPE_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}

_OUTPUTS = {
    'detection': {
        'boxes': ('FP32', [-1, -1, 4]),
        'scores': ('FP32', [-1, -1]),
        'labels': ('INT64', [-1, -1]),
        'num_detections': ('INT32', [-1]),
    },
    'segmentation': {'labels': ('INT32', [-1, -1, -1])},
}


class InferRequest(NamedTuple):
    """What a client wants.

    Attributes:
        images: `(H, W, 3)` uint8 BGR each.
        conf: lowest score, or None.
        outputs: name to whether it is to be binary.
        id: of the request, or None.
    """

    images: list[np.ndarray]
    conf: float | None
    outputs: dict[str, bool]
    id: str | None


def model_metadata(name: str, task: str, platform: str) -> dict:
    """Answer to `GET v2/models/{name}`.

    `images` is one tensor of RGB pixels, or of encoded files with datatype BYTES and
    shape [N].
    """
    return dict(
        name=name,
        versions=['1'],
        platform=f'mmbackbones_{platform}',
        inputs=[dict(name='images', datatype='UINT8', shape=[-1, -1, -1, 3])],
        outputs=[
            dict(name=output, datatype=datatype, shape=shape)
            for output, (datatype, shape) in _OUTPUTS[task].items()
        ],
    )


def parse_request(
    body: bytes, headers: Mapping[str, str], task: str, limits: Limits
) -> InferRequest:
    """Read and check a request; decodes images.

    Raises:
        RequestError: 400 with what is wrong, or as `decode_image`.
    """
    header_length = headers.get('inference-header-content-length')
    if header_length is not None and not header_length.isdigit():
        raise RequestError(400, 'Inference-Header-Content-Length is not a number')
    split = len(body) if header_length is None else int(header_length)
    try:
        request = json.loads(body[:split])
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f'the request is not JSON: {error}') from error
    if not isinstance(request, dict):
        raise RequestError(400, 'the request is not a JSON object')
    parameters = _mapping(request, 'parameters')
    return InferRequest(
        _images(request, body[split:], limits),
        _conf(parameters.get('conf')),
        _outputs(request, parameters, task),
        request.get('id'),
    )


def render_response(
    name: str, request: InferRequest, tensors: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer."""
    outputs, binary = [], []
    for output, is_binary in request.outputs.items():
        tensor = np.ascontiguousarray(tensors[output])
        entry: dict[str, Any] = dict(
            name=output, datatype=_DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape)
        )
        if is_binary:
            data = tensor.tobytes()
            entry['parameters'] = dict(binary_data_size=len(data))
            binary.append(data)
        else:
            entry['data'] = tensor.ravel().tolist()
        outputs.append(entry)
    answer = dict(model_name=name, model_version='1', outputs=outputs)
    if request.id is not None:
        answer['id'] = request.id
    header = json.dumps(answer).encode()
    if not binary:
        return header, {'Content-Type': 'application/json'}
    return b''.join([header, *binary]), {
        'Content-Type': 'application/octet-stream',
        'Inference-Header-Content-Length': str(len(header)),
    }


def _mapping(parent: Mapping, key: str) -> Mapping:
    value = parent.get(key) or {}
    if not isinstance(value, dict):
        raise RequestError(400, f'{key} is not a JSON object')
    return value


def _conf(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= 1):
        raise RequestError(400, f'conf is {value!r}; give a number between 0 and 1')
    return value


def _outputs(request: Mapping, parameters: Mapping, task: str) -> dict[str, bool]:
    known = _OUTPUTS[task]
    default = bool(parameters.get('binary_data_output', False))
    asked = request.get('outputs') or [dict(name=name) for name in known]
    if not isinstance(asked, list):
        raise RequestError(400, 'outputs is not a list')
    found = {}
    for output in asked:
        name = output.get('name') if isinstance(output, dict) else output
        if not isinstance(name, str) or name not in known:
            raise RequestError(
                400, f'there is no output {name!r}; choose from {", ".join(known)}'
            )
        found[name] = bool(_mapping(output, 'parameters').get('binary_data', default))
    return found


def _images(request: Mapping, binary: bytes, limits: Limits) -> list[np.ndarray]:
    inputs = request.get('inputs')
    if not (
        isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], dict)
    ):
        raise RequestError(400, "inputs must be a list of one tensor, 'images'")
    tensor = inputs[0]
    if tensor.get('name') != 'images':
        raise RequestError(
            400, f"there is no input {tensor.get('name')!r}; it is 'images'"
        )
    shape, datatype = _shape(tensor), tensor.get('datatype')
    size = _mapping(tensor, 'parameters').get('binary_data_size')
    if size is not None:
        if size != len(binary):
            raise RequestError(
                400,
                f'binary_data_size is {size!r}, but {len(binary)} bytes follow the '
                'JSON',
            )
    elif binary:
        raise RequestError(400, 'bytes follow the JSON, but no input is binary')
    if datatype == 'BYTES':
        return _encoded_images(tensor, shape, size, binary, limits)
    if datatype != 'UINT8':
        raise RequestError(
            400,
            f'images has datatype {datatype!r}; choose UINT8 (pixels, RGB) or BYTES '
            '(files)',
        )
    return _pixels(tensor, shape, size, binary, limits)


def _shape(tensor: Mapping) -> list[int]:
    shape = tensor.get('shape')
    whole = isinstance(shape, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape
    )
    if not whole:
        raise RequestError(
            400, f'shape is {shape!r}; give a list of positive whole numbers'
        )
    return shape


def _check_number(num_images: int, limits: Limits) -> None:
    if num_images > limits.max_images:
        raise RequestError(
            413, f'{num_images} images in one request; at most {limits.max_images}'
        )


def _encoded_images(
    tensor: Mapping,
    shape: Sequence[int],
    size: int | None,
    binary: bytes,
    limits: Limits,
) -> list[np.ndarray]:
    if len(shape) != 1 or size is None:
        raise RequestError(
            400, 'images of datatype BYTES is binary, of shape [number of files]'
        )
    _check_number(shape[0], limits)
    files, offset = [], 0
    while offset < len(binary) and len(files) <= shape[0]:
        length = int.from_bytes(binary[offset : offset + 4], 'little')
        if offset + 4 + length > len(binary):
            raise RequestError(400, 'a file is longer than the bytes that follow')
        files.append(binary[offset + 4 : offset + 4 + length])
        offset += 4 + length
    if len(files) != shape[0]:
        raise RequestError(
            400, f'shape is {list(shape)}, but there are {len(files)} files'
        )
    images, pixels = [], 0
    for data in files:
        images.append(decode_image(data, limits.max_pixels))
        pixels += images[-1].shape[0] * images[-1].shape[1]
        if pixels > limits.max_pixels:  # small files may hold many
            raise RequestError(
                413,
                f'the images of the request have more than {limits.max_pixels} pixels '
                'together; send fewer at once',
            )
    return images


def _pixels(
    tensor: Mapping,
    shape: Sequence[int],
    size: int | None,
    binary: bytes,
    limits: Limits,
) -> list[np.ndarray]:
    if len(shape) != 4 or shape[3] != 3:
        raise RequestError(
            400, f'images has shape {list(shape)}; give [images, height, width, 3]'
        )
    _check_number(shape[0], limits)
    if shape[1] * shape[2] > limits.max_pixels:
        raise RequestError(
            413,
            f'the image has {shape[2]} x {shape[1]} pixels; at most '
            f'{limits.max_pixels} are taken',
        )
    try:
        if size is None:
            pixels = np.asarray(tensor.get('data'))
            if pixels.dtype.kind not in 'iu' or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError('they are not whole numbers from 0 to 255')
            pixels = pixels.astype(np.uint8)
        else:
            pixels = np.frombuffer(binary, np.uint8)
        pixels = pixels.reshape(shape)
    except (ValueError, TypeError) as error:
        raise RequestError(
            400, f'the values of images do not fit shape {list(shape)}: {error}'
        ) from error
    return [np.ascontiguousarray(image[..., ::-1]) for image in pixels]

"""Runtimes of exported files: ONNX Runtime, OpenVINO, TensorRT, PyTorch's programs.

Each is imported when a file for it is opened.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mmbackbones.inference.exported import ExportedBackend, Session
from mmbackbones.inference.metadata import (
    KEY,
    ExportInfo,
    parse_metadata,
    read_openvino_metadata,
    read_sidecar,
)
from mmbackbones.inference.program_file import load_program

__all__ = ['SUFFIXES', 'open_exported', 'runtime_of']

SUFFIXES = {
    'onnxruntime': ('.onnx',),
    'openvino': ('.xml', '.onnx'),
    'tensorrt': ('.engine', '.plan'),
    'torch_export': ('.pt2',),
}
"""Files that a runtime reads."""


def runtime_of(path: str, wanted: str | None = None) -> str | None:
    """The runtime for a file, or None where it is no exported file.

    Args:
        path: of a file, by its suffix.
        wanted: a runtime that is asked for, 'pytorch' for none of them.

    Raises:
        ValueError: there is no such runtime, or it does not read such files.
    """
    if wanted is not None and wanted not in (*SUFFIXES, 'pytorch'):
        raise ValueError(
            f'backend is {wanted!r}; choose pytorch, {", ".join(SUFFIXES)}, or None'
        )
    suffix = Path(path).suffix.lower()
    able = [name for name, known in SUFFIXES.items() if suffix in known]
    if wanted is None:
        return able[0] if able else None
    if wanted == 'pytorch' and not able:
        return None
    if wanted not in able:
        raise ValueError(
            f'backend {wanted!r} does not read {path!r}; '
            + '; '.join(f'{name} reads {" ".join(s)}' for name, s in SUFFIXES.items())
            + '; pytorch takes a config and a checkpoint'
        )
    return wanted


def open_exported(path: str, runtime: str, device: str | None) -> ExportedBackend:
    """Load a file.

    Args:
        path: of the file.
        runtime: a key of `SUFFIXES`.
        device: 'cpu', 'cuda', 'cuda:1', or a name of OpenVINO's; None for the
            runtime's own choice.

    Raises:
        ValueError: no such file, the runtime is missing or refuses the file or the
            device, or the file lacks our metadata.
    """
    if not Path(path).is_file():
        raise ValueError(f'model file {path!r} does not exist')
    session, text = _OPENERS[runtime](path, device)
    info = parse_metadata(text, path)
    _check_input(session.input_shape, info, path)
    return ExportedBackend(session, info)


def _check_input(shape: tuple[int | None, ...], info: ExportInfo, path: str) -> None:
    """A file that was changed after its metadata were written says so at once."""
    stated = (None, 3, *info.input_size_hw)
    fits = len(shape) == 4 and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, stated, strict=True)
    )
    if not fits:
        taken = ', '.join('any' if side is None else str(side) for side in shape)
        height, width = info.input_size_hw
        raise ValueError(
            f'{path!r} takes images of shape ({taken}), but its metadata say '
            f'(any, 3, {height}, {width}); export the model anew'
        )


def _need(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f'this file needs {package}, which is not installed: pip install {package}'
        ) from error


class _OnnxRuntime:
    name = 'onnxruntime'

    def __init__(self, path: str, device: str | None) -> None:
        runtime = _need('onnxruntime')
        gpu = 'CUDAExecutionProvider'
        available = runtime.get_available_providers()
        if device is None:
            device = 'cuda' if gpu in available else 'cpu'
        kind, _, number = device.partition(':')
        if kind not in ('cpu', 'cuda') or (kind == 'cuda' and gpu not in available):
            raise ValueError(
                f'device is {device!r}; this onnxruntime offers '
                f'{", ".join(available)} (cuda needs onnxruntime-gpu)'
            )
        providers: list = ['CPUExecutionProvider']
        if kind == 'cuda':
            providers.insert(0, (gpu, dict(device_id=int(number or 0))))
        try:
            self.session = runtime.InferenceSession(path, providers=providers)
        except Exception as error:  # its exceptions share no other base
            raise ValueError(f'onnxruntime refuses {path!r}: {error}') from error
        taken = self.session.get_inputs()[0]
        self._input = taken.name
        self._dtype = np.float16 if 'float16' in taken.type else np.float32
        self._outputs = [output.name for output in self.session.get_outputs()]
        self.input_shape = tuple(
            side if isinstance(side, int) else None for side in taken.shape
        )
        self.fixed_batch = self.input_shape[0] if taken.shape else None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        feed = {self._input: images.astype(self._dtype, copy=False)}
        return dict(zip(self._outputs, self.session.run(None, feed), strict=True))


def _open_onnxruntime(path: str, device: str | None) -> tuple[Session, str | None]:
    session = _OnnxRuntime(path, device)
    return session, session.session.get_modelmeta().custom_metadata_map.get(KEY)


# Left alone, OpenVINO computes in bfloat16 or float16 where the processor can: scores
# of a float32 model were off by 0.05.
_AS_EXPORTED = {'EXECUTION_MODE_HINT': 'ACCURACY', 'PERFORMANCE_HINT': 'LATENCY'}


class _OpenVino:
    name = 'openvino'

    def __init__(self, path: str, device: str | None) -> None:
        core = _need('openvino').Core()
        device = (device or 'CPU').upper()
        try:
            self.model = core.read_model(path)
            self._compiled = core.compile_model(self.model, device, _AS_EXPORTED)
        except RuntimeError as error:
            raise ValueError(
                f'openvino refuses {path!r} on {device}: {error} (devices here: '
                f'{", ".join(core.available_devices)})'
            ) from error
        taken = self._compiled.input(0)
        self._dtype = taken.get_element_type().to_dtype()
        shape = taken.get_partial_shape()
        self.input_shape = tuple(
            side.get_length() if side.is_static else None for side in shape
        )
        self.fixed_batch = self.input_shape[0] if self.input_shape else None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        found = self._compiled([images.astype(self._dtype, copy=False)])
        return {output.get_any_name(): values for output, values in found.items()}


def _open_openvino(path: str, device: str | None) -> tuple[Session, str | None]:
    session = _OpenVino(path, device)
    return session, read_openvino_metadata(session.model)


class _TensorRt:
    """An engine of TensorRT 10, its inputs and outputs in tensors of PyTorch."""

    name = 'tensorrt'

    def __init__(self, path: str, device: str | None) -> None:
        trt = _need('tensorrt')
        if not torch.cuda.is_available():
            raise ValueError(f'{path!r} is a TensorRT engine; it needs a CUDA device')
        self._device = torch.device(device or 'cuda')
        with torch.cuda.device(self._device):
            runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
            self._engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
            if self._engine is None:
                raise ValueError(
                    f'TensorRT {trt.__version__} refuses {path!r}; an engine runs with '
                    'the version and on the kind of GPU that it was built with'
                )
            self._context = self._engine.create_execution_context()
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self._input = next(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self._outputs = [name for name in names if name != self._input]
        types = {n: trt.nptype(engine.get_tensor_dtype(n)) for n in names}
        self._dtypes = {n: getattr(torch, np.dtype(t).name) for n, t in types.items()}
        shape = self._engine.get_tensor_shape(self._input)
        self.input_shape = tuple(None if side < 0 else side for side in shape)
        self.fixed_batch = self.input_shape[0]

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.cuda.device(self._device):
            taken = torch.from_numpy(images).to(self._device, self._dtypes[self._input])
            self._context.set_input_shape(self._input, tuple(taken.shape))
            self._context.set_tensor_address(self._input, taken.data_ptr())
            given = {}
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                given[name] = torch.empty(
                    shape, dtype=self._dtypes[name], device=self._device
                )
                self._context.set_tensor_address(name, given[name].data_ptr())
            stream = torch.cuda.current_stream()
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(f'TensorRT failed on an input of {taken.shape}')
            stream.synchronize()
        return {name: values.cpu().numpy() for name, values in given.items()}


def _open_tensorrt(path: str, device: str | None) -> tuple[Session, str | None]:
    text = read_sidecar(path)  # before the engine, which takes its time
    return _TensorRt(path, device), text


class _Program:
    """A program of `torch.export`, on the device that it was written for."""

    name = 'torch_export'

    def __init__(self, path: str, device: str | None) -> None:
        if device not in (None, 'cpu'):
            raise ValueError(f'device is {device!r}; programs of .pt2 files run on cpu')
        extra = {KEY: ''}
        program = load_program(path, extra)
        self.text = extra[KEY] or None
        # First: a program of others may take anything.
        self._names = parse_metadata(self.text, path).output_names
        (name,) = program.graph_signature.user_inputs
        (taken,) = (node for node in program.graph.nodes if node.name == name)
        self.input_shape = tuple(
            side if isinstance(side, int) else None for side in taken.meta['val'].shape
        )
        self.fixed_batch = self.input_shape[0] if self.input_shape else None
        self._module = program.module()

    @torch.no_grad()
    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self._module(torch.from_numpy(images))
        return {
            name: output.numpy()
            for name, output in zip(self._names, outputs, strict=True)
        }


def _open_program(path: str, device: str | None) -> tuple[Session, str | None]:
    session = _Program(path, device)
    return session, session.text


_OPENERS: dict[str, Callable[[str, str | None], Any]] = dict(
    onnxruntime=_open_onnxruntime,
    openvino=_open_openvino,
    tensorrt=_open_tensorrt,
    torch_export=_open_program,
)

"""Exported files as callables, to be compared with the model they came from.

Each has what `mmbackbones.inference.exported.Session` asks for.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmbackbones.export.executorch_file import need_executorch
from mmbackbones.export.onnx_file import need

__all__ = [
    'ExecuTorchRunner',
    'GraphRunner',
    'OnnxRunner',
    'OpenVinoRunner',
    'ProgramRunner',
]


class GraphRunner:
    """A graph in PyTorch.

    Args:
        graph: of `build_graph`.
    """

    name = 'pytorch'
    fixed_batch = None

    def __init__(self, graph: nn.Module) -> None:
        self._graph, self._names = graph, graph.output_names

    @torch.no_grad()
    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of `(N, 3, H, W)` float32."""
        outputs = self._graph(torch.from_numpy(images))
        return _named(self._names, outputs)


class OnnxRunner:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: of the file.
        threads: 0 leaves the number to the runtime.
    """

    name = 'onnxruntime'

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        runtime = need('onnxruntime', 'running an ONNX file')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = runtime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        self._names = [output.name for output in self._session.get_outputs()]
        batch = self._session.get_inputs()[0].shape[0]
        self.fixed_batch = batch if isinstance(batch, int) else None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of `(N, 3, H, W)` float32."""
        return dict(
            zip(self._names, self._session.run(None, {'images': images}), strict=True)
        )


class OpenVinoRunner:
    """An OpenVINO or ONNX file in OpenVINO, on the CPU in single precision.

    Args:
        path: of the file.
        threads: 0 leaves the number to the runtime.
    """

    name = 'openvino'

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        core = need('openvino', 'running an OpenVINO file').Core()
        # CPUs with bfloat16 would use it unasked.
        options = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        self._compiled = core.compile_model(str(path), 'CPU', options)
        batch = self._compiled.input(0).get_partial_shape()[0]
        self.fixed_batch = batch.get_length() if batch.is_static else None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of `(N, 3, H, W)` float32."""
        found = self._compiled([images])
        return {output.get_any_name(): values for output, values in found.items()}


class ProgramRunner:
    """A `.pt2` of `torch.export`.

    Args:
        path: of the file.
        names: of its outputs.
        fixed_batch: images that it takes, None for any number.
    """

    name = 'torch_export'

    def __init__(
        self, path: str | Path, names: Sequence[str], fixed_batch: int | None
    ) -> None:
        self._module = torch.export.load(path).module()
        self._names, self.fixed_batch = names, fixed_batch

    @torch.no_grad()
    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of `(N, 3, H, W)` float32."""
        return _named(self._names, self._module(torch.from_numpy(images)))


class ExecuTorchRunner:
    """A `.pte` in ExecuTorch's runtime for Python.

    Args:
        path: of the file.
        names: of its outputs.
        fixed_batch: images that it takes.
    """

    name = 'executorch'

    def __init__(
        self, path: str | Path, names: Sequence[str], fixed_batch: int
    ) -> None:
        runtime = need_executorch('executorch.runtime')
        # Kept: a method refers to the program it came from.
        self._program = runtime.Runtime.get().load_program(str(path))
        self._method = self._program.load_method('forward')
        self._names, self.fixed_batch = names, fixed_batch

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name, of `(N, 3, H, W)` float32."""
        return _named(self._names, self._method.execute([torch.from_numpy(images)]))


def _named(names: Sequence[str], outputs: Sequence) -> dict[str, np.ndarray]:
    return {
        name: output.numpy().copy() for name, output in zip(names, outputs, strict=True)
    }

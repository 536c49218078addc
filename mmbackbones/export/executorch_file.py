"""ExecuTorch programs for CPUs of devices, through XNNPACK."""

import importlib
from pathlib import Path
from types import ModuleType

from torch.export import ExportedProgram

__all__ = ['need_executorch', 'save_executorch']


def need_executorch(module: str) -> ModuleType:
    """Import a module of ExecuTorch.

    Raises:
        ValueError: it, or something that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f'an ExecuTorch program needs {error.name}: '
            'pip install "mmbackbones[executorch]"'
        ) from error


def save_executorch(program: ExportedProgram, path: str | Path) -> list[str]:
    """Lower a program and write a `.pte`.

    Args:
        program: of `export_program`, with a fixed batch.
        path: to write.

    Returns:
        Lines for the report: how much XNNPACK took.
    """
    exir = need_executorch('executorch.exir')
    partition = need_executorch(
        'executorch.backends.xnnpack.partition.xnnpack_partitioner'
    )
    edge = exir.to_edge_transform_and_lower(
        program, partitioner=[partition.XnnpackPartitioner()]
    )
    lowered = edge.exported_program().graph
    calls = [node for node in lowered.nodes if node.op == 'call_function']
    delegates = sum('executorch_call_delegate' in str(node.target) for node in calls)
    Path(path).write_bytes(edge.to_executorch().buffer)
    return [f'{delegates} parts run in XNNPACK; {len(calls) - delegates} calls do not']

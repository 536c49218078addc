"""ExecuTorch programs for CPUs of devices, through XNNPACK."""

from pathlib import Path

from torch.export import ExportedProgram

from mmbackbones.export.onnx_file import need

__all__ = ['save_executorch']


def save_executorch(program: ExportedProgram, path: str | Path) -> list[str]:
    """Lower a program and write a `.pte`.

    Args:
        program: of `export_program`, with a fixed batch.
        path: to write.

    Returns:
        Lines for the report: how much XNNPACK took.
    """
    exir = need('executorch.exir', 'an ExecuTorch program')
    partition = need(
        'executorch.backends.xnnpack.partition.xnnpack_partitioner',
        'an ExecuTorch program',
    )
    edge = exir.to_edge_transform_and_lower(
        program, partitioner=[partition.XnnpackPartitioner()]
    )
    lowered = edge.exported_program().graph
    calls = [node for node in lowered.nodes if node.op == 'call_function']
    delegates = sum('executorch_call_delegate' in str(node.target) for node in calls)
    Path(path).write_bytes(edge.to_executorch().buffer)
    return [f'{delegates} parts run in XNNPACK; {len(calls) - delegates} calls do not']

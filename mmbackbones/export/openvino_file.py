"""OpenVINO's format: an `.xml` with the graph and a `.bin` with the weights."""

from pathlib import Path

from mmbackbones.export.onnx_file import need
from mmbackbones.inference.metadata import ExportInfo, write_openvino_metadata

__all__ = ['save_openvino']


def save_openvino(onnx_path: str | Path, path: str | Path, info: ExportInfo) -> None:
    """Convert an ONNX file; weights keep their precision.

    Args:
        onnx_path: of `save_onnx`.
        path: `.xml` to write.
        info: metadata.
    """
    openvino = need('openvino', 'an OpenVINO file')
    model = openvino.Core().read_model(str(onnx_path))
    write_openvino_metadata(model, info)
    openvino.save_model(model, str(path), compress_to_fp16=False)

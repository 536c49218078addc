"""From a config, by its path or its name, and a checkpoint to a model that predicts."""

import difflib
from pathlib import Path

import torch
from mmengine.config import Config

from mmbackbones.apis.config import is_segmentor
from mmbackbones.inference.backends import TorchBackend
from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.layers.cpu_conv import fuse_for_cpu
from mmbackbones.layers.fold import fold_for_inference

__all__ = ['find_config', 'open_checkpoint']


def find_config(name: str) -> str:
    """Path of a config: of a file, or of one in `configs/` by its stem.

    Raises:
        ValueError: there is none, with similar names.
    """
    if name.endswith('.py'):
        if Path(name).is_file():
            return name
        raise ValueError(f'config file {name!r} does not exist; see configs/')
    folder = Path(__file__).parents[2] / 'configs'
    shipped = {path.stem: path for path in folder.glob('*.py')}
    if name in shipped:
        return str(shipped[name])
    similar = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4)
    raise ValueError(
        f'{name!r} is no config file (.py), no exported file (.onnx, .xml, .engine, '
        f'.pt2) and no name of a config in {str(folder)!r}'
        + (f'; similar ones are {", ".join(similar)}' if similar else '')
    )


def open_checkpoint(
    cfg: Config, weights: str | Path | None, device: str | torch.device | None
) -> TorchBackend:
    """Build the model of a config, load it and fold it.

    Nobody else has the model, and it will not be trained: all that folds may fold.

    Args:
        cfg: loaded.
        weights: checkpoint, ours or an official release.
        device: a GPU where there is one, by default.

    Raises:
        ValueError: no weights, or they are unreadable or of another model.
    """
    if weights is None:
        raise ValueError('a config needs weights; give a checkpoint as second argument')
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import build_segmentor as build

        task = 'segmentation'
    else:
        from mmbackbones.apis.detection import build_detector as build

        task = 'detection'
    model = fold_for_inference(build(cfg, str(weights), device))
    if next(model.parameters()).is_cpu:
        fuse_for_cpu(model)
    info = ModelInfo.from_dataset_meta(task, model.dataset_meta)
    return TorchBackend(model, cfg.test_dataloader.dataset.pipeline, info)

"""From a config and a checkpoint to a model that predicts."""

from pathlib import Path

import torch
from mmengine.config import Config

from mmbackbones.apis.config import is_segmentor
from mmbackbones.inference.backends import TorchBackend
from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.layers.cpu_conv import fuse_for_cpu
from mmbackbones.layers.fold import fold_for_inference

__all__ = ['open_checkpoint']


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
        ValueError: no weights, or they are unreadable or of another model; a device
            that PyTorch does not have.
    """
    if weights is None:
        raise ValueError('a config needs weights; give a checkpoint as second argument')
    _check_device(device)
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


def _check_device(device: str | torch.device | None) -> None:
    """A device that is not there says so before a model is built for it."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        gpus = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
        reason = str(error).partition('\n')[0]
        raise ValueError(
            f'device is {str(device)!r}; this PyTorch offers '
            f'{", ".join(["cpu", *gpus])} ({reason})'
        ) from error

"""Runs a function in several processes that are joined over gloo, and a toy detector.

The processes fork from a server that has imported what is slow to import, and has
never computed anything.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import nn

import mmbackbones  # noqa: F401
from mmbackbones.registry import MODELS

__all__ = ['make_batch', 'make_detector', 'on_ranks', 'quiet_config', 'toy_config']

ROOT = Path(__file__).parent.parent
_SLOW_TO_IMPORT = (
    'mmbackbones',
    'mmbackbones.apis.config',
    'mmbackbones.detectors.dfine',
    'mmbackbones.evaluation.coco',
    'mmdet.engine.hooks',
    'mmdet.models.data_preprocessors',
    'mmdet.visualization',
)
TIMEOUT = 60  # seconds after which a process that waits for another has failed


def on_ranks(function: Callable, num_ranks: int, *arguments: object) -> list:
    """What `function(*arguments)` returns on each rank.

    Args:
        function: of a module, with `torch.distributed` at its service.
        num_ranks: processes; 1 runs without a process group, as a single one does.
        arguments: of the function.

    Raises:
        AssertionError: a process failed, or did not end; its traceback.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(_SLOW_TO_IMPORT))
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_run, args=(function, rank, num_ranks, folder, arguments)
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT + 20)
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        results = [
            pickle.loads(path.read_bytes()) if path.exists() else (False, 'no result')
            for path in (Path(folder, str(rank)) for rank in range(num_ranks))
        ]
    failures = [text for ok, text in results if not ok]
    assert not hung and not failures, '\n'.join(map(str, failures))
    return [value for _, value in results]


def _run(
    function: Callable, rank: int, num_ranks: int, folder: str, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT='0',
    )
    try:
        if num_ranks > 1:
            dist.init_process_group(
                'gloo',
                init_method=f'file://{folder}/store',
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=TIMEOUT),
            )
        result = (True, function(*arguments))
    except Exception:  # its traceback fails the test, see `on_ranks`
        result = (False, traceback.format_exc())
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def toy_config() -> Config:
    """The demo's config, its model smaller still."""
    cfg = Config.fromfile(ROOT / 'configs' / 'dfine_demo.py')
    cfg.model.backbone.init_cfg = None
    cfg.model.neck.hidden_dim = 32
    cfg.model.decoder.update(
        hidden_dim=32, num_classes=5, num_queries=20, num_denoising=10
    )
    return cfg


def quiet_config(root: str) -> Config:
    """For a run of one epoch on the set in `root`/data, four images a step."""
    cfg = toy_config()
    cfg.work_dir = f'{root}/run'
    cfg.launcher = 'pytorch' if dist.is_initialized() else 'none'
    cfg.log_level = 'ERROR'
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        loader.dataset.data_root = f'{root}/data'
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    return cfg


def make_detector(cfg: Config | None = None) -> nn.Module:
    """The same detector in every process, its batch norms in evaluation mode."""
    MMLogger.get_instance('ranks', log_level='ERROR')
    torch.manual_seed(0)
    model = MODELS.build((cfg or toy_config()).model)
    model.init_weights()
    # Box heads start at zero, where the gradient of what is below them is zero too.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.02)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def make_batch(sizes: tuple[int, ...], first: int = 0) -> dict:
    """Images with `sizes` boxes, as a loader gives them.

    What is in an image depends on its number, `first` and up, and its size alone.
    """
    inputs, samples = [], []
    for i, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(first + i)
        image = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        corner = torch.rand(size, 2, generator=generator) * 30
        extent = torch.rand(size, 2, generator=generator) * 25 + 5
        sample = DetDataSample()
        sample.set_metainfo(dict(img_shape=(64, 64), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=torch.cat((corner, corner + extent), dim=1),
            labels=torch.randint(5, (size,), generator=generator),
        )
        inputs.append(image)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)

"""Saying before a run that its checkpoints will not fit, and outliving a full disk."""

import shutil
from pathlib import Path

from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend
from torch import nn
from torch.optim import SGD, Optimizer

__all__ = ['PatientVisBackend', 'checkpoint_bytes', 'warn_of_full_disk']


def _bytes_of(tensors: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def checkpoint_bytes(
    model: nn.Module, optimizer: Optimizer, *, averaged: bool
) -> tuple[int, int]:
    """Sizes of a checkpoint with and without the state of the optimiser.

    An estimate from the model alone, before any state exists: two moments of the
    size of each trained parameter (SGD: one), and one more model for an average.
    """
    weights = _bytes_of(model.state_dict().values()) * (2 if averaged else 1)
    trained = [p for group in optimizer.param_groups for p in group['params']]
    moments = 1 if isinstance(optimizer, SGD) else 2
    return weights + moments * _bytes_of(trained), weights


def warn_of_full_disk(
    runner: Runner, folder: str, num_states: int, num_best: int
) -> None:
    """Log what the checkpoints of a run will take; warn where it does not fit.

    Args:
        runner: of the run, with its optimiser built.
        folder: where checkpoints go.
        num_states: how many with the optimiser are kept at a time.
        num_best: how many without.
    """
    averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    whole, weights = checkpoint_bytes(
        runner.model, runner.optim_wrapper.optimizer, averaged=averaged
    )
    # One more is written before the oldest is removed; one is the first stage's best.
    needed = (num_states + 2) * whole + (num_best + 1) * weights
    Path(folder).mkdir(parents=True, exist_ok=True)
    present = sum(path.stat().st_size for path in Path(folder).glob('*.pth'))
    free = shutil.disk_usage(folder).free
    text = (
        f'A checkpoint takes about {whole / 2**20:.0f} MiB, those kept at a time '
        f'{needed / 2**30:.2f} GiB; {folder} has {free / 2**30:.2f} GiB free'
    )
    if needed > free + present:
        runner.logger.warning(
            f'{text}: the disk will be FULL. Free some space, choose another '
            '--work-dir, or keep fewer (default_hooks.checkpoint.max_keep_ckpts)'
        )
    else:
        runner.logger.info(text)


@VISBACKENDS.register_module()
class PatientVisBackend(LocalVisBackend):
    """mmengine's files of scalars and pictures; without space it goes on without.

    A line that cannot be written is lost, and the first one of a row is warned of.

    Args:
        *args: as `LocalVisBackend`.
        **kwargs: likewise.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._failing = False

    def _dump(self, value_dict: dict, file_path: str, file_format: str) -> None:
        try:
            super()._dump(value_dict, file_path, file_format)
        except OSError as error:
            if not self._failing:
                print_log(
                    f'{file_path} cannot be written, training goes on without: {error}',
                    'current',
                    level=30,
                )
            self._failing = True
        else:
            self._failing = False

"""Batch-norm statistics that the ranks have to themselves, made one for validation."""

from mmengine.dist import broadcast, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmbackbones.registry import HOOKS

__all__ = ['SharedBuffersHook']


@HOOKS.register_module()
class SharedBuffersHook(Hook):
    """Gives all ranks the buffers of rank 0 before a validation.

    Without SyncBN (on the CPU, or with `sync_bn = None`) each rank has batch-norm
    statistics of its own, and a checkpoint those of rank 0. This way it is the saved
    model that is evaluated, on all ranks. Nothing happens in a single process.

    Priority LOW: after the averaged weights, `EMAHook` (NORMAL), have come in.
    """

    priority = 'LOW'

    def before_val_epoch(self, runner: Runner) -> None:
        """Overwrite the buffers of the other ranks."""
        if is_distributed():
            for buffer in runner.model.buffers():
                broadcast(buffer)

"""Leaving a run in good order when the machine is wanted back.

Slurm sends SIGTERM before it takes a machine away (pre-emption, time limit), or a
chosen signal some time earlier (`sbatch --signal=USR1@120`); Kubernetes and torchrun
send SIGTERM.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import torch
from mmengine import dist
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmbackbones.engine.safe_checkpoint import SafeCheckpointHook
from mmbackbones.engine.train_loops import forget_validation, step_is_complete
from mmbackbones.registry import HOOKS

__all__ = ['PreemptionHook']

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _OutliveSignals:
    """Start of a loader's worker: it lives on until the main process ends it.

    Slurm signals every process of a job step. A worker that dies of it takes the
    main process along, in the middle of a step. Here a worker obeys the SIGTERM of
    its parent alone. (Where the sender cannot be told, on macOS, nothing is changed.)
    """

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self.inner = inner

    def __call__(self, worker_id: int) -> None:
        if hasattr(signal, 'sigwaitinfo'):
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
        if self.inner is not None:
            self.inner(worker_id)


def _obey(parent: int) -> None:
    """End the process when its parent says so; wait for that in a thread."""
    while True:
        sent = signal.sigwaitinfo(_SIGNALS)
        if sent.si_signo == signal.SIGTERM and sent.si_pid == parent:
            os._exit(0)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM or SIGUSR1: finish the step, save, leave with a code of its own.

    The code is 75, EX_TEMPFAIL of sysexits.h: "try again later". Neither Python (1),
    our tools (2), nor a signal (128 and more) ends with it, so that a job script can
    start the run again (`--resume auto`) on this code alone.

    Ranks agree: one that was signalled leaves with all others, after the same step.
    In a validation a single process leaves at once, and the validation is made up
    for when the run is resumed; several processes leave after it. Where gradients
    are accumulated, the step is finished first.

    Fires after iterations and validations. Keeps no state.

    Priority LOWEST: after `SafeCheckpointHook` (VERY_LOW), which saves for it.

    Args:
        exit_code: to leave with.
        agree_every: iterations between agreements, each of which waits for the
            device; one process does not need any.

    Raises:
        ValueError: there is no `SafeCheckpointHook`; `agree_every` is not positive.
    """

    priority = 'LOWEST'

    def __init__(self, exit_code: int = os.EX_TEMPFAIL, agree_every: int = 10) -> None:
        if agree_every < 1:
            raise ValueError(f'agree_every is {agree_every}; give 1 or more')
        self.exit_code = exit_code
        self.agree_every = agree_every
        self._signal: int | None = None
        self._former: dict[int, object] = {}
        self._training = False
        self._leaving = False  # the same on all ranks

    def before_train(self, runner: Runner) -> None:
        """Listen for the signals from here on."""
        hooks = [h for h in runner.hooks if isinstance(h, SafeCheckpointHook)]
        if not hooks:
            raise ValueError(
                'PreemptionHook saves with SafeCheckpointHook; make that '
                'default_hooks.checkpoint, or leave out default_hooks.preemption'
            )
        self._checkpoint = hooks[0]
        for loop in (runner.train_loop, runner.val_loop):
            loader = getattr(loop, 'dataloader', None)
            if isinstance(loader, DataLoader) and loader.num_workers:
                if not isinstance(loader.worker_init_fn, _OutliveSignals):
                    loader.worker_init_fn = _OutliveSignals(loader.worker_init_fn)
        self._former = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._note)
        self._training = True

    def after_train(self, runner: Runner) -> None:
        """Stop listening."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._training = False

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Leave if a rank was signalled."""
        single = dist.get_world_size() == 1
        if single or self.every_n_train_iters(runner, self.agree_every):
            self._agree()
        if self._leaving and step_is_complete(runner):
            self._leave(runner, runner.iter + 1)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: object = None,
    ) -> None:
        """Leave a validation, where no other rank waits for its end."""
        if (
            self._training
            and self._signal
            and dist.get_world_size() == 1
            and step_is_complete(runner)
        ):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # the trained weights are back
            forget_validation(runner)
            self._leave(runner, runner.iter)

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Leave after a validation."""
        if not self._training:
            return
        self._agree()
        if self._leaving and step_is_complete(runner):
            self._leave(runner, runner.iter, again=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _agree(self) -> None:
        """Leave if any rank was signalled."""
        if self._leaving:
            return
        flag = torch.tensor(int(self._signal is not None))
        dist.all_reduce(flag, 'max')
        self._leaving = bool(flag)

    def _leave(self, runner: Runner, done: int, *, again: bool = False) -> None:
        name = signal.Signals(self._signal).name if self._signal else 'Another rank'
        self._checkpoint.save_state(runner, done, again=again)
        runner.logger.warning(
            f'{name}: {done} iterations are done, the last state is '
            f'{self._checkpoint.last_ckpt}. Leaves with exit code {self.exit_code}; '
            '--resume auto goes on'
        )
        raise SystemExit(self.exit_code)

"""Toy runs in processes of their own, which can be killed at any point.

The model of `toy_runner`, with noise in it; every sample draws from the three random
generators; the score of a validation follows from the weights.
"""

import gc
import os
import random
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from mmengine import runner as runner_module
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from toy_runner import METRIC, ToyModel, toy_runner

from mmbackbones.apis.cpu_processes import init_cpu_processes
from mmbackbones.engine.ema import RampEMAHook
from mmbackbones.engine.nan_guard import NanGuardHook
from mmbackbones.engine.preemption import PreemptionHook
from mmbackbones.engine.safe_checkpoint import SafeCheckpointHook
from mmbackbones.engine.safe_runner import SafeRunner
from mmbackbones.engine.stage_switch import StageSwitchHook

EPOCH_LENGTH = 4

# For the log it starts compilers, which takes longer than a toy run.
runner_module.runner.collect_env = dict


@TRANSFORMS.register_module()
class DrawNoise:
    """A sample that depends on all generators, and on the stage by its scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, results: dict) -> dict:
        noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        x = torch.full((3,), self.scale * noise) + 0.1 * results['sample_idx']
        return dict(inputs=x)


class NoisyDataset(BaseDataset):
    METAINFO = dict(classes=('a', 'b'))

    def load_data_list(self) -> list[dict]:
        return [dict() for _ in range(2 * EPOCH_LENGTH)]


class NoisyModel(ToyModel):
    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> object:
        if mode == 'loss':
            noise = random.random() + np.random.rand()  # noqa: NPY002
            inputs = inputs + noise * torch.rand_like(inputs)
            noise = 0.01 * self.norm(inputs).sum()
            return dict(loss=(self.weight - inputs.mean()).square().sum() + noise)
        return super().forward(inputs, mode)


class WeightMetric(BaseMetric):
    default_prefix = 'coco'

    def process(self, data_batch: dict, data_samples: Sequence) -> None:
        self.results.append(data_samples[0])

    def compute_metrics(self, results: list) -> dict[str, float]:
        # Goes up and down over the epochs.
        return dict(bbox_mAP=float(torch.sin(40 * results[0].sum())))


class Journal(Hook):
    """Notes losses and scores in a file, line by line; calls back at each event."""

    priority = 'VERY_HIGH'  # noted before anything is saved

    def __init__(self, path: Path, at: Callable[[str, Runner], None]) -> None:
        self.path = path
        self.at = at

    def _note(self, *words: object) -> None:
        with self.path.open('a') as file:
            file.write(' '.join(map(str, words)) + '\n')

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        self.at('before', runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        self._note('loss', runner.iter, outputs['loss'].item().hex())

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        self.at('validation', runner)

    def after_val_epoch(self, runner: Runner, metrics=None) -> None:
        self._note('score', runner.iter, metrics[METRIC].hex())


def journal(work_dir: Path) -> dict[str, str]:
    """Value by event; of what was done twice both have to agree."""
    path, table = work_dir / 'journal', {}
    for line in path.read_text().splitlines() if path.exists() else ():
        event, value = line.rsplit(' ', 1)
        assert table.setdefault(event, value) == value, event
    return table


def noisy_runner(
    work_dir: Path,
    *,
    by_epoch: bool = True,
    at: Callable[[str, Runner], None] = lambda event, runner: None,
    num_workers: int = 0,
    batch_size: int = 2,
    drop_last: bool = False,
    hooks: dict | None = None,
    **overrides: object,
) -> Runner:
    """A runner of 5 epochs (the last two are the final stage), or of 20 iterations."""
    loader = dict(
        batch_size=batch_size,
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        sampler=dict(type=DefaultSampler, shuffle=True),
        collate_fn=dict(type='pseudo_collate'),
        dataset=dict(type=NoisyDataset, pipeline=[dict(type=DrawNoise, scale=1.0)]),
    )
    all_hooks = dict(
        ema=dict(type=RampEMAHook, momentum=0.1, warmup_iters=3),
        nan_guard=dict(type=NanGuardHook),
        checkpoint=dict(
            type=SafeCheckpointHook,
            interval=1 if by_epoch else 6,
            by_epoch=by_epoch,
            iter_interval=3,
            save_best=METRIC,
            rule='greater',
        ),
        preemption=dict(type=PreemptionHook),
    )
    if by_epoch:
        all_hooks['stage_switch'] = dict(
            type=StageSwitchHook,
            num_final_epochs=2,
            pipeline=[dict(type=DrawNoise, scale=0.2)],
        )
    train_cfg = (
        dict(by_epoch=True, max_epochs=5, val_interval=1)
        if by_epoch
        else dict(by_epoch=False, max_iters=20, val_interval=6)
    )
    arguments = dict(
        train_dataloader=loader,
        train_cfg=train_cfg,
        val_dataloader=dict(loader, num_workers=0, persistent_workers=False),
        val_evaluator=dict(type=WeightMetric),
        val_cfg=dict(),
        model=NoisyModel(),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.05), clip_grad=dict(max_norm=1.0)
        ),
    )
    all_hooks.update(hooks or {})
    runner = toy_runner(
        work_dir,
        {key: hook for key, hook in all_hooks.items() if hook is not None},
        max_epochs=5,
        runner_class=SafeRunner,
        **{**arguments, **overrides},
    )
    rank = f'_rank{runner.rank}' if runner.distributed else ''
    runner.register_hook(Journal(work_dir / f'journal{rank}', at))
    return runner


def in_child(work: Callable[[], object]) -> int:
    """Do something in a forked process; its exit code, negative for a signal."""
    return _exit_code(_fork(work))


def in_ranks(work: Callable[[int], object], num_ranks: int = 2) -> list[int]:
    """Do something in the ranks of a gloo group; their exit codes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def of_rank(rank: int) -> Callable[[], object]:
        def start() -> None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_ranks),
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=str(port),
            )
            init_cpu_processes('pytorch', timeout=60)
            work(rank)

        return start

    return [_exit_code(pid) for pid in [_fork(of_rank(r)) for r in range(num_ranks)]]


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(work: Callable[[], object]) -> int:
    """Process id of a child that does it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            gc.freeze()  # data sets collect, which would go through all modules
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


RANKS = dict(
    launcher='pytorch',
    env_cfg=dict(dist_cfg=dict(backend='gloo')),
    cfg=dict(
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None
        )
    ),
)
"""Arguments of a runner within `in_ranks`."""


def kill_at(event: str, iteration: int) -> Callable[[str, Runner], None]:
    """SIGKILL to the own process, at an event of an iteration."""

    def at(now: str, runner: Runner) -> None:
        if now == event and runner.iter == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def train(work_dir: Path, **kwargs: object) -> int:
    """Start or resume a run in a process of its own; its exit code."""
    work_dir.mkdir(parents=True, exist_ok=True)
    return in_child(lambda: noisy_runner(work_dir, resume=True, **kwargs).train())
